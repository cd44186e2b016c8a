"""What transformers' mask step hands to its attention step: the mask unbuilt, as spans or, if need be, as pairs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import causal_mask_function, sdpa_mask

from mask_mods import SpanMask, both
from rr_flex.models.hf_masks import FAR, causal_window, has_window, is_causal, spans_of, why_unread
from rr_flex.models.real_tokens import causal_run, real_run
from rr_flex.models.records import OWN_MASK, PADDING_BETWEEN


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
    def unread(self) -> str | None:
        """Why the mask can't be read, as a reason to stay dense; None where nothing speaks against it."""
        return why_unread(self.mask_function)

    @cached_property
    def causal(self) -> bool:
        return is_causal(self.mask_function)

    @cached_property
    def sliding(self) -> bool:
        return has_window(self.mask_function)

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
        window = causal_window(self.mask_function)
        if window == FAR and not self.padded:
            return None, None

        def on_device(x: int | Tensor) -> Tensor:
            return x.to(device) if isinstance(x, Tensor) else torch.full((), x, device=device)

        first, last, is_one_run = on_device(0), on_device(FAR), True
        if self.padded:
            first, last, is_one_run = real_run(self.attention_mask.to(device), self.kv_offset)
        if not bool(is_one_run):
            return None, PADDING_BETWEEN
        if window is not None:
            return causal_run(first, last, on_device(window), on_device(self.offset)), None
        mask = spans_of(self.mask_function, self.q_offset, self.kv_offset, device)
        if mask is None:
            return None, OWN_MASK
        if self.padded:
            mask = both(mask, causal_run(first, last, on_device(FAR), on_device(self.offset)))
        return mask, None

    def pairs(self, device: torch.device, *, may_be_none: bool) -> Tensor | None:
        """transformers' own mask for sdpa, bool [B, 1, Lq, Lk], or None where sdpa's is_causal means the same."""
        key = ("pairs", device, may_be_none)
        if key not in self._built:
            arguments = dict(self.arguments)
            if not may_be_none:
                arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            mask = sdpa_mask(
                q_length=self.q_length,
                kv_length=self.kv_length,
                q_offset=self.q_offset,
                kv_offset=self.kv_offset,
                mask_function=self.mask_function,
                attention_mask=self.attention_mask,
                **arguments,
            )
            self._built[key] = mask if mask is None else mask.to(device)
        return self._built[key]


OWN = ("q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask")


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
