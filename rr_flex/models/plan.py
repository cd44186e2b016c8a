"""Which settings hold in which layer, and where each attention module finds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from rr_flex.config import RRConfig
from rr_flex.geometry import ceil_div
from rr_flex.kernels.choose import Backend
from rr_flex.models.records import LayerRecord

SlidingLayers = Literal["select", "dense"]
Profile = Mapping[int, RRConfig | None]  # layer -> settings, None: dense


@dataclass(eq=False)
class Plan:
    """The settings of one model and the record of what they did."""

    default: RRConfig = field(default_factory=RRConfig)  # for layers that `layers` does not name
    layers: Profile = field(default_factory=dict)
    sliding_layers: SlidingLayers = "select"
    backend: Backend = "auto"
    records: dict[int, LayerRecord] = field(default_factory=dict)

    def config(self, layer: int) -> RRConfig | None:
        """The layer's settings; None: dense."""
        return self.layers.get(layer, self.default)

    def record(self, layer: int) -> LayerRecord:
        # Every decoding step comes by: no new record is made where there is one.
        record = self.records.get(layer)
        if record is None:
            record = self.records[layer] = LayerRecord()
        return record


# What `register` was given: the plan of a module that no `enable` knows (attn_implementation="rr_flex" alone).
DEFAULTS: dict[str, Any] = {}
ATTRIBUTE = "rr_flex_plan"  # of each attention module, so that a copy of a model takes its settings along


def plan_of(module: nn.Module) -> Plan:
    plan = getattr(module, ATTRIBUTE, None)
    if plan is None:
        plan = Plan(**DEFAULTS)
        setattr(module, ATTRIBUTE, plan)
    return plan


def set_plan(module: nn.Module, plan: Plan | None) -> None:
    """None takes the module's plan away."""
    if plan is not None:
        setattr(module, ATTRIBUTE, plan)
    elif hasattr(module, ATTRIBUTE):
        delattr(module, ATTRIBUTE)


def make_plan(
    n_layers: int,
    *,
    config: RRConfig | None = None,
    tau: float | Sequence[float] | Mapping[int, float] | None = None,
    profile: Profile | None = None,
    dense_layers: int | Sequence[int] = 0,
    dense_last_tokens: int | None = None,
    sliding_layers: SlidingLayers = "select",
    backend: Backend = "auto",
    **settings: Any,
) -> Plan:
    """The plan of a model of `n_layers` layers; the arguments are those of `rr_flex.models.enable`."""
    base = base_of(config, settings)
    if dense_last_tokens is not None:
        if type(dense_last_tokens) is not int or dense_last_tokens < 0:
            raise ValueError(f"dense_last_tokens must be an int of at least 0, got {dense_last_tokens!r}")
        # The last row may hold a single token.
        rows = ceil_div(dense_last_tokens - 1, base.block_sizes[0]) + 1 if dense_last_tokens else 0
        base = base.with_settings({"dense_last_rows": rows})
    if sliding_layers not in get_args(SlidingLayers):
        raise ValueError(f"sliding_layers must be 'select' or 'dense', got {sliding_layers!r}")
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if isinstance(tau, float | int) or tau is None:
        base = base if tau is None else base.with_settings({"tau": tau})
        layers: dict[int, RRConfig | None] = {}
    else:
        layers = {layer: base.with_settings({"tau": share}) for layer, share in _by_layer("tau", tau, n_layers).items()}
    layers |= _profile_layers(profile, n_layers)
    layers |= dict.fromkeys(_dense_layers(dense_layers, n_layers))
    return Plan(default=base, layers=layers, sliding_layers=sliding_layers, backend=backend)


def base_of(config: RRConfig | None, settings: dict[str, Any]) -> RRConfig:
    """`config`, or the defaults, with single settings replaced."""
    if not isinstance(config, RRConfig | None):
        raise TypeError(f"config must be an RRConfig, got {config!r}")
    return (config or RRConfig()).with_settings(settings)


def check_heads(plan: Plan, heads: int) -> None:
    """ValueError for levels by head, of tau or threshold, that are not as many as the model's query heads."""
    for config in filter(None, (plan.default, *plan.layers.values())):
        name = config.level_field
        level = getattr(config, name)
        if not isinstance(level, float | int) and len(level) != heads:
            raise ValueError(f"{name} must be one number or one a query head ({heads}), got {len(level)}")


def _by_layer(name: str, values: Sequence | Mapping, n_layers: int) -> dict[int, Any]:
    """A value a layer from a sequence (one for each layer) or a mapping (for some layers)."""
    if isinstance(values, Mapping):
        for layer in values:
            _check_layer(name, layer, n_layers)
        return dict(values)
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be one value, a sequence or a mapping by layer, got {values!r}")
    if len(values) != n_layers:
        raise ValueError(f"{name} must hold one value a layer ({n_layers}), got {len(values)}")
    return dict(enumerate(values))


def _profile_layers(profile: Profile | None, n_layers: int) -> dict[int, RRConfig | None]:
    """The one place where a profile becomes settings by layer."""
    if profile is None:
        return {}
    if not isinstance(profile, Mapping | Sequence):
        raise TypeError(f"profile must map layers to RRConfig (or None, dense), got {profile!r}")
    layers = _by_layer("profile", profile, n_layers)
    for layer, chosen in layers.items():
        if chosen is not None and not isinstance(chosen, RRConfig):
            raise TypeError(f"profile must hold RRConfig (or None, dense), got {chosen!r} for layer {layer}")
    return layers


def _dense_layers(chosen: int | Sequence[int], n_layers: int) -> Sequence[int]:
    """The first so many layers, or the layers named."""
    if type(chosen) is int:
        if not 0 <= chosen <= n_layers:
            raise ValueError(f"dense_layers must be 0 to {n_layers} first layers or a list of them, got {chosen}")
        return range(chosen)
    if isinstance(chosen, str) or not isinstance(chosen, Sequence):
        raise TypeError(f"dense_layers must be a number of first layers or a list of layers, got {chosen!r}")
    for layer in chosen:
        _check_layer("dense_layers", layer, n_layers)
    return chosen


def _check_layer(name: str, layer: object, n_layers: int) -> None:
    if type(layer) is not int or not 0 <= layer < n_layers:
        raise ValueError(f"{name} must name layers from 0 to {n_layers - 1}, got {layer!r}")
