"""The attention function that transformers calls under the name "rr_flex": sparse where no rule keeps it dense."""

from typing import Any

import torch
from torch import Tensor, nn

from mask_mods.spans import SpanMask
from rr_flex.attention import Answer, Asked, answer
from rr_flex.models import records
from rr_flex.models.head_shards import heads_of
from rr_flex.models.layer_call import LayerCall, layer_of, why_dense
from rr_flex.models.layer_plan import Plan, plan_of
from rr_flex.models.own_attention import dense_attention
from rr_flex.models.states import Place, after_update, state_of
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
    call, place = LayerCall(module, q, k, v, mask, options), after_update(module, k)
    plan = plan_of(module)
    call = call.as_autocast_would()
    reason = why_dense(call, plan.config(call.layer), plan)
    mask_mod = None
    if reason is None:
        mask_mod, reason = call.mask.spans(call.q.device)
    if reason is not None:
        plan.record(call.layer).add_dense(reason)
        return dense_attention(call.module, call.q, call.k, call.v, call.mask, **call.options)
    with call.without_autocast():
        found = _select_and_attend(call, mask_mod, plan, place)
    # While an exporter records there is no density yet. (A program that it makes dense is counted above, with why.)
    if not traced():
        record = plan.record(call.layer)
        if found.decision.sparse:
            record.add_sparse(found.density)
        else:
            record.add_dense(records.FASTER, found.decision.reason)
    return found.out.transpose(1, 2).contiguous(), None


def _select_and_attend(call: LayerCall, mask_mod: SpanMask | None, plan: Plan, place: Place | None) -> Answer:
    """Sparse, or dense where that is faster."""
    q, k, v = call.q, call.k, call.v
    if q.device.type == "cpu":
        # A compiled graph holds for one order of strides, and caches, rotary embeddings and fused projections leave
        # several: a copy costs less than a compilation. A GPU's kernel compiles faster and its copies cost more.
        q, k, v = (x.contiguous() for x in (q, k, v))
    heads = heads_of(call.module, q.shape[1])
    config = plan.of_heads(call.layer, heads)
    sinks, state = call.options.get("s_aux"), state_of(place, call, config)
    return answer(
        q,
        k,
        v,
        Asked(config, sinks, state, ("density",), plan.backend),
        mask_mod=mask_mod,
        # transformers' mask is the whole of it; a plain causal one is None.
        causal=mask_mod is None,
        scale=call.number("scaling"),
        softcap=call.number("softcap"),
        q_offset=call.mask.offset,
        head_offset=0 if heads is None else heads.start,
    )
