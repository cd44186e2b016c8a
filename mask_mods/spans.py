"""The one idea behind every mask here: for each query, the visible keys are a union of a few intervals."""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from operator import or_
from types import FunctionType

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mask_mods.checks import ask, check_arity, check_device, check_elementwise, recorded, show

Index = Int[Tensor, "..."] | int
Span = tuple[Index, Index]  # first and last visible key, both inclusive; first > last is empty
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class SpanMask:
    """A FlexAttention `mask_mod` that also knows its spans: key j is visible where first ≤ j ≤ last for one of them.

    The spans alone decide. `keys` only summarises them for whoever pools or counts keys: it is False for keys that
    no query may see (padding).
    The query heads that share a key head should agree on it: pooled keys are one and the same for all of them.
    Built from functions, or a subclass that defines `spans` (and `keys`) as methods. `q_idx` is the query's index, as
    everywhere in FlexAttention; a mask over positions is a PositionMask.
    """

    keys: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # of b, h, kv_idx; None: no key is hidden from all
    # Whether there is one span, whose first key is the same for all queries and whose last never moves back from a
    # query to the next: then the ends of a block row say what the row sees.
    growing: bool = False

    def __init__(
        self,
        spans: Callable[[Tensor, Tensor, Tensor], tuple[Span, ...]],  # of b, h, q_idx; one or more, broadcast to these
        keys: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        label: Callable[[], str] | None = None,  # called by repr only, so that building a mask reads no tensor
    ):
        for name, function in (("spans", spans), ("keys", keys), ("label", label)):
            if not callable(function) and (function is not None or name == "spans"):
                raise TypeError(f"{name} must be a function, got {show(function)}")
        self.spans, self.keys, self.label = spans, keys, label

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Bool[Tensor, "..."]:
        inside = [(kv_idx >= first) & (kv_idx <= last) for first, last in self.spans(b, h, q_idx)]
        return reduce(or_, inside)

    def placed(self, q_offset: Index) -> "SpanMask":
        """The mask for queries that begin at position `q_offset`: itself, whose spans are of the queries' indices."""
        return self

    def check(self, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        """ValueError or TypeError where the mask does not fit a call of these sizes on `device`: see checks.py."""
        if recorded():
            return
        check_arity("spans", self.spans, ("b", "h", "q_idx"))
        ask(self.spans, (B, Hq, Lq), device, lambda spans: _check_spans(spans, device))
        if "spans" in self.__dict__:  # a function of the user's
            check_elementwise("spans", self, (B, Hq, Lq, Lk), device)
        if self.keys is not None:
            check_arity("keys", self.keys, ("b", "h", "kv_idx"))

    def __repr__(self) -> str:
        label = self.__dict__.get("label")
        return f"{type(self).__name__}()" if label is None else label()

    def __copy__(self) -> "SpanMask":
        return self  # nothing changes a mask

    def __deepcopy__(self, memo: dict) -> "SpanMask":
        copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: int):
        for name in ("spans", "keys", "label"):
            function = self.__dict__.get(name)
            if isinstance(function, FunctionType) and "<" in function.__qualname__:
                raise TypeError(
                    f"{name} must be a function of a module's top level to be pickled, got {function.__qualname__}; a"
                    " subclass of SpanMask or PositionMask, whose spans is a method, can be too"
                )
        return super().__reduce_ex__(protocol)


def _check_spans(spans: object, device: torch.device | str) -> None:
    rule = "spans must return one or more (first, last) of ints or integer tensors"
    if not isinstance(spans, tuple | list) or not spans:
        raise TypeError(f"{rule}, got {show(spans)}")
    for span in spans:
        if not isinstance(span, tuple | list) or len(span) != 2:
            raise TypeError(f"{rule}, got {show(span)} for one")
        for bound in span:
            whole = isinstance(bound, int | torch.SymInt) and not isinstance(bound, bool)
            if isinstance(bound, Tensor):
                whole = not (bound.is_floating_point() or bound.is_complex() or bound.dtype == torch.bool)
                check_device("spans", bound, device)
                if bound.ndim:
                    raise ValueError(f"{rule} of the indices' shape, got {show(bound)} for 0-dim indices")
            if not whole:
                raise TypeError(f"{rule}, got {show(bound)}")


def per_batch(value: Index, b: Tensor) -> Index:
    """The value of batch b: an int or 0-dim tensor holds for all, and so does a single-element one."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value[0] if value.shape[0] == 1 else value[b]


def per_sequence(mask_mod: MaskMod, B: int) -> MaskMod:
    """`mask_mod` with each single number that it captures held once a sequence, as [max(B, 2)].

    FLASH's template (torch 2.11) loads no element whose place is known when it compiles ("Expected TensorSSA"). What a
    plain function captures stays as it is.
    """
    if not is_dataclass(mask_mod):
        return mask_mod

    def spread(value: object) -> object:
        if isinstance(value, Tensor) and value.ndim < 2 and value.numel() == 1:
            return value.expand(max(B, 2)).contiguous()
        if isinstance(value, tuple):
            return tuple(map(spread, value))
        return per_sequence(value, B) if callable(value) else value

    return replace(mask_mod, **{each.name: spread(getattr(mask_mod, each.name)) for each in fields(mask_mod)})


def buffered(x: Tensor) -> Tensor:
    """x itself, as something that a mask may capture when it is built inside a compiled graph.

    The CPU kernel (torch 2.13) raises NoValidChoicesError for a captured tensor that is an expression not yet computed;
    fixing its strides makes the compiler compute it first. A constant is folded all the same: capture an int instead.
    """
    return x.as_strided(x.shape, x.stride())


def larger(x: Index, y: Index) -> Index:
    """max(x, y) of ints and tensors in any mixture, in operations that every mask kernel knows (FLASH: no maximum)."""
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        x, y = _tensors(x, y)
        return torch.where(x > y, x, y)
    return max(x, y)


def smaller(x: Index, y: Index) -> Index:
    """min(x, y), as `larger`."""
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        x, y = _tensors(x, y)
        return torch.where(x < y, x, y)
    return min(x, y)


def _tensors(x: Index, y: Index) -> tuple[Tensor, Tensor]:
    """Both as tensors that come of an index: what is chosen between may be no constant (FLASH, torch 2.11)."""
    return (x if isinstance(x, Tensor) else y * 0 + x), (y if isinstance(y, Tensor) else x * 0 + y)


def only_where(shown: Tensor, first: Index, last: Tensor) -> Span:
    """The span from `first`, which is at least 0, to `last` where it is `shown`, and no key elsewhere."""
    return first, torch.where(shown, last, last * 0 - 1)


def called(name: str, *values: object, **named: object) -> str:
    """The call that makes a mask, for its repr; arguments of None are left out."""
    shown = [*map(show, values), *(f"{key}={show(value)}" for key, value in named.items() if value is not None)]
    return f"{name}({', '.join(shown)})"
