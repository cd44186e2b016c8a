"""One prefill call of one attention layer, and the rules that keep it dense."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rr_flex.checks import DTYPES
from rr_flex.config import RRConfig
from rr_flex.geometry import ceil_div
from rr_flex.models import records
from rr_flex.models.layer_plan import Plan, layer_of
from rr_flex.models.prefill_mask import PrefillMask
from rr_flex.pipeline import is_short


@dataclass(frozen=True)
class LayerCall:
    """What transformers hands to an attention function: q [B,Hq,Lq,D], k [B,Hkv,Lk,D], v [B,Hkv,Lk,Dv]."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any  # PrefillMask, or what the model's user made
    options: dict[str, Any]  # scaling, softcap, s_aux, dropout, ... as the model passes them

    @property
    def layer(self) -> int:
        return layer_of(self.module)

    def number(self, name: str) -> float | None:
        """The option as a float; None where it is not given."""
        value = self.options.get(name)
        return None if value is None else float(value)


def heads_of(module: nn.Module, Hq: int) -> range | None:
    """Under tensor parallelism, global indices of this process's `Hq` query heads; None where it holds all.

    NotImplementedError where heads are sharded and no mesh says which these are.
    """
    heads = getattr(getattr(module, "config", None), "num_attention_heads", Hq)
    if Hq >= heads:
        return None
    mesh = getattr(module.q_proj.weight, "device_mesh", None) if hasattr(module, "q_proj") else None
    if mesh is None:
        raise NotImplementedError(
            f"sharded query heads must come with a device mesh at q_proj, got {Hq} of {heads} heads and no mesh"
        )
    first = mesh.get_local_rank() * Hq
    return range(first, first + Hq)


def why_dense(call: LayerCall, config: RRConfig | None, plan: Plan) -> str | None:
    """The first rule that keeps this call dense, or None. `config`: the layer's settings, None for dense."""
    said = call.options.get("is_causal")
    if not (getattr(call.module, "is_causal", True) if said is None else said):
        return records.NOT_CAUSAL
    if config is None:
        return records.DENSE_LAYER
    if not isinstance(call.mask, PrefillMask):
        return records.OWN_MASK
    return _by_mask(call, call.mask, plan) or _by_length(call, config) or _by_options(call)


def _by_mask(call: LayerCall, mask: PrefillMask, plan: Plan) -> str | None:
    if mask.reading.unread is not None:
        return mask.reading.unread
    if not mask.reading.causal:
        return records.NOT_CAUSAL
    if mask.kv_length != call.k.shape[2] or mask.q_length != call.q.shape[2]:
        return records.MASK_LENGTH
    return records.SLIDING if mask.reading.sliding and plan.sliding_layers == "dense" else None


def _by_length(call: LayerCall, config: RRConfig) -> str | None:
    if is_short(call.k, config.min_length):
        return records.SHORT
    rows = ceil_div(call.q.shape[2], config.block_sizes[0])
    return records.LAST_ROWS if rows <= config.dense_last_rows else None


def _by_options(call: LayerCall) -> str | None:
    q, k, v, sinks = call.q, call.k, call.v, call.options.get("s_aux")
    if call.options.get("dropout"):
        return records.DROPOUT
    if call.options.get("position_bias") is not None:
        return records.POSITION_BIAS
    if q.dtype not in DTYPES:
        return records.DTYPE
    if not all(16 <= x.shape[3] <= 256 for x in (q, v)):
        return records.HEAD_DIM
    differentiable = any(x is not None and x.requires_grad for x in (q, k, v, sinks))
    return records.GRADIENT if q.device.type == "cpu" and torch.is_grad_enabled() and differentiable else None
