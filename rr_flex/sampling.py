"""Queries to sampled queries, keys to pooled keys (RRAttention, arXiv 2602.05853, and second-order pooling)."""

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from rr_flex.geometry import ceil_div, sampled_index

FEW_TOKENS = 32  # in a run that is summed one by one
Moments = tuple[Float[Tensor, "B H n D"], Float[Tensor, "B H n D"]]  # mean and variance of each run


def sample_queries(
    q: Float[Tensor, "B Hq Lq D"], stride: int, head_offset: int | Tensor = 0
) -> Float[Tensor, "B Hq nq D"]:
    """One query a stride: head h takes token i·stride + ((h + head_offset) mod stride), clamped to Lq − 1."""
    B, Hq, Lq, D = q.shape
    head = torch.arange(Hq, device=q.device)[:, None] + head_offset
    stride_index = torch.arange(ceil_div(Lq, stride), device=q.device)
    index = sampled_index(head, stride_index, stride, Lq - 1).expand(Hq, -1)  # Hq nq
    return q.gather(2, index[None, :, :, None].expand(B, -1, -1, D))


def pool_keys(
    k: Float[Tensor, "B Hkv Lk D"], stride: int, valid: Bool[Tensor, "#B #Hkv Lk"] | None = None
) -> Float[Tensor, "B Hkv nk D"]:
    """Mean of each run of `stride` keys over its `valid` ones, summed in float32; a run with none pools to 0."""
    return moments(k, stride, valid)[0].to(k.dtype)


def moments(x: Float[Tensor, "B H L D"], stride: int, valid: Bool[Tensor, "#B #H L"] | None = None) -> Moments:
    """Mean and population variance of each run of `stride` tokens over its `valid` ones, in float32.

    What stands at a token that is not valid, NaN too, does not count.
    """
    L = x.shape[2]
    runs = rearrange(F.pad(x.float(), (0, 0, 0, -L % stride)), "b h (n s) d -> b h n s d", s=stride)
    if valid is None:
        position = rearrange(torch.arange(L + -L % stride, device=x.device), "(n s) -> n s 1", s=stride)
        live, count = position < L, _real_tokens(L, stride, x.device)[:, None]
    else:
        live = _runs(valid, stride)[..., None]  # b h n stride 1
        count = live.sum(3).clamp(min=1)
    mean = _sum(torch.where(live, runs, 0)) / count
    apart = torch.where(live, (runs - mean[:, :, :, None]).square(), 0)
    return mean, _sum(apart) / count


def _sum(runs: Float[Tensor, "B H n stride D"]) -> Float[Tensor, "B H n D"]:
    """Of each run. Of few tokens written out: in a graph that is no reduction, and all of pooling is one kernel."""
    stride = runs.shape[3]
    return sum(runs.unbind(3)) if stride <= FEW_TOKENS else reduce(runs, "b h n s d -> b h n d", "sum")


def stride_weights(valid: Bool[Tensor, "b h L"], stride: int) -> Float[Tensor, "b h n"]:
    """What each run of `stride` tokens counts in a softmax over runs: its number of `valid` ones over `stride`."""
    return _runs(valid, stride).sum(3, dtype=torch.float32) / stride


def stride_weights_of_all(L: int, stride: int, device: torch.device) -> Float[Tensor, "1 1 n"]:
    """`stride_weights` where all of L tokens are valid: only a last run may count for less."""
    return (_real_tokens(L, stride, device) / stride)[None, None]


def _real_tokens(L: int, stride: int, device: torch.device) -> Int[Tensor, " n"]:
    """How many of L tokens each run holds."""
    return (L - stride * torch.arange(ceil_div(L, stride), device=device)).clamp(max=stride)


def with_square(x: Float[Tensor, "B H n D"], factor: float) -> Float[Tensor, "B H n 2*D"]:
    """[x, factor · x²], the side that is not pooled at order 2.

    log-mean-exp of Gaussian logits = mean + ½·variance, with variance ≈ scale²·Σ_d q_d²·var_d (axes taken as
    uncorrelated). So q' = [q, weight·scale·q²] and k' = [mean, var] have a dot product which, times `scale`, is the
    logit's mean plus `weight` of its variance over a stride; with queries pooled the sides are exchanged. `factor` is
    weight · scale. Clamped to the largest finite number of x's dtype.
    """
    square = (factor * x.float().square()).clamp(max=torch.finfo(x.dtype).max)
    return torch.cat([x, square.to(x.dtype)], dim=-1)


def with_variance(pooled: Moments, dtype: torch.dtype) -> Float[Tensor, "B H n 2*D"]:
    """[mean, variance], the pooled side of `with_square`, in `dtype` and clamped to its largest finite number."""
    mean, variance = pooled
    return torch.cat([mean, variance.clamp(max=torch.finfo(dtype).max)], dim=-1).to(dtype)


def pooled_features(
    x: Float[Tensor, "B H L D"], stride: int, order: int, valid: Bool[Tensor, "#B #H L"] | None = None
) -> Float[Tensor, "B H n E"]:
    """What stands for each run of `stride` tokens, in x's dtype: its mean (E = D), at order 2 `with_variance`."""
    pooled = moments(x, stride, valid)
    return pooled[0].to(x.dtype) if order == 1 else with_variance(pooled, x.dtype)


def _runs(valid: Bool[Tensor, "b h L"], stride: int) -> Bool[Tensor, "b h n stride"]:
    return rearrange(F.pad(valid, (0, -valid.shape[2] % stride)), "b h (n s) -> b h n s", s=stride)
