"""The one idea behind every mask here: for each query, the visible keys are a union of a few intervals."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Index = Int[Tensor, "..."] | int
Span = tuple[Index, Index]  # first and last visible key, both inclusive; first > last is empty
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class SpanMask:
    """A FlexAttention `mask_mod` that also knows its spans: key j is visible where first ≤ j ≤ last for one of them.

    The spans alone decide. `keys` only summarises them for whoever pools or counts keys: it is False for keys that
    no query may see (padding).
    The query heads that share a key head should agree on it: pooled keys are one and the same for all of them.
    """

    spans: Callable[[Tensor, Tensor, Tensor], tuple[Span, ...]]  # of b, h, q_idx; one or more, broadcast against these
    keys: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # of b, h, kv_idx; None: no key is hidden from all
    label: Callable[[], str] = lambda: "SpanMask()"  # called by repr only, so that building a mask reads no tensor

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Bool[Tensor, "..."]:
        inside = [(kv_idx >= first) & (kv_idx <= last) for first, last in self.spans(b, h, q_idx)]
        return reduce(or_, inside)

    def __repr__(self) -> str:
        return self.label()


def per_batch(value: Index, b: Tensor) -> Index:
    """The value of batch b: an int or 0-dim tensor holds for all, and so does a single-element one."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value[0] if value.shape[0] == 1 else value[b]


def buffered(x: Tensor) -> Tensor:
    """x itself, as something that a mask may capture when it is built inside a compiled graph.

    The CPU kernel (torch 2.13) raises NoValidChoicesError for a captured tensor that is an expression not yet computed;
    fixing its strides makes the compiler compute it first. A constant is folded all the same: capture an int instead.
    """
    return x.as_strided(x.shape, x.stride())


def larger(x: Index, y: Index) -> Index:
    """max(x, y) of ints and tensors in any mixture, in operations that every mask kernel knows (FLASH: no maximum)."""
    tensors = isinstance(x, Tensor) or isinstance(y, Tensor)
    return torch.where(x > y, x, y) if tensors else max(x, y)


def smaller(x: Index, y: Index) -> Index:
    """min(x, y), as `larger`."""
    tensors = isinstance(x, Tensor) or isinstance(y, Tensor)
    return torch.where(x < y, x, y) if tensors else min(x, y)


def check_count(name: str, value: int, minimum: int) -> None:
    """Raise unless `value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_integers(name: str, value: Tensor, dims: tuple[int, ...], shape: str) -> None:
    """Raise unless `value` is an integer tensor of one of the given numbers of dims; its values are never read."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape {shape}, got {value!r}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor of shape {shape}, got dtype {value.dtype}")
    if value.ndim not in dims:
        raise ValueError(f"{name} must be an integer tensor of shape {shape}, got shape {list(value.shape)}")


def check_per_batch(name: str, value: Index) -> None:
    """Raise unless `value` is an int, or an integer tensor of shape [] or [B]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Tensor)):
        raise TypeError(f"{name} must be an int or an integer tensor of shape [] or [B], got {value!r}")
    if isinstance(value, Tensor):
        check_integers(name, value, (0, 1), "[] or [B]")


def show(value: object) -> str:
    """repr, but a tensor by dtype and shape: printing a mask must not wait for a GPU."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)
