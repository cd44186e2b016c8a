"""transformers' mask functions, read as masks whose blocks are known in closed form."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from mask_mods import SpanMask, bidirectional, both, causal, document, either
from mask_mods.spans import Index, per_batch

FAR = 2**30  # beyond any key


def spans_of(mask_function: Callable, q_offset: Index, kv_offset: int, device: torch.device) -> SpanMask | None:
    """The SpanMask over indices that shows what `mask_function` shows over positions; None where it can't be read.

    Query i stands at position i + q_offset, key j at j + kv_offset. Reads causal, bidirectional, sliding-window,
    chunked and packed masks of transformers.masking_utils and their intersections and unions; tensors move to `device`.
    """
    offset = q_offset - kv_offset
    offset = offset.to(device) if isinstance(offset, Tensor) else torch.full((), offset, device=device)
    return _read(mask_function, offset, kv_offset, device, packed=False)


def is_causal(mask_function: Callable) -> bool:
    """Whether no query sees past itself: the causal function is a term of the intersection."""
    if mask_function is masking_utils.causal_mask_function:
        return True
    name, captured = _name_and_captured(mask_function)
    if name == "and_masks":
        return any(is_causal(part) for part in captured["mask_functions"])
    return name == "remap_positions_for_packed_sequence" and is_causal(captured["mask_function"])


def has_window(mask_function: Callable) -> bool:
    """Whether a sliding window is a term of the mask."""
    name, captured = _name_and_captured(mask_function)
    if name in ("and_masks", "or_masks"):
        return any(has_window(part) for part in captured["mask_functions"])
    return name.startswith("sliding_window_") or (
        name == "remap_positions_for_packed_sequence" and has_window(captured["mask_function"])
    )


def causal_window(mask_function: Callable) -> int | None:
    """The window of a sliding causal mask, FAR for a plain causal one, None for any other mask."""
    if mask_function is masking_utils.causal_mask_function:
        return FAR
    name, captured = _name_and_captured(mask_function)
    if name != "and_masks" or len(captured["mask_functions"]) != 2:
        return None
    overlay, rest = captured["mask_functions"]
    name, captured = _name_and_captured(overlay)
    is_window = name == "sliding_window_overlay" and rest is masking_utils.causal_mask_function
    return captured["sliding_window"] if is_window else None


def causal_run(first: Tensor, last: Tensor, window: Tensor, offset: Tensor) -> SpanMask:
    """Causal within `window` tokens among the real tokens first[b] … last[b], int64 [B]; a padded query sees nothing.

    Tensors only, 0-dim or [B]: other windows, paddings and offsets run the same compiled graph.
    """

    def spans(b, h, q_idx):
        start, stop, position = per_batch(first, b), per_batch(last, b), q_idx + offset
        low = torch.maximum(position - (window - 1), start)
        return ((low, torch.where((start <= position) & (position <= stop), position, -1)),)

    def keys(b, h, kv_idx):
        return (per_batch(first, b) <= kv_idx) & (kv_idx <= per_batch(last, b))

    return SpanMask(spans, keys, label=lambda: "causal_run()")


def real_run(padding_mask: Tensor, kv_offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """First and last real key [B] of a [B, total] mask over positions, and whether all between are real (0-dim)."""
    total = padding_mask.shape[1]
    first = padding_mask.int().argmax(1)
    last = total - 1 - padding_mask.flip(1).int().argmax(1)
    return first - kv_offset, last - kv_offset, (padding_mask.sum(1) == last - first + 1).all()


def _read(function: Callable, offset: Tensor, kv_offset: int, device: torch.device, packed: bool) -> SpanMask | None:
    """`packed`: the same-document mask holds beside this one, so that positions in a document differ as indices do."""
    if function is masking_utils.causal_mask_function:
        return causal(offset)
    if function is masking_utils.bidirectional_mask_function:
        return bidirectional()
    name, captured = _name_and_captured(function)
    if name in ("and_masks", "or_masks"):
        parts = captured["mask_functions"]
        names = [_name_and_captured(part)[0] for part in parts]
        packed = packed or (name == "and_masks" and "packed_sequence_mask_function" in names)
        masks = [_read(part, offset, kv_offset, device, packed) for part in parts]
        if None in masks:
            return None
        return (both if name == "and_masks" else either)(*masks)
    if name == "sliding_window_overlay":
        # Without the causal mask beside it, it would have no end.
        return SpanMask(lambda b, h, q_idx: ((q_idx + offset - (captured["sliding_window"] - 1), FAR),))
    if name == "sliding_window_bidirectional_overlay":
        return _band(captured["sliding_window"], offset)
    if name == "chunked_overlay":
        return _chunks(captured["chunk_size"], captured["left_padding"].to(device) - kv_offset, offset)
    if name == "packed_sequence_mask_function":
        return document(captured["packed_sequence_mask"].to(device))
    if name == "remap_positions_for_packed_sequence" and packed:
        return _read(captured["mask_function"], offset, kv_offset, device, packed)
    return None


def _name_and_captured(function: Callable) -> tuple[str, dict[str, Any]]:
    """The factory of transformers.masking_utils that made `function`, and what it captured; ("", {}) of others."""
    if not isinstance(function, FunctionType) or function.__module__ != masking_utils.__name__:
        return "", {}
    cells = function.__closure__ or ()
    captured = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    return function.__qualname__.split(".")[0], captured


def _band(window: int, offset: Tensor) -> SpanMask:
    """Key j is visible when |j − position| ≤ window."""
    return SpanMask(lambda b, h, q_idx: ((q_idx + offset - window, q_idx + offset + window),))


def _chunks(size: int, start: Tensor, offset: Tensor) -> SpanMask:
    """Key j is visible in the query's own chunk of `size` tokens, counted from start[b]."""

    def spans(b, h, q_idx):
        begin = per_batch(start, b)
        first = begin + (q_idx + offset - begin) // size * size
        return ((first, first + size - 1),)

    return SpanMask(spans)
