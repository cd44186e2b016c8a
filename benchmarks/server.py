"""What the suites of `python -m benchmarks chunks` share: the layer, dense attention, the host's clock."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Progress, one_call, synchronize
from benchmarks.workloads import Inputs, Shape, captured, structured
from rr_flex.kernels.dense import dense_attention

Row = dict[str, Any]
HOST_CALLS, HOST_SECONDS = 15, 0.5  # of which the median is taken, and after which no further one begins


@dataclass(frozen=True, kw_only=True)
class Server:
    """What all suites share: the card, a layer's shape, and how long to measure."""

    device: torch.device
    dtype: torch.dtype
    heads: int  # of queries
    kv_heads: int
    head_dim: int
    length: int  # tokens of the longest prompt
    backends: tuple[str, ...]  # of rr_attention
    seconds: float  # about how long to repeat a timing
    seed: int
    file: str | None  # of captured q, k, v in place of structured ones
    progress: Progress

    def inputs(self, batch: int, length: int) -> Inputs:
        if self.file is not None:
            q, k, v = captured(self.file, self.device, self.dtype)
            return Inputs(*(x[:batch, :, :length] for x in (q, k, v)))
        shape = Shape(length, self.heads, self.kv_heads, self.head_dim, batch)
        return structured(shape, dtype=self.dtype, device=self.device, seed=self.seed)

    @property
    def about(self) -> Row:
        names = ("heads", "kv_heads", "head_dim", "seed")
        workload = "structured" if self.file is None else Path(self.file).name
        cuda = self.device.type == "cuda"
        return {name: getattr(self, name) for name in names} | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "workload": workload,
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(self.device)) if cuda else None,
        }


def median_host_ms(call: Callable[[int], object], device: torch.device) -> float:
    """Milliseconds until a warm call returns, begun on an idle device; on the CPU it returns when it is done."""
    times, begin = [], time.perf_counter()
    while len(times) < HOST_CALLS and time.perf_counter() - begin < HOST_SECONDS:
        synchronize(device)
        start = time.perf_counter()
        call(0)
        times.append(1000 * (time.perf_counter() - start))
    synchronize(device)
    return sorted(times)[len(times) // 2]


def dense_kernel(device: torch.device) -> tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Causal attention of the last queries, the fastest that is installed; its name."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return "sdpa", sdpa

    def flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)  # takes B L H D
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return ("fa4", flash_attention_4) if device.type == "cuda" else ("sdpa", sdpa)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dense_attention(q, k, v, causal=True, scale=None)


def warm_up(call: Callable[[int], object], device: torch.device, times: int = 3) -> None:
    for _ in range(times):
        one_call(call, 0, device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
