"""Which settings hold in which layer, what they did, and where each attention module finds them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from rr_flex.config import RRConfig
from rr_flex.kernels.choose import Backend
from rr_flex.models.records import LayerRecord, Report
from rr_flex.profiles import Profile

SlidingLayers = Literal["select", "dense"]
LayerSettings = Mapping[int, RRConfig | None]  # layer -> settings, None: dense
STEPS = 16  # an octave of lengths within which thresholds are the same: no new ones for every prompt
LARGEST_THRESHOLD = 0.999
ATTRIBUTE = "rr_flex_plan"  # of each attention module, so that a copy of a model takes its settings along


@dataclass(eq=False)
class Plan:
    """The settings of one model and the record of what they did."""

    default: RRConfig = field(default_factory=RRConfig)  # for layers that `layers` does not name
    layers: LayerSettings = field(default_factory=dict)
    sliding_layers: SlidingLayers = "select"
    backend: Backend = "auto"
    profile: Profile | None = None  # whose thresholds depend on a prompt's length
    records: dict[int, LayerRecord] = field(default_factory=dict)
    _of_heads: dict[tuple[int, range | None, int | None], RRConfig] = field(default_factory=dict, repr=False)

    def config(self, layer: int) -> RRConfig | None:
        """The layer's settings; None: dense."""
        return self.layers.get(layer, self.default)

    def of_heads(self, layer: int, heads: range | None, length: int) -> RRConfig:
        """The settings of a layer that is not dense, for these of its query heads (None: all) in a prompt of `length`
        keys; made once.

        rr_attention keeps levels by head on the device that it met them on: the same numbers are not uploaded again.
        """
        config = self.config(layer)
        step = None if self.profile is None or layer not in self.profile.layers else round(STEPS * math.log2(length))
        if isinstance(config.level, float | int) or (heads is None and step is None):
            return config
        found = self._of_heads.get((layer, heads, step))
        if found is None:
            level = config.level
            if step is not None:
                found = self.profile.levels_at(layer, round(2 ** (step / STEPS)))
                level = tuple(min(LARGEST_THRESHOLD, each) for each in found)
            if heads is not None:
                level = level[heads.start : heads.stop]
            local = config.with_settings({config.level_field: level})
            # Threads that come at once get the same one.
            found = self._of_heads.setdefault((layer, heads, step), local)
        return found

    def record(self, layer: int) -> LayerRecord:
        # Every decoding step comes by: no new record is made where there is one.
        record = self.records.get(layer)
        if record is None:
            record = self.records.setdefault(layer, LayerRecord())
        return record

    def report(self) -> Report:
        """What was done up to now; later calls do not change it."""
        return Report.of([self.records])


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


def layer_of(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    return -1 if layer is None else layer


def set_plan(module: nn.Module, plan: Plan | None) -> None:
    """None takes the module's plan away."""
    if plan is not None:
        setattr(module, ATTRIBUTE, plan)
    elif hasattr(module, ATTRIBUTE):
        delattr(module, ATTRIBUTE)
