"""What one call asks for, settled once: the record that every step takes beside its tensors."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods import bidirectional, both, check_mask_mod, from_head, place
from mask_mods import causal as causal_mask
from mask_mods.spans import Index, MaskMod
from rr_flex.checks import FARTHEST, check_flag, check_numbers, check_offset
from rr_flex.config import RRConfig
from rr_flex.level import level_per_head
from rr_flex.runtime.fence import fence
from rr_flex.runtime.head_slices import head_slices
from rr_flex.runtime.mends import mend_torch
from rr_flex.runtime.tracing import traced


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One call, checked. Ints and strings in it are compiled in; tensors are not, so new values compile nothing."""

    config: RRConfig
    own_mask: MaskMod | None  # the caller's
    causal: bool  # whether the causal mask holds, beside the caller's
    level: Float[Tensor, " Hq"]  # the budget's number
    q_offset: Index  # position of query 0 among the keys
    head_offset: Index  # global index of head 0
    scale: float  # of the logits
    softcap: Tensor | float | None = None  # c of c·tanh(logit / c)
    sinks: Float[Tensor, " Hq"] | None = None  # logits beside the others
    # How mass is found. "none": attention is dense, every visible block is kept; "plain": without a kernel of its own,
    # for where nothing is compiled.
    estimate: Literal["by kernel", "plain", "none"] = "by kernel"
    pooled_keys: Float[Tensor, "B Hkv nk E"] | None = None  # of a PrefillState; None: pooled here
    mass: Float[Tensor, "B Hq nQ nK"] | None = None  # where it is estimated ahead of the graph
    returns: tuple[str, ...] = ()  # beside the output: "lse", "density"
    backward: bool = False
    whole_tiles: bool = False  # both lengths are multiples of 128, said to Triton's kernel
    # (last query, number of keys) where Triton's kernel must be given them, see kernels/choose.py
    ends: tuple[Tensor, Tensor] | None = None
    rows_apart: int = 0  # block rows at the end that attend by themselves, see kernels/last_rows.py

    @property
    def mask_mod(self) -> MaskMod:
        """The one mask that holds."""
        return self.mask_at(self.q_offset)

    def mask_at(self, q_offset: Index) -> MaskMod:
        """The same where query 0 stands at another position, or at the same said in another shape ([B])."""
        own = self.own_mask
        if own is None:
            return causal_mask(q_offset) if self.causal else bidirectional()
        own = place(own, q_offset)
        return both(causal_mask(q_offset), own) if self.causal else own

    def placed_at(self, q_offset: int) -> "Request":
        """The request where query 0 stands at this position."""
        return replace(self, q_offset=_ints_as_tensors(self.level.device)(q_offset))

    @property
    def dense(self) -> bool:
        return self.estimate == "none"

    @property
    def plain_softmax(self) -> bool:
        """Whether logits are neither capped nor beside sinks."""
        return self.softcap is None and self.sinks is None

    def of_heads(self, heads: slice) -> "Request":
        """The request of a slice of the query heads; pooled keys are left to the caller."""
        own = self.own_mask
        if own is not None:
            own = from_head(own, torch.full((), heads.start, dtype=torch.int64, device=self.level.device))
        sinks = None if self.sinks is None else self.sinks[heads]
        head_offset = self.head_offset + heads.start
        return replace(self, own_mask=own, level=self.level[heads], head_offset=head_offset, sinks=sinks)


def make_request(q: Tensor, k: Tensor, config: RRConfig, options: dict[str, Any]) -> Request:
    """The request of a public call on q and k that are checked; `options` are its other arguments by name.

    ValueError or TypeError naming the argument.
    """
    if traced():
        mend_torch()  # a caller's graph may be the first of the process
    known = dict(mask_mod=None, causal=True, scale=None, softcap=None, q_offset=None, head_offset=0) | options
    mask_mod, causal = known["mask_mod"], known["causal"]
    check_flag("causal", causal)
    check_numbers(known["scale"], known["softcap"])
    Lq, Lk = q.shape[2], k.shape[2]
    q_offset = Lk - Lq if known["q_offset"] is None else known["q_offset"]
    check_offset("q_offset", q_offset, min(0, Lk - Lq), Lk)
    check_offset("head_offset", known["head_offset"], 0, FARTHEST)
    check_mask(mask_mod, q, k)
    on_device = _ints_as_tensors(q.device)
    return Request(
        config=config,
        own_mask=mask_mod,
        causal=causal,
        level=level_per_head(config, q.shape[1], q.device),
        q_offset=on_device(q_offset),
        head_offset=on_device(known["head_offset"]),
        scale=q.shape[3] ** -0.5 if known["scale"] is None else float(known["scale"]),
        softcap=_number_on(known["softcap"], q.device),
    )


def check_mask(mask_mod: MaskMod | None, q: Tensor, k: Tensor) -> None:
    """The one place where a mask is held against a call: TypeError or ValueError naming what is wrong with it.

    On an accelerator once for each mask and sizes, since there only shapes are looked at.
    """
    if mask_mod is None:
        return
    (B, Hq, Lq, _), Lk = q.shape, k.shape[2]
    sizes = (B, Hq, Lq, Lk, q.device)
    seen = None
    if q.device.type != "cpu" and callable(mask_mod) and not traced():
        seen = _checked.setdefault(mask_mod, set()) if _can_be_kept(mask_mod) else None
    if seen is not None and sizes in seen:
        return
    check_mask_mod(mask_mod, B=B, Hq=Hq, Lq=Lq, Lk=Lk, device=q.device)
    if seen is not None:
        seen.add(sizes)


_checked: WeakKeyDictionary[MaskMod, set[tuple]] = WeakKeyDictionary()


def _can_be_kept(mask_mod: MaskMod) -> bool:
    return hasattr(mask_mod, "__weakref__") and type(mask_mod).__hash__ is not None


def _number_on(number: float | None, device: torch.device) -> Tensor | float | None:
    """As a 0-dim tensor: a new value compiles nothing anew."""
    return None if number is None else _computed(torch.full((), number, dtype=torch.float32, device=device))


def _computed(x: Tensor) -> Tensor:
    """x, which in a caller's graph on a CPU is fenced: the kernel there can't capture a constant of the graph."""
    return fence(x) if x.device.type == "cpu" and traced() else x


def _ints_as_tensors(device: torch.device):
    def on_device(x: Index) -> Index:
        if isinstance(x, Tensor):
            return x.to(device)
        return _computed(torch.full((), x, dtype=torch.int64, device=device))

    return on_device


def in_head_slices(request: Request, q: Tensor, *keys: Tensor) -> Iterator[tuple[slice, Request, tuple[Tensor, ...]]]:
    """For each of `head_slices` the slice of query heads, its request, and its q and `keys`."""
    B, Hq, Lq = q.shape[:3]
    Hkv, Lk = keys[0].shape[1:3]
    slices = head_slices((B, Hq, Hkv), (Lq, Lk), request.config, q.device)
    if len(slices) == 1:
        yield slice(None), request, (q, *keys)
        return
    for heads, key_heads in slices:
        own = request.of_heads(heads)
        if request.pooled_keys is not None:
            own = replace(own, pooled_keys=request.pooled_keys[:, key_heads])
        yield heads, own, (q[:, heads], *(x[:, key_heads] for x in keys))
