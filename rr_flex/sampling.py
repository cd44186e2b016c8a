"""Queries to sampled queries, keys to pooled keys (RRAttention, arXiv 2602.05853, and second-order pooling)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from rr_flex.geometry import ceil_div, sampled_index


def sample_queries(
    q: Float[Tensor, "B Hq Lq D"], stride: int, head_offset: int | Tensor = 0, phase: str = "head"
) -> Float[Tensor, "B Hq nq D"]:
    """One query a stride: head h takes token i·stride + ((h + head_offset) mod stride), clamped to Lq − 1.

    Other phases than the paper's "head" are those of `sampled_index`.
    """
    B, Hq, Lq, D = q.shape
    head = torch.arange(Hq, device=q.device)[:, None] + head_offset
    stride_index = torch.arange(ceil_div(Lq, stride), device=q.device)
    index = sampled_index(head, stride_index, stride, Lq - 1, phase).expand(Hq, -1)  # Hq nq
    return q.gather(2, index[None, :, :, None].expand(B, -1, -1, D))


def pool_keys(
    k: Float[Tensor, "B Hkv Lk D"], stride: int, valid: Bool[Tensor, "#B #Hkv Lk"] | None = None
) -> Float[Tensor, "B Hkv nk D"]:
    """Mean of each run of `stride` keys over its `valid` ones, summed in float32; a run with none pools to 0."""
    return moments(k, stride, valid)[0].to(k.dtype)


def moments(
    x: Float[Tensor, "B H L D"], stride: int, valid: Bool[Tensor, "#B #H L"] | None = None
) -> tuple[Float[Tensor, "B H n D"], Float[Tensor, "B H n D"]]:
    """Mean and population variance of each run of `stride` tokens over its `valid` ones, in float32."""
    L = x.shape[2]
    n = ceil_div(L, stride)
    if valid is None:
        valid = torch.ones(1, 1, L, dtype=torch.bool, device=x.device)
    runs = F.pad(x.float(), (0, 0, 0, n * stride - L)).unflatten(2, (n, stride))
    live = _runs(valid, stride)[..., None]  # B H n stride 1
    count = live.sum(3).clamp(min=1)
    mean = torch.where(live, runs, 0).sum(3) / count
    variance = torch.where(live, (runs - mean[:, :, :, None]).square(), 0).sum(3) / count
    return mean, variance


def stride_weights(valid: Bool[Tensor, "b h L"], stride: int) -> Float[Tensor, "b h n"]:
    """What each run of `stride` tokens counts in a softmax over runs: its number of `valid` ones over `stride`."""
    return _runs(valid, stride).sum(3, dtype=torch.float32) / stride


def second_order_features(
    sampled: Float[Tensor, "B Hq nq D"],
    mean: Float[Tensor, "B Hkv nk D"],
    variance: Float[Tensor, "B Hkv nk D"],
    scale: float,
    weight: float = 0.5,
) -> tuple[Float[Tensor, "B Hq nq 2*D"], Float[Tensor, "B Hkv nk 2*D"]]:
    """Features whose dot product, times `scale`, is the logit's mean plus `weight` of its variance over a stride.

    log-mean-exp of Gaussian logits = mean + ½·variance, with variance ≈ scale²·Σ_d q_d²·var_d (keys' axes taken as
    uncorrelated): q' = [q, weight·scale·q²], k' = [mean, var]. Clamped to the largest finite number of q's dtype.
    """
    return _with_square(sampled, weight * scale), _with_variance(mean, variance, sampled.dtype)


def pooled_query_features(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    query_pool: int,
    order: int,
    scale: float,
    valid: Bool[Tensor, "#B #Hq Lq"] | None = None,
    weight: float = 0.5,
) -> tuple[Float[Tensor, "B Hq nq E"], Float[Tensor, "B Hkv Lk E"]]:
    """The same with the sides exchanged: queries pooled over `query_pool` tokens, every key on its own.

    E is D at order 1, where the pooled query is the mean, and 2·D at order 2: q' = [mean, var] and
    k' = [k, weight·scale·k²].
    """
    mean, variance = moments(q, query_pool, valid)
    if order == 1:
        return mean.to(q.dtype), k
    return _with_variance(mean, variance, q.dtype), _with_square(k, weight * scale)


def _runs(valid: Bool[Tensor, "b h L"], stride: int) -> Bool[Tensor, "b h n stride"]:
    n = ceil_div(valid.shape[2], stride)
    return F.pad(valid, (0, n * stride - valid.shape[2])).unflatten(2, (n, stride))


def _with_square(x: Tensor, factor: float) -> Tensor:
    square = (factor * x.float().square()).clamp(max=torch.finfo(x.dtype).max)
    return torch.cat([x, square.to(x.dtype)], dim=-1)


def _with_variance(mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([mean, variance.clamp(max=torch.finfo(dtype).max)], dim=-1).to(dtype)
