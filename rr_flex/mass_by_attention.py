"""Block mass on an accelerator: softmax(QKᵀ)·V through FlexAttention, V's rows the one-hot indicators of blocks.

Pooled keys are cut into segments of some key blocks, a batch axis; V has a column a block. What a stride counts, its
share of real keys, stands in V in place of 1. Each segment returns its log-sum-exp: the columns of exp(lse)·out over
their sum across all segments are the weighted softmax's. Exact, one pass of the kernel, and no score is stored.
"""

from typing import Literal

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from mask_mods import block_visibility
from rr_flex.block_mask import list_partial_and_full
from rr_flex.geometry import as_tensors, ceil_div
from rr_flex.kernels.options import estimate_columns, estimate_options
from rr_flex.kernels.score_mods import score_mod_of
from rr_flex.mass import Indices, Samples, key_weights, stride_visible

TILE = 128  # sampled queries, or pooled keys, in a tile that the kernel visits or skips whole
FEATURES = (16, 256)  # least and greatest width of q and k that the kernel takes


def kernel_can_estimate(features: Tensor) -> bool:
    """Whether there is a kernel that returns the LSE for these sampled queries: CUDA, width 16 to 256."""
    return features.device.type == "cuda" and FEATURES[0] <= features.shape[-1] <= FEATURES[1]


def block_mass_by_attention(samples: Samples) -> Float[Tensor, "B Hq nQ nK"]:
    """What `block_mass` computes, to the rounding of q's dtype. Meant for torch.compile: eager stores all scores."""
    B, _, nq, _ = samples.queries.shape
    Hkv, nk = samples.keys.shape[1:3]
    device, dtype = samples.queries.device, samples.queries.dtype
    (nQ, nK), (queries_per_block, keys_per_block) = samples.grid, samples.per_block
    columns = estimate_columns(samples.queries, keys_per_block, TILE)
    segment = columns * keys_per_block  # pooled keys, a whole number of tiles
    # At least two, and at the end columns picked, not sliced: one graph for lengths on both sides of a segment's end.
    segments = max(2, ceil_div(nK, columns))

    keys = F.pad(samples.keys, (0, 0, 0, segments * segment - nk))
    keys = rearrange(keys, "b h (s n) e -> (s b) h n e", s=segments)
    queries = repeat(samples.queries, "b h n e -> (s b) h n e", s=segments)
    block = torch.arange(segment, device=device) // keys_per_block
    values = (block[:, None] == torch.arange(columns, device=device)).to(dtype)  # segment columns
    weights = key_weights(samples)
    if weights is not None:
        weights = F.pad(weights, (0, segments * segment - nk))
        weights = rearrange(weights.expand(B, -1, -1), "b h (s n) -> (s b) h n 1", s=segments)
        values = values * weights.to(dtype)
    values = values.expand(segments * B, Hkv, -1, -1)

    out, aux = flex_attention(
        queries,
        keys,
        values,
        score_mod=score_mod_of(samples.softcap),
        block_mask=_tiles(samples, segment, segments),
        scale=samples.scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        kernel_options=estimate_options(samples.queries),
    )
    lse = rearrange(aux.lse, "(s b) h n -> s b h n", s=segments)
    highest = lse.amax(0)
    weight = torch.exp(lse - torch.where(highest == -torch.inf, 0, highest))
    out = rearrange(out, "(s b) h n c -> s b h n c", s=segments)
    cut = "nowhere" if weights is None else "at the end" if samples.valid_keys is None else "anywhere"
    share = weight / _total(out, weight, cut, last=(nk - 1) // segment)
    rows = F.pad(out * share[..., None], (0, 0, 0, nQ * queries_per_block - nq))
    mass = reduce(rows.float(), "s b h (Q q) c -> b h Q s c", "sum", q=queries_per_block).flatten(3)
    return mass.index_select(3, torch.arange(nK, device=device))


def _total(
    out: Float[Tensor, "segments B Hq nq columns"],
    weight: Float[Tensor, "segments B Hq nq"],
    cut: Literal["nowhere", "at the end", "anywhere"],
    last: int,
) -> Float[Tensor, "B Hq nq"]:
    """The sum over all columns of weight·out, at least a tiny number.

    `cut`: where there may be strides that count for less. A segment without such has columns that sum to 1, which saves
    reading `out` once more; `last` is the segment that holds the end.
    """
    tiny = torch.finfo(torch.float32).tiny
    if cut == "anywhere":
        return (out * weight[..., None]).sum((0, 4), dtype=torch.float32).clamp(min=tiny)
    total = weight.sum(0)
    if cut == "at the end":
        index = torch.full((1,), last, dtype=torch.int64, device=out.device)
        columns = out.index_select(0, index)[0].sum(-1, dtype=torch.float32)
        total = total - (1 - columns) * weight.index_select(0, index)[0]
    return total.clamp(min=tiny)


def _tiles(samples: Samples, segment: int, segments: int) -> BlockMask:
    """Which tiles of (sampled queries × pooled keys) the kernel visits, and which strides are visible inside them."""
    (B, Hq, nq, _), nk = samples.queries.shape, samples.keys.shape[2]
    (Lq, Lk), device = samples.seq_lengths, samples.queries.device
    tile_tokens = tuple(TILE * stride for stride in samples.strides)
    visible, whole = block_visibility(samples.mask_mod, B=B, H=Hq, Lq=Lq, Lk=Lk, block_size=tile_tokens, device=device)
    nT = segments * segment // TILE
    # Padding strides in a tile must be masked one by one.
    whole = whole & ((torch.arange(visible.shape[3], device=device) + 1) * TILE <= nk)
    # Lists with B > 1 and H = 1 that are built inside a graph crash the kernel (torch 2.11): expand to all heads.
    visible, whole = (
        rearrange(
            F.pad(tiles, (0, nT - tiles.shape[3])).expand(B, Hq, -1, -1), "b h q (s t) -> (s b) h q t", s=segments
        )
        for tiles in (visible, whole)
    )
    # Numbers that depend on the lengths are captured as tensors: ints would compile anew (and fail if dynamic).
    last_query, key_count = samples.ends or as_tensors((Lq - 1, Lk), device)

    def visible_in_segment(b, h, q_idx, kv_idx):
        first_key = (b // B * segment + kv_idx) * samples.strides[1]
        return stride_visible(samples, Indices(b % B, h, q_idx, first_key), last_query=last_query, Lk=key_count)

    return BlockMask.from_kv_blocks(
        *list_partial_and_full(visible, whole),
        BLOCK_SIZE=TILE,
        mask_mod=visible_in_segment,
        seq_lengths=(nq, segment),
        compute_q_blocks=False,
    )
