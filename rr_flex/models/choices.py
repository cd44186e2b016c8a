"""What `enable` is asked for, checked, and made into settings by layer. Nothing that is given is ignored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from rr_flex.config import RRConfig
from rr_flex.geometry import ceil_div
from rr_flex.kernels.choose import Backend, check_backend_name
from rr_flex.models.layer_plan import LayerSettings, Plan, SlidingLayers
from rr_flex.profiles import Profile, load_profile


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The arguments of `rr_flex.models.enable`, with its meanings and defaults."""

    tau: float | Sequence[float] | Mapping[int, float] | None = None
    profile: LayerSettings | Profile | str | Path | None = None
    config: RRConfig | None = None
    dense_layers: int | Sequence[int] = 0
    dense_last_tokens: int | None = None
    sliding_layers: SlidingLayers = "select"
    backend: Backend = "auto"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = self.dense_last_tokens
        if tokens is not None and (type(tokens) is not int or tokens < 0):
            raise ValueError(f"dense_last_tokens must be an int of at least 0, got {tokens!r}")
        if tokens is not None and "dense_last_rows" in self.settings:
            raise ValueError(f"dense_last_tokens must not stand beside dense_last_rows, got {tokens} tokens and rows")
        if self.sliding_layers not in get_args(SlidingLayers):
            raise ValueError(f"sliding_layers must be 'select' or 'dense', got {self.sliding_layers!r}")
        check_backend_name(self.backend)

    @property
    def one_tau(self) -> bool:
        """Whether tau is one number for all layers."""
        return isinstance(self.tau, float | int)

    @property
    def base(self) -> RRConfig:
        """The settings of layers that nothing else names."""
        tau = {"tau": self.tau} if self.one_tau else {}
        return self.with_dense_tokens(RRConfig.resolve(self.config, self.settings | tau))

    def with_dense_tokens(self, config: RRConfig) -> RRConfig:
        if self.dense_last_tokens is None:
            return config
        # The last row may hold a single token.
        rows = ceil_div(self.dense_last_tokens - 1, config.block_sizes[0]) + 1 if self.dense_last_tokens else 0
        return config.with_settings({"dense_last_rows": rows})


def make_plan(n_layers: int, choices: Choices, model: Any = None) -> Plan:
    """The plan of a model of `n_layers` layers. `model`: its config, for which a calibrated profile must be made."""
    base = choices.base
    layers: dict[int, RRConfig | None] = {}
    if choices.tau is not None and not choices.one_tau:
        by_layer = _by_layer("tau", choices.tau, n_layers)
        layers = {layer: base.with_settings({"tau": share}) for layer, share in by_layer.items()}
    calibrated = _loaded(choices.profile)
    profile = _profile_layers(choices, n_layers, model)
    if both := sorted(set(layers) & set(profile)):
        raise ValueError(f"tau must name layers that profile does not, got both for {both}")
    said = [name for name in ("config", "tau") if getattr(choices, name) is not None] + list(choices.settings)
    if said and n_layers and len(profile) == n_layers:
        raise ValueError(
            f"{said[0]} must be left out beside a profile of every layer, which holds all settings, got {said}; "
            "change the profile's own RRConfigs instead (RRConfig.from_profile, RRConfig.with_settings)"
        )
    layers |= profile
    layers |= dict.fromkeys(_dense_layers(choices.dense_layers, n_layers))
    by_length = calibrated if calibrated is not None and calibrated.factors is not None else None
    if by_length is not None and not said:
        layers = dict.fromkeys(range(n_layers)) | layers  # what was not calibrated, windows say, stays dense
    kept = {"sliding_layers": choices.sliding_layers, "backend": choices.backend, "profile": by_length}
    return Plan(default=base, layers=layers, **kept)


def check_heads(plan: Plan, heads: int) -> None:
    """ValueError for levels by head, of tau or threshold, that are not as many as the model's query heads."""
    for config in filter(None, (plan.default, *plan.layers.values())):
        level = config.level
        if not isinstance(level, float | int) and len(level) != heads:
            raise ValueError(f"{config.level_field} must be one number or one a query head ({heads}), got {len(level)}")


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


def _loaded(profile: Any) -> Profile | None:
    """A calibrated profile, from its file where it is named."""
    if isinstance(profile, str | Path):
        return load_profile(profile)
    return profile if isinstance(profile, Profile) else None


def _profile_layers(choices: Choices, n_layers: int, model: Any) -> dict[int, RRConfig | None]:
    """The one place where a profile becomes settings by layer."""
    profile = choices.profile
    if profile is None:
        return {}
    if isinstance(profile, str | Path | Profile):
        profile = RRConfig.from_profile(profile, model)
    if not isinstance(profile, Mapping | Sequence):
        raise TypeError(f"profile must map layers to RRConfig (or None, dense), got {profile!r}")
    layers = _by_layer("profile", profile, n_layers)
    for layer, chosen in layers.items():
        if chosen is not None and not isinstance(chosen, RRConfig):
            raise TypeError(f"profile must hold RRConfig (or None, dense), got {chosen!r} for layer {layer}")
    return {layer: chosen and choices.with_dense_tokens(chosen) for layer, chosen in layers.items()}


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
