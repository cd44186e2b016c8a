"""One prefill call of one attention layer, and the rules that keep it dense."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rr_flex.checks import DTYPES
from rr_flex.config import RRConfig
from rr_flex.geometry import ceil_div
from rr_flex.models import records
from rr_flex.models.layer_plan import Plan
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

    @property
    def causal(self) -> bool:
        said = self.options.get("is_causal")
        return getattr(self.module, "is_causal", True) if said is None else said

    def number(self, name: str) -> float | None:
        """The option as a float; None where it is not given."""
        value = self.options.get(name)
        return None if value is None else float(value)

    def as_autocast_would(self) -> "LayerCall":
        """Under torch.autocast, q, k and v in its dtype: what it does to scaled_dot_product_attention's. Norms on q and
        k leave these in float32 beside a v in half precision."""
        kind = self.q.device.type
        if not torch.is_autocast_enabled(kind):
            return self
        dtype = torch.get_autocast_dtype(kind)
        # Autocast leaves double precision alone.
        parts = {name: x.to(dtype) for name in "qkv" if (x := getattr(self, name)).dtype != torch.float64}
        return replace(self, **parts)

    def without_autocast(self) -> AbstractContextManager:
        """For the selection, whose dtypes are its own."""
        kind = self.q.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def layer_of(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    return -1 if layer is None else layer


def why_dense(call: LayerCall, config: RRConfig | None, plan: Plan) -> str | None:
    """The first rule that keeps this call dense, or None. `config`: the layer's settings, None for dense."""
    if not call.causal:
        return records.NOT_CAUSAL
    if config is None:
        return records.DENSE_LAYER
    if not isinstance(call.mask, PrefillMask):
        return records.OWN_MASK
    return _by_mask(call, call.mask, plan) or _by_length(call, config) or _by_options(call)


def _by_mask(call: LayerCall, mask: PrefillMask, plan: Plan) -> str | None:
    if mask.unread is not None:
        return mask.unread
    if not mask.causal:
        return records.NOT_CAUSAL
    if mask.kv_length != call.k.shape[2] or mask.q_length != call.q.shape[2]:
        return records.MASK_LENGTH
    return records.SLIDING if mask.sliding and plan.sliding_layers == "dense" else None


def _by_length(call: LayerCall, config: RRConfig) -> str | None:
    if is_short(call.k, config.min_length):
        return records.SHORT
    rows = ceil_div(call.q.shape[2], config.block_sizes[0])
    return records.LAST_ROWS if rows <= config.dense_last_rows else None


def _by_options(call: LayerCall) -> str | None:
    q, k, v = call.q, call.k, call.v
    if call.options.get("dropout"):
        return records.DROPOUT
    if call.options.get("position_bias") is not None:
        return records.POSITION_BIAS
    if q.dtype not in DTYPES:
        return records.DTYPE
    if not all(16 <= x.shape[3] <= 256 for x in (q, v)):
        return records.HEAD_DIM
    sinks = call.options.get("s_aux")
    differentiable = (q, k, v) if sinks is None else (q, k, v, sinks)
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in differentiable):
        return records.GRADIENT
    return None
