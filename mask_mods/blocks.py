"""The block rule of every mask: is any, are all of a block's pairs visible, without looking at the pairs."""

from functools import reduce
from operator import or_

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mask_mods.checks import LARGEST, check_count, recorded
from mask_mods.spans import Index, MaskMod, SpanMask, buffered, larger, smaller

FEW_SPANS = 4  # a query, up to which merging them in pairs is less work than sorting them
STRIP_PAIRS = 2**26  # pairs of a plain mask_mod that are evaluated at once in eager mode


def any_key_visible(
    mask_mod: MaskMod, b: Tensor, h: Tensor, q_idx: Tensor, k_first: Tensor, length: int, Lk: Index
) -> Bool[Tensor, "..."]:
    """Is any of the keys k_first … min(k_first + length, Lk) − 1 visible to query q_idx? Elementwise, as a mask_mod is.

    Closed form for a SpanMask; for a plain function, `length` calls of it. Under `dynamic=True` inside a mask_mod, an
    `Lk` that depends on the lengths must be a 0-dim tensor.
    """
    if isinstance(mask_mod, SpanMask):
        k_last = smaller(k_first + length, Lk) - 1
        spans = mask_mod.spans(b, h, q_idx)
        return reduce(or_, [larger(first, k_first) <= smaller(last, k_last) for first, last in spans])
    visible = [mask_mod(b, h, q_idx, smaller(k_first + step, Lk - 1)) for step in range(length)]
    return reduce(or_, visible) & (k_first < Lk)


def hides_keys(mask_mod: MaskMod) -> bool:
    """Whether there may be keys that no query may see, as far as the mask says (`SpanMask.keys`)."""
    return getattr(mask_mod, "keys", None) is not None


def visible_keys(mask_mod: MaskMod, B: int, H: int, Lk: int, device: torch.device | str) -> Bool[Tensor, "b h Lk"]:
    """False for keys that no query may see, as far as the mask says (`SpanMask.keys`); b is B or 1, h is H or 1."""
    if not hides_keys(mask_mod):
        return torch.ones(1, 1, Lk, dtype=torch.bool, device=device)
    b = torch.arange(B, device=device).view(B, 1, 1)
    h = torch.arange(H, device=device).view(1, H, 1)
    kv_idx = torch.arange(Lk, device=device).view(1, 1, Lk)
    # Buffered: inductor (2.13) cannot pad a comparison of int64 that it has not computed yet to fewer than 8 keys.
    visible = buffered(mask_mod.keys(b, h, kv_idx))
    return visible.expand(torch.broadcast_shapes(visible.shape, kv_idx.shape))


def seeing_queries(
    mask_mod: MaskMod, B: int, H: int, Lq: int, Lk: int, device: torch.device | str
) -> Bool[Tensor, "b h Lq"]:
    """False for queries that see no key, such as padded ones; b is B or 1, h is H or 1.

    Closed form for a SpanMask; a plain function is evaluated on all Lq·Lk pairs, as in `block_visibility`.
    """
    if not isinstance(mask_mod, SpanMask):
        sizes = {"B": B, "H": H, "Lq": Lq, "Lk": Lk, "block_size": (1, Lk), "device": device}
        return block_visibility(mask_mod, **sizes)[0].squeeze(-1)
    b, h = torch.arange(B, device=device).view(B, 1, 1), torch.arange(H, device=device).view(1, H, 1)
    first_key = torch.zeros((), dtype=torch.int64, device=device)
    sees = any_key_visible(mask_mod, b, h, torch.arange(Lq, device=device), first_key, Lk, Lk)
    return sees.expand(torch.broadcast_shapes(sees.shape, (1, 1, Lq)))


def last_queries(mask_mod: MaskMod, B: int, H: int, Lq: int, Lk: int, device: torch.device | str) -> Int[Tensor, "b h"]:
    """The last query of each sequence that is no padding: Lq − 1 unless the mask hides keys; −1 where none is left.

    b is B or 1, h is H or 1.
    """
    if not hides_keys(mask_mod):
        return torch.full((1, 1), Lq - 1, dtype=torch.int64, device=device)
    query = torch.arange(Lq, device=device)
    return torch.where(seeing_queries(mask_mod, B, H, Lq, Lk, device), query, -1).amax(-1)


def block_visibility(
    mask_mod: MaskMod, *, B: int, H: int, Lq: int, Lk: int, block_size: tuple[int, int], device: torch.device | str
) -> tuple[Bool[Tensor, "b h nQ nK"], Bool[Tensor, "b h nQ nK"]]:
    """Are (any, all) of a block's pairs inside Lq × Lk visible? b is B, or 1 where the mask ignores it; h likewise.

    `block_size` is (query, key). A SpanMask costs O(Lq + nQ·nK) time and memory, a growing one no kernel of its own. A
    plain function is evaluated on all Lq·Lk pairs, in strips that bound the memory (compiled, the pairs are fused
    away); it must be elementwise in broadcast indices: `t[b, q_idx]`, not `t[b][q_idx]`. No host sync; traces under
    `fullgraph=True`.
    """
    q_block, k_block = block_size
    for name, value in (("B", B), ("H", H), ("Lq", Lq), ("Lk", Lk), ("block_size", q_block), ("block_size", k_block)):
        check_count(name, value, minimum=1)
    nQ = -(-Lq // q_block)
    b = torch.arange(B, device=device)
    h = torch.arange(H, device=device)
    if isinstance(mask_mod, SpanMask) and mask_mod.growing:
        return _blocks_of_row_ends(mask_mod, b.view(B, 1, 1, 1), h.view(1, H, 1, 1), (Lq, Lk), block_size)
    # A ragged last block repeats the last query (below, the last key): a real pair twice changes neither answer.
    # Buffered: inductor (2.13) fails to simplify quotients of bounds that are nothing but arithmetic of an arange.
    q_idx = buffered(torch.arange(nQ * q_block, device=device).clamp(max=Lq - 1))
    if isinstance(mask_mod, SpanMask):
        spans = mask_mod.spans(b.view(B, 1, 1), h.view(1, H, 1), q_idx.view(1, 1, -1))
        return _blocks_of_spans(spans, q_idx, Lk, block_size)
    return _blocks_of_pairs(mask_mod, b.view(B, 1, 1, 1), h.view(1, H, 1, 1), q_idx, Lk, block_size)


def _blocks_of_row_ends(mask_mod: SpanMask, b: Tensor, h: Tensor, lengths: tuple[int, int], block: tuple[int, int]):
    """Both answers for a growing mask: any by the row's last query, all by its first."""
    (Lq, Lk), (q_block, k_block) = lengths, block
    nQ, nK = -(-Lq // q_block), -(-Lk // k_block)
    row = torch.arange(nQ, device=b.device)[:, None]
    k_first = torch.arange(nK, device=b.device) * k_block
    k_last = (k_first + k_block).clamp(max=Lk) - 1
    ((first, last),) = mask_mod.spans(b, h, ((row + 1) * q_block).clamp(max=Lq) - 1)
    visible = larger(first, k_first) <= smaller(last, k_last)
    ((first, last),) = mask_mod.spans(b, h, row * q_block)
    whole = (first <= k_first) & (k_last <= last)
    return tuple(x.expand(torch.broadcast_shapes(x.shape, (1, 1, nQ, nK))) for x in (visible, whole))


def _blocks_of_spans(spans, q_idx: Int[Tensor, " queries"], Lk: int, block_size: tuple[int, int]):
    """Both answers by counting, for each key block, the queries of a block row that touch it and that see all of it."""
    q_block, k_block = block_size
    nK = -(-Lk // k_block)
    # Zeros turn ints into tensors and give each bound its query axis.
    zeros = torch.zeros_like(q_idx).view(1, 1, -1)
    firsts = [(first + zeros).clamp(min=0) for first, _ in spans]
    lasts = [(last + zeros).clamp(max=Lk - 1) for _, last in spans]
    bounds = torch.broadcast_tensors(*firsts, *lasts)  # each [b, h, queries]
    clipped = list(zip(bounds[: len(spans)], bounds[len(spans) :], strict=True))

    touched = [(first // k_block, torch.where(first <= last, last // k_block, -1)) for first, last in clipped]
    # The last block ends with the last key, wherever in the block that is.
    covered = [
        ((first + k_block - 1) // k_block, torch.where(last == Lk - 1, nK - 1, (last + 1) // k_block - 1))
        for first, last in _merge(clipped)
    ]
    return _count_queries(touched, q_block, nK) > 0, _count_queries(covered, q_block, nK) == q_block


def _merge(spans: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The same keys as disjoint spans with gaps between them; those that others swallowed come back empty."""
    if len(spans) > FEW_SPANS:
        return _merge_sorted(spans)
    merged = []
    for first, last in spans:
        # Each pass extends the span by at least one of those that overlap or touch it, so m − 1 passes reach the end.
        for _ in range(len(spans) - 1):
            for other_first, other_last in spans:
                last = torch.where(other_first <= last + 1, torch.maximum(last, other_last), last)
        merged.append((first, last))
    # Spans of one connected stretch now share their last key: keep the one that starts first.
    kept = []
    for this, (first, last) in enumerate(merged):
        swallowed = torch.zeros_like(first, dtype=torch.bool)
        for that, (other_first, other_last) in enumerate(merged):
            if this != that:
                starts_before = other_first <= first if that < this else other_first < first
                swallowed = swallowed | (starts_before & (other_last == last))
        kept.append((first, torch.where(swallowed, -1, last)))
    return kept


def _merge_sorted(spans: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """`_merge` in the order of the spans' first keys, whose work does not grow with the cube of their number."""
    first, last = (torch.stack(bounds) for bounds in zip(*spans, strict=True))
    first, last = torch.where(first <= last, first, 2 * LARGEST), torch.where(first <= last, last, -1)
    first, order = first.sort(0)
    reached = last.gather(0, order).cummax(0).values
    starts = torch.cat([torch.ones_like(first[:1], dtype=torch.bool), first[1:] > reached[:-1] + 1])
    # A stretch reaches as far as the last of its spans, the one before the next start.
    ends_here = torch.cat([starts[1:], torch.ones_like(starts[:1])])
    end = torch.where(ends_here, reached, 2 * LARGEST).flip(0).cummin(0).values.flip(0)
    return list(zip(first.unbind(), torch.where(starts, end, -1).unbind(), strict=True))


def _count_queries(ranges: list[tuple[Tensor, Tensor]], q_block: int, nK: int) -> Int[Tensor, "b h nQ nK"]:
    """How often key block j lies in a query's range (first, last) of blocks, summed over block rows of q_block queries.

    +1 where a range starts, −1 after it ends, and a running sum along the key blocks.
    """
    b, h, queries = ranges[0][0].shape
    steps = torch.zeros(b, h, queries // q_block, nK + 1, dtype=torch.int32, device=ranges[0][0].device)
    for first, last in ranges:
        rows = (b, h, queries // q_block, q_block)
        nonempty = (first <= last).int().reshape(rows)
        start, stop = (x.clamp(0, nK).reshape(rows) for x in (first, last + 1))
        steps = steps.scatter_add(-1, start, nonempty).scatter_add(-1, stop, -nonempty)
    return steps.cumsum(-1, dtype=torch.int32)[..., :nK]


def _blocks_of_pairs(mask_mod: MaskMod, b: Tensor, h: Tensor, q_idx: Tensor, Lk: int, block_size: tuple[int, int]):
    """Both answers by brute force over the element rule, a strip of block rows at a time."""
    q_block, k_block = block_size
    nK = -(-Lk // k_block)
    kv_idx = torch.arange(nK * k_block, device=q_idx.device).clamp(max=Lk - 1).view(1, 1, 1, -1)
    strip = len(q_idx)
    # A loop would unroll in the graph, which needs none: the compiler fuses pairs and reduction.
    if not recorded():
        strip = max(1, STRIP_PAIRS // (b.numel() * h.numel() * q_block * kv_idx.numel())) * q_block
    any_parts, all_parts = [], []
    for rows in q_idx.split(strip):
        visible = mask_mod(b, h, rows.view(1, 1, -1, 1), kv_idx)
        if visible.ndim > 4:
            raise ValueError(f"mask_mod must be elementwise in its indices, got shape {list(visible.shape)}")
        visible = visible.expand(torch.broadcast_shapes(visible.shape, (1, 1, len(rows), nK * k_block)))
        tiles = visible.reshape(*visible.shape[:2], -1, q_block, nK, k_block)
        any_parts.append(tiles.any(-1).any(-2))
        all_parts.append(tiles.all(-1).all(-2))
    return torch.cat(any_parts, 2), torch.cat(all_parts, 2)
