"""The variable RR_FLEX: what it may say, and the RRConfig of each layer that it comes to."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rr_flex.config import RRConfig
from rr_flex.profiles import load_profile
from rr_flex.serving.step_rows import ROW

VARIABLE = "RR_FLEX"
FORMS = """a JSON object such as {"preset": "best"} or {"tau": 0.9}, a .json file, or the name of a shipped profile"""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a layer asks for."""

    config: RRConfig  # its own, as `ServingSettings.of_layer` gives it
    scale: float
    softcap: float | None
    head_offset: int  # global index of its first query head


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """What the server computes: one RRConfig for all layers, or a profile's for some of them, the others dense."""

    config: RRConfig | None  # of every layer; None: `layers` says
    layers: Mapping[int, RRConfig]
    min_length: int | None  # keys under which a block row is dense; None: the card's measured break-even

    def of_layer(self, layer: int, first_head: int, heads: int) -> RRConfig | None:
        """The settings for query heads first_head … first_head + heads − 1 of a layer; None: the layer is dense.

        Dense last rows and short rows are decided before anything is selected (`rr_flex.serving.step_rows`); here they
        are none.
        """
        config = self.config or self.layers.get(layer)
        if config is None:
            return None
        name, level = config.level_field, config.level
        if isinstance(level, tuple):
            if len(level) < first_head + heads:
                raise ValueError(f"{name} must have a number for each query head, got {len(level)} in layer {layer}")
            config = replace(config, **{name: level[first_head : first_head + heads]})
        return replace(config, dense_last_rows=0, min_length=0)

    def any_config(self) -> RRConfig:
        """Settings of some layer: strides, blocks and order are the same in all."""
        return self.config or next(iter(self.layers.values()))


def settings_of_environment(model_config: Any = None) -> ServingSettings | None:
    """The settings that RR_FLEX asks for, None where it is not set; ValueError in one line where it is wrong.

    `model_config`: a transformers config, which a profile must have been calibrated for.
    """
    text = os.environ.get(VARIABLE, "")
    if not text.strip():
        return None
    try:
        return parse_settings(text, model_config)
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"{VARIABLE}={text}: {error}") from error


def parse_settings(text: str, model_config: Any = None) -> ServingSettings:
    """`text` as settings: a JSON object, a file of settings or of a profile, or a shipped profile's name.

    The object's keys are "preset" or "profile", and fields of RRConfig, which with a profile replace those of every
    layer. ValueError, TypeError or FileNotFoundError say what is wrong.
    """
    text = text.strip()
    document: Any
    if text.startswith("{"):
        document = _loads(text, "settings")
    elif text.endswith(".json"):
        document = _loads(Path(text).read_text(encoding="utf-8"), text)
        if isinstance(document, dict) and "layers" in document:
            document = {"profile": text}
    else:
        document = {"profile": text}
    if not isinstance(document, dict):
        raise ValueError(f"settings must be {FORMS}, got {document!r}")
    return _settings_of(document, text, model_config)


def _settings_of(document: dict[str, Any], source: str, model_config: Any) -> ServingSettings:
    settings = dict(document)
    profile = settings.pop("profile", None)
    config, layers = None, {}
    if profile is None:
        config = RRConfig.resolve(None, settings)
    else:
        if "preset" in settings:
            raise ValueError(f"settings must have a preset or a profile, got both in {source}")
        loaded = load_profile(profile)
        found = RRConfig.from_profile(loaded, model_config)
        layers = {layer: of_layer.with_settings(settings) for layer, of_layer in found.items()}
    for each in (config,) if config else layers.values():
        _check_servable(each)
    shortest = (config or next(iter(layers.values()))).min_length
    return ServingSettings(config=config, layers=layers, min_length=shortest)


def _check_servable(config: RRConfig) -> None:
    """Raise for settings by which a block row's choice would depend on how the server cuts the prompt."""
    if config.budget == "density":
        raise ValueError(
            'budget must be "top_tau" or a threshold in a server, since with "density" a row\'s blocks depend on the '
            f"rows beside it, got {config.budget!r}"
        )
    if config.block_sizes[0] != ROW:
        raise ValueError(f"block_size must have {ROW} queries in a server, got {config.block_size}")
    if config.dense_last_rows != 1:
        raise ValueError(
            "dense_last_rows must be 1 in a server, where it means the row that a chunk ends in before it is whole, "
            f"got {config.dense_last_rows}"
        )


def _loads(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be JSON, got {error}") from error


def described(settings: ServingSettings) -> str:
    """What is on, for one line of a log: the fields of RRConfig that differ from its defaults."""
    config = settings.any_config()
    default = RRConfig()
    own = {field.name: getattr(config, field.name) for field in fields(config)}
    changed = {name: value for name, value in own.items() if value not in (None, getattr(default, name))}
    changed[config.level_field] = "by layer and head" if settings.layers else config.level
    if settings.layers:
        changed["layers"] = len(settings.layers)
    return ", ".join(f"{name} {value}" for name, value in changed.items())
