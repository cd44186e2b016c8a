"""A Hugging Face model's long prompt on several ranks: each computes its own tokens, attention brings them together.

Everything but attention works on single tokens, so a rank's layers run on its part of the prompt as they are.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from mask_mods import sliding_window
from rr_flex.config import RRConfig
from rr_flex.distributed.context import context_parallel
from rr_flex.distributed.shards import HEADS, SEQUENCE, Shards, answering
from rr_flex.distributed.transfer import gather_tokens
from rr_flex.models.hf_masks import FAR, read
from rr_flex.models.layer_plan import plan_of

NAME = "rr_flex_context_parallel"


@dataclass(frozen=True, eq=False)
class Window:
    """What transformers' mask step hands to its attention step: the shards, and a causal window of so many keys."""

    shards: Shards
    keys: int


@dataclass
class Prefilled:
    """What every rank has after the prompt: what one process would."""

    logits: Tensor  # [B, 1, vocabulary], of the prompt's last token
    cache: DynamicCache  # of all tokens in their order, on every rank: what decoding reads


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: Int[Tensor, "B L"], shards: Shards) -> Prefilled:
    """The forward over a prompt that all ranks have whole, each rank computing the tokens of `shards.layout`.

    Blocks are selected by the settings of `rr_flex.models.enable(model, ...)`; without it by the defaults. Afterwards
    every rank has the whole cache, which must fit one card, and decodes by itself as one process does:
    `model.generate(ids_and_next, past_key_values=out.cache)`. Causal and sliding-window layers;
    NotImplementedError on every rank for other masks, sinks, and models sharded by heads. Prompts of a batch have one
    length.
    """
    if shards.layout is None or shards.ranks(HEADS) > 1:
        raise NotImplementedError(f"shards must be of {SEQUENCE!r} alone for a model's prompt, got {shards.mesh}")
    if input_ids.shape[1] != shards.layout.tokens:
        raise ValueError(f"input_ids must have the layout's {shards.layout.tokens} tokens, got {input_ids.shape[1]}")
    layout, me = shards.layout, shards.place
    # Without the model's config: its sliding layers would keep the rank's last tokens, not the prompt's.
    cache = DynamicCache()
    with _attending_across(model, shards):
        out = model(
            layout.take(input_ids, me, dim=1),
            position_ids=layout.positions(me, input_ids.device)[None].expand(input_ids.shape[0], -1),
            **{cache_name(model): cache},
            use_cache=True,
            logits_to_keep=1,
        )
    logits = out.logits.contiguous()
    with answering():
        group = shards.group(SEQUENCE)
        dist.broadcast(logits, dist.get_global_rank(group, layout.pieces[-1].owner), group=group)
    return Prefilled(logits, gather_cache(cache, shards))


def cache_name(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache: the argument's name changed within transformers 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def gather_cache(cache: DynamicCache, shards: Shards) -> DynamicCache:
    """All ranks' tokens of every layer, in the order of their positions; the own tokens are let go layer by layer."""
    whole = DynamicCache()
    for number, layer in enumerate(cache.layers):
        keys, values = (gather_tokens(x, shards).wait() for x in (layer.keys, layer.values))
        layer.keys = layer.values = None
        whole.update(keys, values, number)
    return whole


@contextmanager
def _attending_across(model: PreTrainedModel, shards: Shards) -> Iterator[None]:
    """The model's attention over all ranks' tokens, for the while."""

    def mask(*_: Any, mask_function: Any = None, attention_mask: Any = None, **__: Any) -> Window:
        keys = read(mask_function).causal_window
        if keys is None or not (attention_mask is None or bool(attention_mask.all())):
            raise NotImplementedError("masks must be causal or sliding windows without padding for a sharded prompt")
        return Window(shards, keys)

    text_config = model.config.get_text_config(decoder=True)
    before = text_config._attn_implementation
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, mask)
    text_config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        text_config._attn_implementation_internal = before


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, window: Window, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function over all ranks' keys: q [B,Hq,n,D], k, v [B,Hkv,n,D] to out [B,n,Hq,Dv]."""
    if kwargs.get("s_aux") is not None or kwargs.get("dropout"):
        raise NotImplementedError("attention must be without sinks and dropout for a sharded prompt")
    plan = plan_of(module)
    config = plan.config(module.layer_idx)
    sliding = window.keys < FAR
    if config is None or (sliding and plan.sliding_layers == "dense"):
        config = RRConfig(min_length=window.shards.layout.tokens + 1)
    options = {"config": config, "backend": plan.backend if q.device.type == "cuda" else "auto"}
    options["mask_mod"] = sliding_window(window.keys) if sliding else None
    for name, own in (("scale", "scaling"), ("softcap", "softcap")):
        if kwargs.get(own) is not None:
            options[name] = float(kwargs[own])
    out = context_parallel(*(x.contiguous() for x in (q, k, v)), window.shards, **options)
    return out.transpose(1, 2).contiguous(), None
