"""Sampled queries and pooled keys to block mass: the estimate of how much attention falls on each block."""

from functools import reduce
from operator import or_

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mask_mods import any_key_visible
from mask_mods.spans import Index, MaskMod
from rr_flex.geometry import ceil_div, sampled_index
from rr_flex.kernels.score_mods import soft_cap
from rr_flex.sampling import stride_weights

STRIP_ELEMENTS = 1 << 25  # float32 scores held at once: 128 MiB


def block_mass(
    sampled: Float[Tensor, "B Hq nq E"],
    pooled: Float[Tensor, "B Hkv nk E"],
    *,
    mask_mod,
    Lq: int,
    Lk: int,
    strides: tuple[int, int],
    block_size: tuple[int, int],
    scale: float,
    head_offset: int | Tensor = 0,
    phase: str = "head",
    softcap: Tensor | float | None = None,
    valid_keys: Bool[Tensor, "#B #Hkv Lk"] | None = None,
) -> Float[Tensor, "B Hq nQ nK"]:
    """Softmax of sampled queries over visible key strides, summed over each block's tile; float32.

    A key stride is visible to a sampled query as `stride_visible` says, and its share is in proportion to its number of
    `valid_keys` (None: all are valid), which a short last stride or padding makes fewer. A row sums to the
    number of its sampled queries that see something. Scores are held for a strip of block rows at a time.
    """
    B, Hq, nq, _ = sampled.shape
    nk = pooled.shape[2]
    nQ, nK = ceil_div(Lq, block_size[0]), ceil_div(Lk, block_size[1])
    queries_per_block = block_size[0] // strides[0]
    keys_per_block = block_size[1] // strides[1]
    rows = max(1, STRIP_ELEMENTS // (B * Hq * queries_per_block * nk))
    batch = torch.arange(B, device=sampled.device)[:, None, None, None]
    head = torch.arange(Hq, device=sampled.device)[:, None, None]
    first_key = torch.arange(nk, device=sampled.device) * strides[1]
    weights = key_weights(valid_keys, Lk, strides[1], sampled.device)
    if weights is not None:
        group = 1 if weights.shape[1] == 1 else Hq // pooled.shape[1]
        weights = weights.repeat_interleave(group, 1)[:, :, None]  # B Hq 1 nk, or 1 for B and for Hq

    strips = []
    # One strip is no loop: that keeps a graph open to other lengths.
    for row in (0,) if nQ <= rows else range(0, nQ, rows):
        start, stop = row * queries_per_block, min((row + min(rows, nQ)) * queries_per_block, nq)
        stride_index = torch.arange(start, stop, device=sampled.device)[:, None]
        visible = stride_visible(
            mask_mod,
            batch,
            head,
            stride_index,
            first_key,
            strides=strides,
            last_query=Lq - 1,
            Lk=Lk,
            head_offset=head_offset,
            phase=phase,
        )
        scores = soft_cap(_scores(sampled[:, :, start:stop].float() * scale, pooled), softcap)  # B Hq strip nk
        share = _masked_softmax(scores, visible, weights)
        height = ceil_div(stop - start, queries_per_block)
        share = F.pad(share, (0, nK * keys_per_block - nk, 0, height * queries_per_block - (stop - start)))
        tiles = share.unflatten(3, (nK, keys_per_block)).unflatten(2, (height, queries_per_block))
        strips.append(tiles.sum(dim=(3, 5)))
    return torch.cat(strips, dim=2)


def key_weights(
    valid_keys: Bool[Tensor, "#B #Hkv Lk"] | None, Lk: int, stride: int, device: torch.device
) -> Float[Tensor, "#B #Hkv nk"] | None:
    """`stride_weights` of the keys, all valid if `valid_keys` is None: then None, all alike, for strides of one key."""
    if valid_keys is None:
        if stride == 1:
            return None
        valid_keys = torch.ones(1, 1, Lk, dtype=torch.bool, device=device)
    return stride_weights(valid_keys, stride)


def stride_visible(
    mask_mod: MaskMod,
    b: Tensor,
    h: Tensor,
    stride_index: Tensor,
    first_key: Tensor,
    *,
    strides: tuple[int, int],
    last_query: Index,
    Lk: Index,
    head_offset: Index,
    phase: str,
) -> Bool[Tensor, "..."]:
    """Does `mask_mod` show any key of the stride at `first_key` to the query that stands for query stride i?

    The sampled query, or with phase "pooled" the first or the last query of the stride: that is any query of it under
    a mask whose keys in view move with the query, and never one that none of them sees.
    """
    if phase == "pooled":
        queries = [sampled_index(0, stride_index, strides[0], last_query, end) for end in ("first", "last")]
    else:
        queries = [sampled_index(h + head_offset, stride_index, strides[0], last_query, phase)]
    return reduce(or_, [any_key_visible(mask_mod, b, h, q_idx, first_key, strides[1], Lk) for q_idx in queries])


def _scores(sampled: Float[Tensor, "B Hq n E"], pooled: Float[Tensor, "B Hkv nk E"]) -> Float[Tensor, "B Hq n nk"]:
    """Dot products in float32, each key head shared by its group of query heads without repeating keys."""
    Hq, n, Hkv = sampled.shape[1], sampled.shape[2], pooled.shape[1]
    grouped = sampled.unflatten(1, (Hkv, Hq // Hkv)).flatten(2, 3).float()  # B Hkv group*n E
    return (grouped @ pooled.float().mT).unflatten(2, (Hq // Hkv, n)).flatten(1, 2)


def _masked_softmax(scores: Tensor, visible: Tensor, weights: Tensor | None) -> Tensor:
    """Softmax over the visible last axis, each exponential times its weight (0 hides it).

    A row with nothing visible is 0; NaN and inf scores stay visible as NaN.
    """
    scores = scores if weights is None else scores + weights.log()
    scores = torch.where(visible, scores, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weight = torch.exp(scores - torch.where(highest == -torch.inf, 0, highest))
    return weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
