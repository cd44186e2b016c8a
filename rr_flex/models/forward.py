"""The attention function that transformers calls under the name "rr_flex": sparse where no rule keeps it dense."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mask_mods.spans import SpanMask
from rr_flex.attention import Answer, Asked, answer
from rr_flex.checks import as_autocast_says
from rr_flex.models import records
from rr_flex.models.layer_call import LayerCall, heads_of, why_dense
from rr_flex.models.layer_plan import Plan, layer_of, plan_of
from rr_flex.models.prefill_mask import PrefillMask
from rr_flex.models.states import after_update, state_of
from rr_flex.runtime.tracing import traced


def rr_flex_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: q [B,Hq,Lq,D], k, v [B,Hkv,Lk,D] to (out [B,Lq,Hq,Dv], None).

    One query goes straight to dense attention. ValueError for output_attentions=True.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions must be False under attn_implementation='rr_flex', whose kernel stores no weights, "
            "got True; use attn_implementation='eager' for them"
        )
    if q.shape[2] == 1:
        # Not torch.compiler.is_compiling(), which is true while any other thread compiles.
        if not traced():
            plan_of(module).record(layer_of(module)).add_dense(records.DECODE)
            after_update(module, k)
        return dense_attention(module, q, k, v, attention_mask, **kwargs)
    return _prefill(module, q, k, v, attention_mask, kwargs)


# In a caller's graph this is a break: rr_attention has its own graph, and what it did is counted.
@torch.compiler.disable
def _prefill(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
) -> tuple[Tensor, None]:
    holder, plan = after_update(module, k), plan_of(module)
    call = LayerCall(module, q, k, v, mask, options)
    mask_mod, reason = None, why_dense(call, plan.config(call.layer), plan)
    if reason is None:
        mask_mod, reason = mask.spans(q.device)
    if reason is not None:
        plan.record(call.layer).add_dense(reason)
        return dense_attention(module, q, k, v, mask, **options)
    found = _select_and_attend(call, mask_mod, plan, holder)
    # While an exporter records there is no density yet. (A program that it makes dense is counted above, with why.)
    if not traced():
        record = plan.record(call.layer)
        if found.decision.sparse:
            record.add_sparse(found.density, (q.shape[0], q.shape[2], k.shape[2]))
        else:
            record.add_dense(records.FASTER, found.decision.reason)
    if found.out is None:
        return dense_attention(call.module, call.q, call.k, call.v, call.mask, **call.options)
    return found.out.transpose(1, 2).contiguous(), None


def _select_and_attend(call: LayerCall, mask_mod: SpanMask | None, plan: Plan, holder: DynamicLayer | None) -> Answer:
    """Sparse, or dense where that is faster."""
    q, k, v = call.q, call.k, call.v
    if q.device.type == "cpu":
        # A compiled graph holds for one order of strides, and caches, rotary embeddings and fused projections leave
        # several: a copy costs less than a compilation. A GPU's kernel compiles faster and its copies cost more.
        q, k, v = (x.contiguous() for x in (q, k, v))
    heads = heads_of(call.module, q.shape[1])
    config = plan.of_heads(call.layer, heads, k.shape[2])
    sinks, state = call.options.get("s_aux"), state_of(holder, call, config)
    # Norms on q and k leave these in float32 beside a v in half precision.
    return as_autocast_says(answer)(
        q,
        k,
        v,
        Asked(config, sinks, state, ("density",), plan.backend, own_dense=True),
        mask_mod=mask_mod,
        # transformers' mask is the whole of it; a plain causal one is None.
        causal=mask_mod is None,
        scale=call.number("scaling"),
        softcap=call.number("softcap"),
        q_offset=call.mask.offset,
        head_offset=0 if heads is None else heads.start,
    )


def dense_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: PrefillMask | Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """sdpa, or the model's own eager attention where sdpa can't (softcap, attention sinks): (out [B,Lq,Hq,Dv], None).

    NotImplementedError where the model has no eager attention.
    """
    plain_softmax = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    pairs = mask.pairs(q.device, may_be_none=plain_softmax) if isinstance(mask, PrefillMask) else mask
    if plain_softmax:
        return sdpa_attention_forward(module, q, k, v, pairs, **kwargs)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"attention with softcap or sinks must have an eager form beside it, got {type(module).__name__}"
        )
    if pairs is not None:
        pairs = pairs[..., : k.shape[2]]
        pairs = torch.where(pairs, 0.0, torch.finfo(q.dtype).min).to(q.dtype) if pairs.dtype == torch.bool else pairs
    return eager(module, q, k, v, pairs, **kwargs)[0], None
