"""Switch rr_flex on in a Hugging Face model, and off again."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from rr_flex.config import RRConfig
from rr_flex.kernels.choose import Backend
from rr_flex.models.forward import rr_flex_attention
from rr_flex.models.plan import (
    ATTRIBUTE,
    DEFAULTS,
    Plan,
    Profile,
    SlidingLayers,
    base_of,
    check_heads,
    make_plan,
    set_plan,
)
from rr_flex.models.prefill_mask import prefill_mask
from rr_flex.models.records import LayerRecord, Report

NAME = "rr_flex"


def register(
    config: RRConfig | None = None,
    *,
    dense_last_tokens: int | None = None,
    sliding_layers: SlidingLayers = "select",
    backend: Backend = "auto",
    **settings: Any,
) -> None:
    """Makes `attn_implementation="rr_flex"` known to transformers; the settings hold for models loaded by that name.

    `enable` calls it; call it yourself only to name "rr_flex" in `from_pretrained`. Later calls replace the settings,
    whose names are `enable`'s; those by layer are `enable`'s alone.
    """
    others = {"dense_last_tokens": dense_last_tokens, "sliding_layers": sliding_layers, "backend": backend}
    if config is not None or settings or tuple(others.values()) != (None, "select", "auto"):
        plan = make_plan(0, config=base_of(config, settings), **others)
        DEFAULTS.update(default=plan.default, sliding_layers=sliding_layers, backend=backend)
    AttentionInterface.register(NAME, rr_flex_attention)
    AttentionMaskInterface.register(NAME, prefill_mask)


def enable(
    model: nn.Module,
    *,
    tau: float | Sequence[float] | Mapping[int, float] | None = None,
    profile: Profile | str | Path | None = None,
    config: RRConfig | None = None,
    dense_layers: int | Sequence[int] = 0,
    dense_last_tokens: int | None = None,
    sliding_layers: SlidingLayers = "select",
    backend: Backend = "auto",
    **settings: Any,
) -> "Enabled":
    """Prefill of `model`'s language model by RRAttention from now on, or within `with enable(model):`.

    `tau`: one share, a sequence of one a layer, or a mapping for some layers. `profile`: a calibrated one by its file
    or shipped name, or layer -> RRConfig, None for a dense layer; it overrides tau. `config` or single `settings`:
    fields of RRConfig, for all other layers.
    `dense_layers`: so many first layers, or a list, stay dense. `dense_last_tokens`: at least so many tokens at the end
    of each call's queries see all they may. `sliding_layers`: "select" among the window's blocks, or "dense".
    `backend`: the kernel on CUDA, as in `rr_attention`. A vision tower keeps its attention. TypeError or ValueError
    naming the argument; NotImplementedError for a model that does not go through transformers' attention interface.
    """
    root = _pretrained(model)
    text_config = root.config.get_text_config(decoder=True)
    if text_config.output_attentions:
        raise ValueError("output_attentions must be False in the model's config under rr_flex, got True")
    if isinstance(profile, str | Path):
        profile = RRConfig.from_profile(profile, text_config)
    plan = make_plan(
        getattr(text_config, "num_hidden_layers", 0),
        config=config,
        tau=tau,
        profile=profile,
        dense_layers=dense_layers,
        dense_last_tokens=dense_last_tokens,
        sliding_layers=sliding_layers,
        backend=backend,
        **settings,
    )
    heads = getattr(text_config, "num_attention_heads", None)
    # Some models have a number a layer.
    if type(heads) is int:
        check_heads(plan, heads)
    register()
    return Enabled(root, text_config, plan)


class Enabled:
    """rr_flex is on in a model until `restore()`, or until the `with` block ends."""

    def __init__(self, root: PreTrainedModel, text_config: PreTrainedConfig, plan: Plan) -> None:
        self.plan = plan
        # The configs as they are now: a later `enable` may nest.
        self._configs = [
            (config, config._attn_implementation) for config in _configs_of(root) if config._attn_implementation != NAME
        ]
        modules = [module for module in root.modules() if getattr(module, "config", None) is text_config]
        self._plans = [(module, getattr(module, ATTRIBUTE, None)) for module in modules]
        root.set_attn_implementation(NAME if text_config is root.config else _path_to(root.config, text_config))
        for module in modules:
            set_plan(module, plan)

    def report(self) -> Report:
        """What was done since the start or the last `reset`."""
        return Report(self.plan.records)

    def reset(self) -> None:
        """Starts counting anew."""
        self.plan.records = {}

    def restore(self) -> None:
        """Gives the model the attention that it had before; a second call does nothing."""
        for config, before in self._configs:
            config._attn_implementation_internal = before
        for module, plan in self._plans:
            set_plan(module, plan)
        self._configs, self._plans = [], []

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def report(model: nn.Module) -> Report:
    """What rr_flex did in `model`, however it was switched on."""
    plans = {id(plan): plan for module in model.modules() if (plan := getattr(module, ATTRIBUTE, None))}
    layers: dict[int, LayerRecord] = {}
    for plan in plans.values():
        for layer, record in plan.records.items():
            total = layers.setdefault(layer, LayerRecord())
            total.sparse += record.sparse
            total.dense += record.dense
            total.density_sum = total.density_sum + record.density_sum
    return Report(layers)


def _pretrained(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, also inside torch.compile's or PEFT's wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    root = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if root is None:
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    text_config = root.config.get_text_config(decoder=True)
    decoders = [m for m in root.modules() if isinstance(m, PreTrainedModel) and m.config is text_config]
    for decoder in decoders or [root]:
        if not (decoder._can_set_attn_implementation() and decoder._supports_attention_backend):
            raise NotImplementedError(
                f"model must go through transformers' attention interface, which {type(decoder).__name__} does not"
            )
    return root


def _configs_of(root: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    """Every config in the model, once."""
    waiting = [root.config] + [m.config for m in root.modules() if isinstance(m, PreTrainedModel)]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        waiting += [sub for name in config.sub_configs if (sub := getattr(config, name, None)) is not None]


def _path_to(config: PreTrainedConfig, text_config: PreTrainedConfig) -> dict[str, Any]:
    """The nested dict for `set_attn_implementation` that names `text_config` alone."""
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if sub is text_config:
            return {name: NAME}
        if sub is not None and (below := _path_to(sub, text_config)):
            return {name: below}
    return {}
