"""Intersection and union of masks."""

from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import and_, or_

import torch
from torch import Tensor

from mask_mods.checks import check_mask_mod, show
from mask_mods.positions import place
from mask_mods.spans import Index, MaskMod, SpanMask, larger, smaller


@dataclass(frozen=True, eq=False, repr=False)
class Composite:
    """What intersections and unions share: each part is placed and checked as if it stood alone."""

    masks: tuple[MaskMod, ...]

    def __post_init__(self):
        if not self.masks:
            raise ValueError("masks must hold at least one mask, got none")
        for mask in self.masks:
            if isinstance(mask, Tensor) or not callable(mask):
                raise TypeError(f"masks must be mask_mods, functions of (b, h, q_idx, kv_idx), got {show(mask)}")

    def placed(self, q_offset: Index) -> MaskMod:
        """The masks for queries that begin at position `q_offset`; plain functions among them stay as they are."""
        return type(self)(tuple([place(mask, q_offset) for mask in self.masks]))

    def check(self, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        for mask in self.masks:
            check_mask_mod(mask, B=B, Hq=Hq, Lq=Lq, Lk=Lk, device=device)

    def hiding(self) -> list:
        """The `keys` of the parts that hide some from all queries."""
        return [mask.keys for mask in self.masks if getattr(mask, "keys", None) is not None]


class AllOf(Composite):
    """`both` of masks with a plain function among them."""

    def __call__(self, b, h, q_idx, kv_idx):
        return reduce(and_, [mask(b, h, q_idx, kv_idx) for mask in self.masks])

    @property
    def keys(self):
        return self._keys if self.hiding() else None

    def _keys(self, b, h, kv_idx):
        return reduce(and_, [visible(b, h, kv_idx) for visible in self.hiding()])

    def __repr__(self) -> str:
        return f"both({', '.join(map(repr, self.masks))})"


class AnyOf(Composite):
    """`either` of masks with a plain function among them."""

    def __call__(self, b, h, q_idx, kv_idx):
        return reduce(or_, [mask(b, h, q_idx, kv_idx) for mask in self.masks])

    @property
    def keys(self):
        # One mask that hides no key from all is enough for the union to hide none.
        return self._keys if len(self.hiding()) == len(self.masks) else None

    def _keys(self, b, h, kv_idx):
        return reduce(or_, [visible(b, h, kv_idx) for visible in self.hiding()])

    def __repr__(self) -> str:
        return f"either({', '.join(map(repr, self.masks))})"


class AllSpans(AllOf, SpanMask):
    """`both` of SpanMasks: each choice of one span a mask, intersected."""

    __call__ = SpanMask.__call__

    @property
    def growing(self) -> bool:
        return all(mask.growing for mask in self.masks)

    def spans(self, b, h, q_idx):
        choices = list(product(*[mask.spans(b, h, q_idx) for mask in self.masks]))
        return tuple(
            (reduce(larger, [first for first, _ in choice]), reduce(smaller, [last for _, last in choice]))
            for choice in choices
        )


class AnySpans(AnyOf, SpanMask):
    """`either` of SpanMasks: all their spans."""

    __call__ = SpanMask.__call__

    def spans(self, b, h, q_idx):
        return tuple(span for mask in self.masks for span in mask.spans(b, h, q_idx))


def both(*masks: MaskMod) -> MaskMod:
    """Visible where every mask says so. A SpanMask if all are; else a function whose SpanMasks can still be placed."""
    return (AllSpans if all(isinstance(mask, SpanMask) for mask in masks) else AllOf)(masks)


def either(*masks: MaskMod) -> MaskMod:
    """Visible where at least one mask says so. A SpanMask if all are; else as `both`."""
    return (AnySpans if all(isinstance(mask, SpanMask) for mask in masks) else AnyOf)(masks)
