"""Queries to sampled queries, keys to pooled keys (RRAttention, arXiv 2602.05853, and second-order pooling)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from rr_flex.geometry import ceil_div, sampled_index


def sample_queries(
    q: Float[Tensor, "B Hq Lq D"], stride: int, head_offset: int | Tensor = 0
) -> Float[Tensor, "B Hq nq D"]:
    """One query a stride: head h takes token i·stride + ((h + head_offset) mod stride), clamped to Lq − 1."""
    B, Hq, Lq, D = q.shape
    head = torch.arange(Hq, device=q.device)[:, None] + head_offset
    stride_index = torch.arange(ceil_div(Lq, stride), device=q.device)
    index = sampled_index(head, stride_index, stride, Lq - 1)  # Hq nq
    return q.gather(2, index[None, :, :, None].expand(B, -1, -1, D))


def pool_keys(
    k: Float[Tensor, "B Hkv Lk D"], stride: int, valid: Bool[Tensor, "#B #Hkv Lk"] | None = None
) -> Float[Tensor, "B Hkv nk D"]:
    """Mean of each run of `stride` keys over its `valid` ones, summed in float32; a run with none pools to 0."""
    return key_moments(k, stride, valid)[0].to(k.dtype)


def key_moments(
    k: Float[Tensor, "B Hkv Lk D"], stride: int, valid: Bool[Tensor, "#B #Hkv Lk"] | None = None
) -> tuple[Float[Tensor, "B Hkv nk D"], Float[Tensor, "B Hkv nk D"]]:
    """Mean and population variance of each run of `stride` keys over its `valid` ones, in float32."""
    Lk = k.shape[2]
    nk = ceil_div(Lk, stride)
    if valid is None:
        valid = torch.ones(1, 1, Lk, dtype=torch.bool, device=k.device)
    padding = nk * stride - Lk
    runs = F.pad(k.float(), (0, 0, 0, padding)).unflatten(2, (nk, stride))
    live = F.pad(valid, (0, padding)).unflatten(2, (nk, stride))[..., None]  # B Hkv nk stride 1
    count = live.sum(3).clamp(min=1)
    mean = torch.where(live, runs, 0).sum(3) / count
    variance = torch.where(live, (runs - mean[:, :, :, None]).square(), 0).sum(3) / count
    return mean, variance


def second_order_features(
    sampled: Float[Tensor, "B Hq nq D"],
    mean: Float[Tensor, "B Hkv nk D"],
    variance: Float[Tensor, "B Hkv nk D"],
    scale: float,
) -> tuple[Float[Tensor, "B Hq nq 2*D"], Float[Tensor, "B Hkv nk 2*D"]]:
    """Features whose dot product, times `scale`, is the logit's mean plus half its variance over a stride.

    log-mean-exp of Gaussian logits = mean + ½·variance, with variance ≈ scale²·Σ_d q_d²·var_d (keys' axes taken as
    uncorrelated): q' = [q, ½·scale·q²], k' = [mean, var]. Clamped to the largest finite number of q's dtype.
    """
    largest = torch.finfo(sampled.dtype).max
    square = (0.5 * scale * sampled.float().square()).clamp(max=largest)
    queries = torch.cat([sampled, square.to(sampled.dtype)], dim=-1)
    return queries, torch.cat([mean, variance.clamp(max=largest)], dim=-1).to(sampled.dtype)
