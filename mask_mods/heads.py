"""A mask as a run of its heads sees it."""

from dataclasses import dataclass

import torch

from mask_mods.checks import check_count, check_integers, check_mask_mod
from mask_mods.positions import place
from mask_mods.spans import Index, MaskMod, SpanMask, called, per_batch


@dataclass(frozen=True, eq=False, repr=False)
class FromHead:
    """`from_head` of a plain function, or of masks with one among them."""

    mask_mod: MaskMod
    first: Index

    def __call__(self, b, h, q_idx, kv_idx):
        return self.mask_mod(b, h + per_batch(self.first, b), q_idx, kv_idx)

    @property
    def keys(self):
        return None if getattr(self.mask_mod, "keys", None) is None else self._keys

    def _keys(self, b, h, kv_idx):
        return self.mask_mod.keys(b, h + per_batch(self.first, b), kv_idx)

    def placed(self, q_offset: Index) -> MaskMod:
        return type(self)(place(self.mask_mod, q_offset), self.first)

    def check(self, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        heads = Hq + self.first if isinstance(self.first, int) else Hq
        check_mask_mod(self.mask_mod, B=B, Hq=heads, Lq=Lq, Lk=Lk, device=device)

    def __repr__(self) -> str:
        return called("from_head", self.mask_mod, self.first)


class SpansFromHead(FromHead, SpanMask):
    """`from_head` of a SpanMask."""

    __call__ = SpanMask.__call__

    def spans(self, b, h, q_idx):
        return self.mask_mod.spans(b, h + per_batch(self.first, b), q_idx)


def from_head(mask_mod: MaskMod, first: Index) -> MaskMod:
    """`mask_mod` where head 0 stands for head `first`: for a call that takes only some of the heads.

    A SpanMask if `mask_mod` is one. `first` is an int or a 0-dim integer tensor; a new tensor causes no recompile.
    """
    if isinstance(first, torch.Tensor):
        check_integers("first", first, (0,), "[]")
    else:
        check_count("first", first, 0)
    return (SpansFromHead if isinstance(mask_mod, SpanMask) else FromHead)(mask_mod, first)
