"""What transformers' mask step hands to its attention step: the mask unbuilt, as spans or, if need be, as pairs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import causal_mask_function, sdpa_mask

from mask_mods import SpanMask, both
from mask_mods.spans import per_batch
from rr_flex.models.hf_masks import FAR, Place, Reading, read
from rr_flex.models.records import PADDING_BETWEEN


@dataclass(eq=False, repr=False)
class PrefillMask(BlockMask):
    """One forward's mask, shared by the layers of its kind. Positions come from the cache, never from shapes.

    A BlockMask by name only: transformers passes on ready-made masks of that type with four axes, which generate()
    makes ahead of the forward for static caches.
    """

    q_length: int
    kv_length: int
    q_offset: int | Tensor = 0
    kv_offset: int = 0
    mask_function: Callable = causal_mask_function
    attention_mask: Tensor | None = None  # [B, total] bool over positions
    arguments: dict[str, Any] = field(default_factory=dict)  # the rest of what transformers passed
    _built: dict[Any, Any] = field(default_factory=dict)

    def to(self, device: torch.device, non_blocking: bool = False) -> "PrefillMask":
        """Itself: what is built goes to the device of the layer that asks (accelerate's hooks move the arguments)."""
        return self

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.arguments["batch_size"], 1, self.q_length, self.kv_length

    def __repr__(self) -> str:
        return f"PrefillMask({self.q_length} × {self.kv_length}, {self.mask_function.__qualname__})"

    __str__ = __repr__

    @property
    def offset(self) -> int | Tensor:
        """Index of the key at query 0's position."""
        return self.q_offset - self.kv_offset

    @cached_property
    def reading(self) -> Reading:
        return read(self.mask_function)

    @cached_property
    def padded(self) -> bool:
        """Whether any token is padding. Reads the mask once a forward, as transformers' own masks do."""
        return self.attention_mask is not None and not bool(self.attention_mask.all())

    def spans(self, device: torch.device) -> tuple[SpanMask | None, str | None]:
        """(the mask, None), or (None, why it has no closed form). A plain causal mask is (None, None)."""
        key = ("spans", device)
        if key not in self._built:
            self._built[key] = self._spans(device)
        return self._built[key]

    def _spans(self, device: torch.device) -> tuple[SpanMask | None, str | None]:
        window = self.reading.causal_window
        if self.reading.unread or (window == FAR and not self.padded):
            return None, self.reading.unread

        def on_device(x: int | Tensor) -> Tensor:
            return x.to(device) if isinstance(x, Tensor) else torch.full((), x, device=device)

        first, last, is_one_run = on_device(0), on_device(FAR), True
        if self.padded:
            first, last, is_one_run = real_run(self.attention_mask.to(device), self.kv_offset)
        if not bool(is_one_run):
            return None, PADDING_BETWEEN
        offset = on_device(self.offset)
        if window is not None:
            return causal_run(first, last, on_device(window), offset), None
        mask = self.reading.spans(Place(offset, self.kv_offset, device))
        return both(mask, causal_run(first, last, on_device(FAR), offset)) if self.padded else mask, None

    def pairs(self, device: torch.device, *, may_be_none: bool) -> Tensor | None:
        """transformers' own mask for sdpa, bool [B, 1, Lq, Lk], or None where sdpa's is_causal means the same."""
        key = ("pairs", device, may_be_none)
        if key not in self._built:
            arguments = {name: getattr(self, name) for name in OWN} | self.arguments
            if not may_be_none:
                arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            mask = sdpa_mask(**arguments)
            self._built[key] = mask if mask is None else mask.to(device)
        return self._built[key]


OWN = ("q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask")


def real_run(padding_mask: Bool[Tensor, "B total"], kv_offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """First and last real key [B] of a mask over positions, and whether all between are real (0-dim)."""
    total = padding_mask.shape[1]
    first = padding_mask.int().argmax(1)
    last = total - 1 - padding_mask.flip(1).int().argmax(1)
    return first - kv_offset, last - kv_offset, (padding_mask.sum(1) == last - first + 1).all()


def causal_run(first: Int[Tensor, " b"], last: Int[Tensor, " b"], window: Tensor, offset: Tensor) -> SpanMask:
    """Causal within `window` tokens among the real tokens first[b] … last[b]; a padded query sees nothing.

    Tensors only, 0-dim or [B]: other windows, paddings and offsets run the same compiled graph.
    """

    def spans(b, h, q_idx):
        start, stop, position = per_batch(first, b), per_batch(last, b), q_idx + offset
        low = torch.maximum(position - (window - 1), start)
        return ((low, torch.where((start <= position) & (position <= stop), position, -1)),)

    def keys(b, h, kv_idx):
        return (per_batch(first, b) <= kv_idx) & (kv_idx <= per_batch(last, b))

    return SpanMask(spans, keys, label=lambda: "causal_run()")


def prefill_mask(*, q_length: int, **arguments: Any) -> PrefillMask | Tensor | None:
    """The mask function registered with transformers: a PrefillMask, and for one query what sdpa gets.

    The arguments are those of transformers.masking_utils.sdpa_mask, which are passed by name.
    """
    if q_length == 1:
        return sdpa_mask(q_length=q_length, **arguments)
    return _delayed(q_length, arguments)


@torch.compiler.disable
def _delayed(q_length: int, arguments: dict[str, Any]) -> PrefillMask:
    own = {name: arguments[name] for name in OWN if name in arguments}
    rest = {name: value for name, value in arguments.items() if name not in OWN}
    # A static cache's length is a tensor (of older transformers a [1]) that the first layer's update moves on: keep
    # today's value.
    if isinstance(own.get("q_offset"), Tensor):
        own["q_offset"] = own["q_offset"].reshape(()).clone()
    return PrefillMask(q_length, arguments=rest, **own)
