"""Switch rr_flex on in a Hugging Face model, and off again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from rr_flex.config import RRConfig
from rr_flex.kernels.choose import Backend
from rr_flex.models.choices import Choices, check_heads, make_plan
from rr_flex.models.forward import rr_flex_attention
from rr_flex.models.layer_plan import ATTRIBUTE, LayerSettings, Plan, SlidingLayers, set_plan, set_registered
from rr_flex.models.own_budget import own_budget
from rr_flex.models.prefill_mask import prefill_mask
from rr_flex.models.records import Report
from rr_flex.models.states import before_attention
from rr_flex.models.switches import switch_off, switch_on
from rr_flex.profiles import Profile

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

    `enable` makes the name known too; call this only to name "rr_flex" in `from_pretrained`. A later call replaces all
    settings. They are `enable`'s; those by layer are `enable`'s alone.
    """
    others = {"dense_last_tokens": dense_last_tokens, "sliding_layers": sliding_layers, "backend": backend}
    set_registered(make_plan(0, Choices(config=config, settings=settings, **others)))
    _make_known()


def enable(
    model: nn.Module,
    *,
    tau: float | Sequence[float] | Mapping[int, float] | None = None,
    profile: LayerSettings | Profile | str | Path | None = None,
    config: RRConfig | None = None,
    dense_layers: int | Sequence[int] = 0,
    dense_last_tokens: int | None = None,
    sliding_layers: SlidingLayers = "select",
    backend: Backend = "auto",
    calibrate_on: Any = None,
    profile_cache: str | Path | None = None,
    **settings: Any,
) -> "Enabled":
    """Prefill of `model`'s language model by RRAttention from now on, or within `with enable(model):`.

    `tau`: one share, a sequence of one a layer, or a mapping for some layers. `profile`: a calibrated one, its file or
    shipped name, or layer -> RRConfig, None for a dense layer. `config` or single `settings`: fields of RRConfig, for
    all layers that `profile` does not name.
    `dense_layers`: so many first layers, or a list, stay dense whatever else names them. `dense_last_tokens`: at least
    so many tokens at the end of each call's queries see all they may. `sliding_layers`: "select" among the window's
    blocks, or "dense". `backend`: the kernel on CUDA, as in `rr_attention`. A vision tower keeps its attention.
    `budget="auto"`: thresholds of the model's own that keep `target_density` (.3) of the blocks at every length, or the
    density at which `calibrate_on` diverges by `target_kl` nats a token, found at first use and kept in a file
    (`rr_flex.calibration.auto.own_profile`). `calibrate_on`: the tokenizer or token ids for that. `profile_cache`: the
    file's folder, ~/.cache/rr_flex unless given.
    TypeError or ValueError naming the argument, also for one that nothing would read (tau under another budget, config
    beside a preset or beside a profile of every layer); NotImplementedError for a model that does not go through
    transformers' attention interface.
    """
    root = _pretrained(model)
    text_config = root.config.get_text_config(decoder=True)
    if text_config.output_attentions:
        raise ValueError("output_attentions must be False in the model's config under rr_flex, got True")
    given = settings | {"tau": tau, "profile": profile, "config": config}
    own = own_budget(root, given, calibrate_on, profile_cache)
    if own is not None:
        profile, settings = own, {}
    choices = Choices(
        tau=tau,
        profile=profile,
        config=config,
        dense_layers=dense_layers,
        dense_last_tokens=dense_last_tokens,
        sliding_layers=sliding_layers,
        backend=backend,
        settings=settings,
    )
    plan = make_plan(getattr(text_config, "num_hidden_layers", 0), choices, text_config)
    heads = getattr(text_config, "num_attention_heads", None)
    # Some models have a number a layer.
    if type(heads) is int:
        check_heads(plan, heads)
    _make_known()
    return Enabled(root, text_config, plan)


def _make_known() -> None:
    AttentionInterface.register(NAME, rr_flex_attention)
    AttentionMaskInterface.register(NAME, prefill_mask)


class Enabled:
    """rr_flex is on in a model until `restore()`, or until the `with` block ends; of several, the last one holds."""

    def __init__(self, root: PreTrainedModel, text_config: PreTrainedConfig, plan: Plan) -> None:
        self.plan = plan
        self._root, self._text_config, self._is_on = root, text_config, True
        own = [module for module in root.modules() if getattr(module, "config", None) is text_config]
        # Of these the attention layers are told which cache their keys are in.
        layers = [module for module in own if hasattr(module, "layer_idx")]
        self._hooks = [m.register_forward_pre_hook(before_attention, with_kwargs=True) for m in layers]
        switch_on(root, self)

    def apply(self) -> None:
        """Gives the language model this attention, by whatever the model was switched to meanwhile."""
        root, text_config = self._root, self._text_config
        root.set_attn_implementation(NAME if text_config is root.config else _path_to(root.config, text_config))
        for module in root.modules():
            if getattr(module, "config", None) is text_config:
                set_plan(module, self.plan)

    def report(self) -> Report:
        """What was done since the start or the last `reset`."""
        return self.plan.report()

    def reset(self) -> None:
        """Starts counting anew."""
        self.plan.records = {}

    def restore(self) -> None:
        """Gives the model the attention that it had before, or that of what was enabled since; a second call does
        nothing."""
        self._is_on = False
        for hook in self._hooks:
            hook.remove()
        switch_off(self._root, self)

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        plan, found = self.plan, self.report()
        about = [f"{plan.default.level_field}={plan.default.level}"]
        if plan.layers:
            dense = sum(config is None for config in plan.layers.values())
            about.append(f"{len(plan.layers) - dense} layers set apart, {dense} dense")
        about.append(f"{found.sparse} calls sparse" + (f" at density {found.density:.3f}" if found.sparse else ""))
        about.append(f"{sum(found.dense.values())} dense")
        state = "on" if self._is_on else "restored"
        return f"Enabled({type(self._root).__name__}, {state}: {'; '.join(about)})"


def report(model: nn.Module) -> Report:
    """What rr_flex did in `model`, however it was switched on."""
    plans = {id(plan): plan for module in model.modules() if (plan := getattr(module, ATTRIBUTE, None))}
    return Report.of([plan.records for plan in plans.values()])


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


def _path_to(config: PreTrainedConfig, text_config: PreTrainedConfig) -> dict[str, Any]:
    """The nested dict for `set_attn_implementation` that names `text_config` alone."""
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if sub is text_config:
            return {name: NAME}
        if sub is not None and (below := _path_to(sub, text_config)):
            return {name: below}
    return {}
