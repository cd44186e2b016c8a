"""Hand a Hugging Face model's prefill attention to a function of ours, through transformers' own registries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "rr_flex_demo"

Attend = Callable[..., Tensor]
"""(q [B,Hq,L,D], k, v [B,Hkv,L,D], layer=int, scale=float, window=int | None) -> out [B,Hq,L,D]; always causal."""


@contextmanager
def attention_by(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Within this context every attention layer of `model` calls `attend`: causal prefill, no padding, no cache."""
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, _attention_function(attend))
    AttentionMaskInterface.register(NAME, refuse_all_but_plain_prefill)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention_function(attend: Attend) -> Callable:
    def attention(module, q, k, v, attention_mask, *, scaling=None, sliding_window=None, **kwargs):
        given = {**kwargs, "attention_mask": attention_mask}
        unsupported = [name for name in ("softcap", "s_aux", "attention_mask") if given.get(name) is not None]
        if unsupported or not getattr(module, "is_causal", True):
            raise NotImplementedError(
                f"attention must be causal, with no mask, soft cap or sink logits of its own, got "
                f"{type(module).__name__} with {unsupported}, is_causal = {getattr(module, 'is_causal', True)}"
            )
        scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out = attend(q, k, v, layer=module.layer_idx, scale=scale, window=sliding_window)
        return out.transpose(1, 2).contiguous(), None

    return attention


def refuse_all_but_plain_prefill(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, **kwargs
) -> None:
    padded = attention_mask is not None and not bool(attention_mask.all())
    if padded or q_length != kv_length or kwargs.get("use_vmap"):
        raise NotImplementedError(
            f"the prompt must be one unpadded prefill without a cache, got {q_length} queries and {kv_length} keys, "
            f"padding: {padded}"
        )
