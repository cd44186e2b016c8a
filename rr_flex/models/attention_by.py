"""Hand a Hugging Face model's prefill attention to a function of ours, through transformers' own registries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rr_flex.models.switches import SWITCHES, switch_off, switch_on

NAME = "rr_flex_demo"

Attend = Callable[..., Tensor]
"""(q [B,Hq,L,D], k, v [B,Hkv,L,D], layer=int, scale=float, window=int | None) -> out [B,Hq,L,D]; always causal."""


@contextmanager
def attention_by(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Within this context every attention layer of `model` calls `attend`: causal prefill, no padding, no cache.

    Each thread calls its own function, the one that it entered last. A thread that entered none meanwhile gets a
    RuntimeError from the model.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, refuse_all_but_plain_prefill)
    handed = _Handed(model, attend)
    switch_on(model, handed)
    try:
        yield
    finally:
        switch_off(model, handed)


@dataclass(eq=False)
class _Handed:
    """A model's attention, handed to a function by one thread."""

    model: PreTrainedModel
    attend: Attend
    thread: int = field(default_factory=get_ident)

    def apply(self) -> None:
        self.model.set_attn_implementation(NAME)


def _attention(module, q, k, v, attention_mask, **kwargs) -> tuple[Tensor, None]:
    """The one function that is registered; it finds the model's own by the module."""
    given = {**kwargs, "attention_mask": attention_mask}
    unsupported = [name for name in ("softcap", "s_aux", "attention_mask") if given.get(name) is not None]
    if unsupported or not getattr(module, "is_causal", True):
        raise NotImplementedError(
            f"attention must be causal, with no mask, soft cap or sink logits of its own, got "
            f"{type(module).__name__} with {unsupported}, is_causal = {getattr(module, 'is_causal', True)}"
        )
    scaling = kwargs.get("scaling")
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    attend = _function_of(module)
    out = attend(q, k, v, layer=module.layer_idx, scale=scale, window=kwargs.get("sliding_window"))
    return out.transpose(1, 2).contiguous(), None


def _function_of(module: nn.Module) -> Attend:
    # A copy, since other threads may come and go.
    switches = list(getattr(module, SWITCHES, ()))
    own = [handed for handed in switches if isinstance(handed, _Handed) and handed.thread == get_ident()]
    if not own:
        raise RuntimeError(
            "attention_by must be entered by the thread that calls the model, got a call from another thread or of a "
            f"copy of the model ({type(module).__name__})"
        )
    return own[-1].attend


def refuse_all_but_plain_prefill(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs
) -> None:
    """The mask function that is registered beside it. None: the attention function knows the mask."""
    padded = attention_mask is not None and not bool(attention_mask.all())
    if padded or q_length != kv_length or kwargs.get("use_vmap"):
        raise NotImplementedError(
            f"the prompt must be one unpadded prefill without a cache, got {q_length} queries and {kv_length} keys, "
            f"padding: {padded}"
        )
