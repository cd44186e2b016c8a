"""Which settings hold in which layer, what they did, and where each attention module finds them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from rr_flex.config import LEVELS, RRConfig
from rr_flex.kernels.choose import Backend
from rr_flex.models.records import LayerRecord, Report

SlidingLayers = Literal["select", "dense"]
LayerSettings = Mapping[int, RRConfig | None]  # layer -> settings, None: dense
ATTRIBUTE = "rr_flex_plan"  # of each attention module, so that a copy of a model takes its settings along


@dataclass(eq=False)
class Plan:
    """The settings of one model and the record of what they did."""

    default: RRConfig = field(default_factory=RRConfig)  # for layers that `layers` does not name
    layers: LayerSettings = field(default_factory=dict)
    sliding_layers: SlidingLayers = "select"
    backend: Backend = "auto"
    records: dict[int, LayerRecord] = field(default_factory=dict)
    _placed: dict[tuple, RRConfig] = field(default_factory=dict, repr=False)

    def config(self, layer: int) -> RRConfig | None:
        """The layer's settings; None: dense."""
        return self.layers.get(layer, self.default)

    def placed(self, layer: int, heads: range | None, device: torch.device) -> RRConfig:
        """The settings of a layer that is not dense, for these of its query heads (None: all), on `device`.

        Levels by head are a tensor there, made once: an upload in every call would stall the device, and could not be
        part of a CUDA graph. Threads that come at once get the same one.
        """
        key = (layer, heads, device)
        config = self._placed.get(key)
        if config is None:
            config = self._placed.setdefault(key, _place(self.config(layer), heads, device))
        return config

    def record(self, layer: int) -> LayerRecord:
        # Every decoding step comes by: no new record is made where there is one.
        record = self.records.get(layer)
        if record is None:
            record = self.records.setdefault(layer, LayerRecord())
        return record

    def report(self) -> Report:
        """What was done up to now; later calls do not change it."""
        return Report.of([self.records])


def _place(config: RRConfig, heads: range | None, device: torch.device) -> RRConfig:
    name = LEVELS[config.budget]
    level = getattr(config, name)
    if isinstance(level, float | int):
        return config
    if heads is not None:
        level = level[heads.start : heads.stop]
    # On a CPU RRConfig keeps numbers, and nothing is uploaded.
    if device.type != "cpu":
        level = torch.as_tensor(level, dtype=torch.float32, device=device)
    return config.with_settings({name: level})


_registered = Plan()


def set_registered(plan: Plan) -> None:
    """What `register` was given: for modules that no `enable` knows (attn_implementation="rr_flex" alone)."""
    global _registered
    _registered = plan


def plan_of(module: nn.Module) -> Plan:
    plan = getattr(module, ATTRIBUTE, None)
    if plan is None:
        known = _registered
        new = Plan(known.default, sliding_layers=known.sliding_layers, backend=known.backend)
        # Of threads that come at once the first one's plan is everybody's.
        plan = module.__dict__.setdefault(ATTRIBUTE, new)
    return plan


def set_plan(module: nn.Module, plan: Plan | None) -> None:
    """None takes the module's plan away."""
    if plan is not None:
        setattr(module, ATTRIBUTE, plan)
    elif hasattr(module, ATTRIBUTE):
        delattr(module, ATTRIBUTE)
