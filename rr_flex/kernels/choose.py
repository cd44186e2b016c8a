"""Which kernel attends: a table of them, each with what speaks against it and how it attends."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from rr_flex.geometry import as_tensors, ceil_div
from rr_flex.kernels import flash, flex
from rr_flex.kernels.flex import Attended
from rr_flex.kernels.last_rows import all_rows_apart, rows_apart
from rr_flex.request import Request
from rr_flex.runtime.tracing import traced

LARGEST_TILE = 128  # tokens
Backend = Literal["auto", "triton", "flash"]


@dataclass(frozen=True)
class Kernel:
    """Block-sparse attention over what is selected."""

    # What speaks against it for q [B,Hq,Lq,D], v [B,Hkv,Lk,Dv] and the request; None: it is right here.
    why_not: Callable[[Tensor, Tensor, Request], str | None]
    attend: Callable[[Tensor, Tensor, Tensor, Request], Attended]  # q, k, v of one slice of heads
    least_keys_apart: int | None  # from which on dense last rows attend by themselves (last_rows.py); None: never
    own_masks: bool  # whether "auto" takes it for a mask of the caller's, whose last rows it can take apart


def _not_cuda(q: Tensor, v: Tensor, request: Request) -> str | None:
    return None if q.device.type == "cuda" else f"it runs on CUDA, not on {q.device.type}"


def _not_cpu(q: Tensor, v: Tensor, request: Request) -> str | None:
    return None if q.device.type != "cuda" else "it is the CPU's"


# In the order in which "auto" asks them.
KERNELS = {
    # FLASH can't be asked by other queries what a mask of the caller's own shows; it is taken for one by name.
    "flash": Kernel(flash.why_not, flash.attend, least_keys_apart=0, own_masks=False),
    # Under these keys a row takes less time than the second kernel that this compiles.
    "triton": Kernel(_not_cuda, flex.attend, least_keys_apart=16384, own_masks=True),
    "cpu": Kernel(_not_cpu, flex.attend, least_keys_apart=None, own_masks=True),
}


def check_backend_name(backend: object) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")


def check_backend(backend: Backend, q: Tensor) -> None:
    """ValueError for a backend that is unknown, or named where q's device has no choice."""
    check_backend_name(backend)
    if backend != "auto" and q.device.type != "cuda":
        raise ValueError(f"backend must be 'auto' where q is not on a CUDA device, got {backend!r}")


def choose_kernel(backend: Backend, q: Tensor, v: Tensor, request: Request) -> str:
    """The name of the kernel: the first of the table where nothing speaks against it; a named one, or RuntimeError."""
    if backend != "auto":
        reason = KERNELS[backend].why_not(q, v, request)
        if reason is not None:
            raise RuntimeError(f"backend must be 'auto' or another kernel here, got {backend!r}: {reason}")
        return backend
    fitting = (name for name, kernel in KERNELS.items() if kernel.own_masks or request.own_mask is None)
    return next(name for name in fitting if KERNELS[name].why_not(q, v, request) is None)


def laid_out(name: str, q: Tensor, k: Tensor, request: Request) -> Request:
    """The request with what the kernel of this name is told of its block rows: `rows_apart`, `whole_tiles`.

    Settled here, not in the graph: there what is asked of a length can make a constant of it.
    """
    Lq, Lk = q.shape[2], k.shape[2]
    own_graph = name == "triton" and not traced()
    whole = own_graph and Lq % LARGEST_TILE == 0 and Lk % LARGEST_TILE == 0
    # For one whole tile the compiler finds out late that Lq is a constant, which a mask may not capture (torch 2.11).
    ends = as_tensors((Lq - 1, Lk), q.device) if own_graph and Lq == LARGEST_TILE else None
    rows = _rows_apart(KERNELS[name], q, Lk, request)
    return replace(request, rows_apart=rows, whole_tiles=whole, ends=ends)


def _rows_apart(kernel: Kernel, q: Tensor, Lk: int, request: Request) -> int:
    own_mask = request.own_mask is not None and not kernel.own_masks
    if request.dense or request.backward or own_mask or kernel.least_keys_apart is None:
        return 0
    rows = ceil_div(q.shape[2], request.config.block_sizes[0])
    if not traced() and all_rows_apart(q, rows, Lk):
        return rows
    return rows_apart(q.shape[2], Lk, request.config, kernel.least_keys_apart)
