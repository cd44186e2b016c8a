"""transformers' mask functions, read as masks whose blocks are known in closed form.

They are closures over private variables, read by name. What is not there under its name and type is not recognised.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from mask_mods import SpanMask, bidirectional, both, causal, document, either
from mask_mods.spans import per_batch
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
# Factories of MODULE that are known, and without a closed form here.
NOT_READ = ("blockwise_overlay", "padding_mask_function", "add_offsets_to_mask_function")
UNRECOGNISED = f"a mask that transformers {transformers.__version__} writes in another way"


class Place(NamedTuple):
    """Where a mask is asked: query i stands at position i + offset + kv_offset, key j at j + kv_offset."""

    offset: Tensor  # index of the key at query 0's position, 0-dim
    kv_offset: int
    device: torch.device


@dataclass(frozen=True)
class Reading:
    """What is known of a mask function."""

    spans: Callable[[Place], SpanMask] | None = None  # over indices it shows what the function shows over positions
    unread: str | None = None  # why it can't be read, as a reason to stay dense
    causal: bool = False  # whether no query sees past itself
    sliding: bool = False  # whether a sliding window is a term of it
    window: int | None = None  # a query sees at most so many keys up to its own, and nothing else hides one; or FAR

    @property
    def causal_window(self) -> int | None:
        """The window of a sliding causal mask, FAR for a plain causal one, None for any other mask."""
        return self.window if self.causal else None


def read(function: Callable, packed: bool = False) -> Reading:
    """Reads causal, bidirectional, sliding-window, chunked and packed masks, their intersections and unions.

    `packed`: the same-document mask holds beside this one, so that positions in a document differ as indices do.
    """
    if function is causal_mask_function:
        return Reading(lambda at: causal(at.offset), causal=True, window=FAR)
    if function is bidirectional_mask_function:
        return Reading(lambda at: bidirectional())
    name, captured = made_by(function)
    if name in ("and_masks", "or_masks"):
        parts = captured["mask_functions"]
        packed = packed or (name == "and_masks" and "packed_sequence_mask_function" in (made_by(p)[0] for p in parts))
        return _joined(name, [read(part, packed) for part in parts])
    if name == "remap_positions_for_packed_sequence":
        inner = read(captured["mask_function"], packed)
        return inner if packed else replace(inner, unread=inner.unread or OWN_MASK)
    if name:
        spans = SPANS[name][1]
        window = captured["sliding_window"] if name == "sliding_window_overlay" else None
        return Reading(lambda at: spans(at, **captured), sliding="window" in name, window=window)
    theirs = isinstance(function, FunctionType) and function.__module__ == MODULE
    new = theirs and function.__qualname__.split(".")[0] not in NOT_READ
    return Reading(unread=UNRECOGNISED if new else OWN_MASK)


def _joined(name: str, parts: list[Reading]) -> Reading:
    every = name == "and_masks"
    join = both if every else either
    windows = [part.window for part in parts]
    return Reading(
        spans=lambda at: join(*(part.spans(at) for part in parts)),
        unread=next((part.unread for part in parts if part.unread), None),
        causal=every and any(part.causal for part in parts),
        sliding=any(part.sliding for part in parts),
        window=min(windows) if every and None not in windows else None,
    )


def made_by(function: Callable) -> tuple[str, dict[str, Any]]:
    """(The factory of MODULE that made it, what it captured); ("", {}) unless all is there that belongs to the name."""
    if not isinstance(function, FunctionType) or function.__module__ != MODULE:
        return "", {}
    name = function.__qualname__.split(".")[0]
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    captured = dict(zip(function.__code__.co_freevars, cells, strict=True))
    expected = COMPOSED.get(name) or SPANS.get(name, ({}, None))[0]
    if not expected or not all(isinstance(captured.get(key), kind) for key, kind in expected.items()):
        return "", {}
    return name, {key: captured[key] for key in expected}


def _window(at: Place, sliding_window: int) -> SpanMask:
    """Key j is visible when j > position − window; without the causal mask beside it, it would have no end."""
    return SpanMask(lambda b, h, q_idx: ((q_idx + at.offset - (sliding_window - 1), FAR),))


def _band(at: Place, sliding_window: int) -> SpanMask:
    """Key j is visible when |j − position| ≤ window."""
    return SpanMask(lambda b, h, q_idx: ((q_idx + at.offset - sliding_window, q_idx + at.offset + sliding_window),))


def _chunks(at: Place, chunk_size: int, left_padding: Tensor) -> SpanMask:
    """Key j is visible in the query's own chunk of so many tokens, counted from left_padding[b]."""
    start = left_padding.to(at.device) - at.kv_offset

    def spans(b, h, q_idx):
        begin = per_batch(start, b)
        first = begin + (q_idx + at.offset - begin) // chunk_size * chunk_size
        return ((first, first + chunk_size - 1),)

    return SpanMask(spans)


def _documents(at: Place, packed_sequence_mask: Tensor) -> SpanMask:
    return document(packed_sequence_mask.to(at.device))


# Factories of MODULE: what the mask functions that they make capture, and these functions' spans.
SPANS: dict[str, tuple[dict[str, type], Callable[..., SpanMask]]] = {
    "sliding_window_overlay": ({"sliding_window": int}, _window),
    "sliding_window_bidirectional_overlay": ({"sliding_window": int}, _band),
    "chunked_overlay": ({"chunk_size": int, "left_padding": Tensor}, _chunks),
    "packed_sequence_mask_function": ({"packed_sequence_mask": Tensor}, _documents),
}
COMPOSED = {
    "and_masks": {"mask_functions": tuple},
    "or_masks": {"mask_functions": tuple},
    "remap_positions_for_packed_sequence": {"mask_function": Callable},
}
