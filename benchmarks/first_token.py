"""The clock of a whole prefill: time to first token, and the attention functions' part of it."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.timing import synchronize


@torch.no_grad()
def first_token(model, ids: Tensor, chunk: int | None = None) -> Tensor:
    """Prefill with a new cache, at once or `chunk` tokens at a time, and logits for the last token only."""
    found = None
    for part in ids.split(chunk or ids.shape[1], 1):
        cache = None if found is None else found.past_key_values
        found = model(part, use_cache=True, past_key_values=cache, logits_to_keep=1)
    return found.logits[:, -1].argmax(-1)


def time_first_token(
    model, ids: Tensor, implementation: str, *, repeats: int, seconds: float, chunk: int | None = None
) -> dict[str, Any]:
    """Medians of up to `repeats` prefills, no more begun after `seconds`, with a clock around each attention call."""
    device = ids.device
    start = time.perf_counter()
    first_token(model, ids, chunk)
    synchronize(device)
    warm = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole, in_attention = [], []
    start = time.perf_counter()
    with clocked(implementation, device) as clock:
        while not whole or (len(whole) < repeats and time.perf_counter() - start < seconds):
            with clock.span() as span:
                first_token(model, ids, chunk)
            whole.append(clock.read([span]))
            in_attention.append(clock.read(clock.calls))
            clock.calls.clear()
    median, attention = statistics.median(whole), statistics.median(in_attention)
    return {
        "ms": median,
        "all_ms": whole,
        "attention_total_ms": attention,
        "rest_ms": median - attention,
        "first_call_s": warm,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


class Clock:
    """Spans between two marks: device events on CUDA, the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: list[list] = []

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self) -> Iterator[list]:
        """[start, stop], the stop appended when the block ends."""
        marks = [self._mark()]
        yield marks
        marks.append(self._mark())

    def read(self, spans: list[list]) -> float:
        """Milliseconds of all `spans` together; waits for the device."""
        synchronize(self.device)
        if self.device.type == "cuda":
            return sum(start.elapsed_time(stop) for start, stop in spans)
        return 1000 * sum(stop - start for start, stop in spans)


@contextmanager
def clocked(implementation: str, device: torch.device) -> Iterator[Clock]:
    """A clock whose `calls` gain a span for each call of an attention function of transformers."""
    plain: Callable = ALL_ATTENTION_FUNCTIONS[implementation]
    clock = Clock(device)

    def clocked_attention(*args, **kwargs):
        with clock.span() as span:
            out = plain(*args, **kwargs)
        clock.calls.append(span)
        return out

    AttentionInterface.register(implementation, clocked_attention)
    try:
        yield clock
    finally:
        AttentionInterface.register(implementation, plain)
