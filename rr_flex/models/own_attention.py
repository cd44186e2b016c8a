"""The dense attention that a layer keeps where rr_flex does not select: transformers' own."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rr_flex.models.prefill_mask import PrefillMask


def dense_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: PrefillMask | Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """sdpa, or the model's own eager attention where sdpa can't (softcap, attention sinks): (out [B,Lq,Hq,Dv], None).

    NotImplementedError where the model has no eager attention.
    """
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        pairs = mask.pairs(q.device, may_be_none=True) if isinstance(mask, PrefillMask) else mask
        return sdpa_attention_forward(module, q, k, v, pairs, **kwargs)
    pairs = mask.pairs(q.device, may_be_none=False) if isinstance(mask, PrefillMask) else mask
    if pairs is not None and pairs.dtype == torch.bool:
        pairs = torch.where(pairs, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    if pairs is not None:
        pairs = pairs[..., : k.shape[2]]
    return _eager_of(module)(module, q, k, v, pairs, **kwargs)[0], None


def _eager_of(module: nn.Module) -> Callable:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"attention with softcap or sinks must have an eager form beside it, got {type(module).__name__}"
        )
    return eager
