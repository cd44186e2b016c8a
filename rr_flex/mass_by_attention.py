"""Block mass on an accelerator: softmax(QKᵀ)·V through FlexAttention, V's rows the one-hot indicators of blocks.

Pooled keys are cut into segments of some key blocks, a batch axis; V has a column a block. What a stride counts, its
share of real keys, stands in V in place of 1. Each segment returns its log-sum-exp: the columns of exp(lse)·out over
their sum across all segments are the weighted softmax's. Exact, one pass of the kernel, and no score is stored.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from mask_mods import block_visibility
from mask_mods.spans import MaskMod
from rr_flex.block_mask import list_blocks
from rr_flex.geometry import ceil_div
from rr_flex.kernels.options import estimate_columns, estimate_options
from rr_flex.kernels.score_mods import score_mod_of
from rr_flex.mass import key_weights, stride_visible

TILE = 128  # sampled queries, or pooled keys, in a tile that the kernel visits or skips whole
FEATURES = (16, 256)  # least and greatest width of q and k that the kernel takes


def kernel_can_estimate(sampled: Tensor) -> bool:
    """Whether there is a kernel that returns the LSE for these sampled queries: CUDA, width 16 to 256."""
    return sampled.device.type == "cuda" and FEATURES[0] <= sampled.shape[-1] <= FEATURES[1]


def block_mass_by_attention(
    sampled: Float[Tensor, "B Hq nq E"],
    pooled: Float[Tensor, "B Hkv nk E"],
    *,
    mask_mod: MaskMod,
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
    """What `block_mass` computes, to the rounding of q's dtype. Meant for torch.compile: eager stores all scores."""
    B, Hq, nq, _ = sampled.shape
    Hkv, nk = pooled.shape[1:3]
    device = sampled.device
    nQ, nK = ceil_div(Lq, block_size[0]), ceil_div(Lk, block_size[1])
    queries_per_block, keys_per_block = block_size[0] // strides[0], block_size[1] // strides[1]
    columns = estimate_columns(sampled, keys_per_block, TILE)
    segment = columns * keys_per_block  # pooled keys, a whole number of tiles
    # At least two, and at the end columns picked, not sliced: one graph for lengths on both sides of a segment's end.
    segments = max(2, ceil_div(nK, columns))

    keys = F.pad(pooled, (0, 0, 0, segments * segment - nk)).unflatten(2, (segments, segment))
    keys = keys.permute(2, 0, 1, 3, 4).flatten(0, 1)  # segments*B Hkv segment E
    queries = sampled.expand(segments, -1, -1, -1, -1).flatten(0, 1)
    block = torch.arange(segment, device=device) // keys_per_block
    values = (block[:, None] == torch.arange(columns, device=device)).to(sampled.dtype)  # segment columns
    weights = key_weights(valid_keys, Lk, strides[1], device)
    if weights is not None:
        weights = F.pad(weights, (0, segments * segment - nk)).unflatten(2, (segments, segment))
        weights = weights.permute(2, 0, 1, 3).expand(-1, B, -1, -1).flatten(0, 1)  # segments*B #Hkv segment
        values = values * weights[..., None].to(values.dtype)
    values = values.expand(segments * B, Hkv, -1, -1)

    block_mask = _tiles(
        mask_mod,
        B=B,
        Hq=Hq,
        Lq=Lq,
        Lk=Lk,
        strides=strides,
        segment=segment,
        segments=segments,
        head_offset=head_offset,
        phase=phase,
        device=device,
    )
    out, aux = flex_attention(
        queries,
        keys,
        values,
        score_mod=score_mod_of(softcap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        kernel_options=estimate_options(sampled),
    )
    lse = aux.lse.unflatten(0, (segments, B))  # segments B Hq nq
    highest = lse.amax(0)
    weight = torch.exp(lse - torch.where(highest == -torch.inf, 0, highest))
    out = out.unflatten(0, (segments, B))  # segments B Hq nq columns
    cut = "nowhere" if weights is None else "at the end" if valid_keys is None else "anywhere"
    share = weight / _total(out, weight, cut, last=(nk - 1) // segment)
    rows = F.pad(out * share[..., None], (0, 0, 0, nQ * queries_per_block - nq)).unflatten(3, (nQ, queries_per_block))
    mass = rows.sum(4, dtype=torch.float32)  # segments B Hq nQ columns
    return mass.permute(1, 2, 3, 0, 4).flatten(3).index_select(3, torch.arange(nK, device=device))


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


def _tiles(
    mask_mod: MaskMod,
    *,
    B: int,
    Hq: int,
    Lq: int,
    Lk: int,
    strides: tuple[int, int],
    segment: int,
    segments: int,
    head_offset: int | Tensor,
    phase: str,
    device: torch.device,
) -> BlockMask:
    """Which tiles of (sampled queries × pooled keys) the kernel visits, and which strides are visible inside them."""
    q_stride, k_stride = strides
    nq, nk = ceil_div(Lq, q_stride), ceil_div(Lk, k_stride)
    tile_tokens = (TILE * q_stride, TILE * k_stride)
    visible, whole = block_visibility(mask_mod, B=B, H=Hq, Lq=Lq, Lk=Lk, block_size=tile_tokens, device=device)
    nT = segments * segment // TILE
    # Padding strides in a tile must be masked one by one.
    whole = whole & ((torch.arange(visible.shape[3], device=device) + 1) * TILE <= nk)
    visible, whole = (F.pad(tiles, (0, nT - tiles.shape[3])) for tiles in (visible, whole))
    # Lists with B > 1 and H = 1 that are built inside a graph crash the kernel (torch 2.11): expand to all heads.
    visible, whole = (
        tiles.expand(B, Hq, -1, -1).unflatten(3, (segments, segment // TILE)).permute(3, 0, 1, 2, 4).flatten(0, 1)
        for tiles in (visible, whole)
    )
    partial_count, partial = list_blocks(visible & ~whole)
    full_count, full = list_blocks(visible & whole)
    # Numbers that depend on the lengths are captured as tensors: ints would compile anew (and fail if dynamic).
    last_query = torch.full((), Lq - 1, dtype=torch.int64, device=device)
    key_count = torch.full((), Lk, dtype=torch.int64, device=device)

    def visible_in_segment(b, h, q_idx, kv_idx):
        first_key = (b // B * segment + kv_idx) * k_stride
        return stride_visible(
            mask_mod,
            b % B,
            h,
            q_idx,
            first_key,
            strides=strides,
            last_query=last_query,
            Lk=key_count,
            head_offset=head_offset,
            phase=phase,
        )

    return BlockMask.from_kv_blocks(
        partial_count,
        partial,
        full_count,
        full,
        BLOCK_SIZE=TILE,
        mask_mod=visible_in_segment,
        seq_lengths=(nq, segment),
        compute_q_blocks=False,
    )
