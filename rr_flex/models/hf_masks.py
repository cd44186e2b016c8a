"""transformers' mask functions, read as masks whose blocks are known in closed form.

They are closures over private variables, read by name. What is not there under its name and type is not recognised.
"""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from mask_mods import SpanMask, bidirectional, both, causal, document, either
from mask_mods.spans import Index, per_batch
from rr_flex.models.records import OWN_MASK

TESTED_TRANSFORMERS = ("5.4.0", "5.17.0", "5.24.0")  # the tests of rr_flex.models pass on each

try:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError("its masks are given positions of another form")
except ImportError as error:
    raise ImportError(
        f"transformers must be one whose masks rr_flex.models can read (tested: {', '.join(TESTED_TRANSFORMERS)}), "
        f"got {transformers.__version__}"
    ) from error

MODULE = "transformers.masking_utils"
FAR = 2**30  # beyond any key

# Factories of MODULE, and what the mask functions that they make capture.
READ: dict[str, dict[str, Any]] = {
    "and_masks": {"mask_functions": tuple},
    "or_masks": {"mask_functions": tuple},
    "sliding_window_overlay": {"sliding_window": int},
    "sliding_window_bidirectional_overlay": {"sliding_window": int},
    "chunked_overlay": {"chunk_size": int, "left_padding": Tensor},
    "packed_sequence_mask_function": {"packed_sequence_mask": Tensor},
    "remap_positions_for_packed_sequence": {"mask_function": Callable},
}
# Known, and without a closed form here.
NOT_READ = ("blockwise_overlay", "padding_mask_function", "add_offsets_to_mask_function")
UNRECOGNISED = f"a mask that transformers {transformers.__version__} writes in another way"


class Term(NamedTuple):
    """One mask function: the factory of MODULE that made it, "" for others, and what it captured."""

    name: str
    captured: dict[str, Any]

    @property
    def parts(self) -> tuple[Callable, ...]:
        """The mask functions that it is made of."""
        alone = self.captured.get("mask_function")
        return self.captured.get("mask_functions", () if alone is None else (alone,))


def term_of(function: Callable) -> Term:
    """What made `function`; a name of READ only where all is captured that belongs to it."""
    if not isinstance(function, FunctionType) or function.__module__ != MODULE:
        return Term("", {})
    name = function.__qualname__.split(".")[0]
    cells = function.__closure__ or ()
    captured = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    expected = READ.get(name)
    if expected is None or not all(isinstance(captured.get(key), kind) for key, kind in expected.items()):
        return Term("", {})
    return Term(name, captured)


def why_unread(function: Callable) -> str | None:
    """Why `spans_of` can't read the mask, as a reason to stay dense: it is the model's own, or of a transformers that
    writes its masks in another way than the tested ones. None: nothing speaks against it."""
    if function in (causal_mask_function, bidirectional_mask_function):
        return None
    term = term_of(function)
    if term.name:
        return next(filter(None, map(why_unread, term.parts)), None)
    theirs = isinstance(function, FunctionType) and function.__module__ == MODULE
    return UNRECOGNISED if theirs and function.__qualname__.split(".")[0] not in NOT_READ else OWN_MASK


def is_causal(function: Callable) -> bool:
    """Whether no query sees past itself: the causal function is a term of the intersection."""
    if function is causal_mask_function:
        return True
    term = term_of(function)
    return term.name != "or_masks" and any(map(is_causal, term.parts))


def has_window(function: Callable) -> bool:
    """Whether a sliding window is a term of the mask."""
    term = term_of(function)
    return term.name.startswith("sliding_window_") or any(map(has_window, term.parts))


def causal_window(function: Callable) -> int | None:
    """The window of a sliding causal mask, FAR for a plain causal one, None for any other mask."""
    if function is causal_mask_function:
        return FAR
    term = term_of(function)
    if term.name != "and_masks" or len(term.parts) != 2:
        return None
    overlay, rest = term_of(term.parts[0]), term.parts[1]
    is_window = overlay.name == "sliding_window_overlay" and rest is causal_mask_function
    return overlay.captured["sliding_window"] if is_window else None


def spans_of(function: Callable, q_offset: Index, kv_offset: int, device: torch.device) -> SpanMask | None:
    """The SpanMask over indices that shows what `function` shows over positions; None where it can't be read.

    Query i stands at position i + q_offset, key j at j + kv_offset. Reads causal, bidirectional, sliding-window,
    chunked and packed masks of transformers.masking_utils and their intersections and unions; tensors move to `device`.
    """
    offset = q_offset - kv_offset
    offset = offset.to(device) if isinstance(offset, Tensor) else torch.full((), offset, device=device)
    return _Reader(offset, kv_offset, device).read(function, packed=False)


class _Reader(NamedTuple):
    offset: Tensor  # index of the key at query 0's position
    kv_offset: int
    device: torch.device

    def read(self, function: Callable, packed: bool) -> SpanMask | None:
        """`packed`: the same-document mask holds beside this one, so that positions in a document differ as indices
        do."""
        if function is causal_mask_function:
            return causal(self.offset)
        if function is bidirectional_mask_function:
            return bidirectional()
        name, captured = term = term_of(function)
        if name in ("and_masks", "or_masks"):
            names = [term_of(part).name for part in term.parts]
            packed = packed or (name == "and_masks" and "packed_sequence_mask_function" in names)
            masks = [self.read(part, packed) for part in term.parts]
            if None in masks:
                return None
            return (both if name == "and_masks" else either)(*masks)
        if name == "sliding_window_overlay":
            return _window(captured["sliding_window"], self.offset)
        if name == "sliding_window_bidirectional_overlay":
            return _band(captured["sliding_window"], self.offset)
        if name == "chunked_overlay":
            start = captured["left_padding"].to(self.device) - self.kv_offset
            return _chunks(captured["chunk_size"], start, self.offset)
        if name == "packed_sequence_mask_function":
            return document(captured["packed_sequence_mask"].to(self.device))
        if name == "remap_positions_for_packed_sequence" and packed:
            return self.read(captured["mask_function"], packed)
        return None


def _window(window: int, offset: Tensor) -> SpanMask:
    """Key j is visible when j > position − window; without the causal mask beside it, it would have no end."""
    return SpanMask(lambda b, h, q_idx: ((q_idx + offset - (window - 1), FAR),))


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
