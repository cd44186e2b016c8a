"""The attention function that transformers calls under the name "rr_flex": which calls are sparse, by which rule."""

from typing import Any

import torch
from torch import Tensor, nn

from mask_mods.spans import SpanMask
from rr_flex.attention import rr_attention, shortest_sparse
from rr_flex.checks import DTYPES
from rr_flex.config import RRConfig
from rr_flex.geometry import ceil_div
from rr_flex.models import records
from rr_flex.models.own_attention import dense_attention
from rr_flex.models.plan import Plan, plan_of
from rr_flex.models.prefill_mask import PrefillMask
from rr_flex.models.shards import head_offset_of
from rr_flex.pipeline import is_short


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
        if not torch.compiler.is_compiling():
            plan_of(module).record(_layer(module)).dense[records.DECODE] += 1
        return dense_attention(module, q, k, v, attention_mask, **kwargs)
    return _prefill(module, q, k, v, attention_mask, **kwargs)


# In a caller's graph this is a break: rr_attention has its own graph, and what it did is counted.
@torch.compiler.disable
def _prefill(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    layer = _layer(module)
    plan = plan_of(module)
    record = plan.record(layer)
    config = plan.config(layer)
    reason = _why_dense(module, q, k, v, mask, config, plan, kwargs)
    mask_mod = None
    if reason is None:
        mask_mod, reason = mask.spans(q.device)
    if reason is not None:
        record.dense[reason] += 1
        return dense_attention(module, q, k, v, mask, **kwargs)
    out, density = _select_and_attend(module, q, k, v, mask, mask_mod, config, plan, kwargs)
    record.add_sparse(density)
    return out.transpose(1, 2).contiguous(), None


def _why_dense(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    config: RRConfig | None,
    plan: Plan,
    kwargs: dict[str, Any],
) -> str | None:
    """The first rule that keeps this call dense, or None."""
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return records.NOT_CAUSAL
    if config is None:
        return records.DENSE_LAYER
    if not isinstance(mask, PrefillMask):
        return records.OWN_MASK
    if not mask.causal:
        return records.NOT_CAUSAL
    if mask.kv_length != k.shape[2] or mask.q_length != q.shape[2]:
        return records.MASK_LENGTH
    plain_softmax = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    if is_short(k, shortest_sparse(q, config, plain_softmax=plain_softmax)):
        return records.SHORT
    if ceil_div(q.shape[2], config.block_sizes[0]) <= config.dense_last_rows:
        return records.LAST_ROWS
    if mask.sliding and plan.sliding_layers == "dense":
        return records.SLIDING
    if kwargs.get("dropout"):
        return records.DROPOUT
    if kwargs.get("position_bias") is not None:
        return records.POSITION_BIAS
    if q.dtype not in DTYPES:
        return records.DTYPE
    if not all(16 <= x.shape[3] <= 256 for x in (q, v)):
        return records.HEAD_DIM
    sinks = kwargs.get("s_aux")
    differentiable = (q, k, v) if sinks is None else (q, k, v, sinks)
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in differentiable):
        return records.GRADIENT
    return None


def _select_and_attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PrefillMask,
    mask_mod: SpanMask | None,
    config: RRConfig,
    plan: Plan,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(out [B,Hq,Lq,Dv], density, 0-dim)."""
    if q.device.type == "cpu":
        # A compiled graph holds for one order of strides, and caches, rotary embeddings and fused projections leave
        # several: a copy costs less than a compilation. A GPU's kernel compiles faster and its copies cost more.
        q, k, v = (x.contiguous() for x in (q, k, v))
    head_offset, config = head_offset_of(module, q.shape[1], config)
    scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    return rr_attention(
        q,
        k,
        v,
        config=config,
        mask_mod=mask_mod,
        scale=None if scaling is None else float(scaling),
        softcap=None if softcap is None else float(softcap),
        sinks=kwargs.get("s_aux"),
        q_offset=mask.offset,
        head_offset=head_offset,
        return_density=True,
        backend=plan.backend,
    )


def _layer(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    return -1 if layer is None else layer
