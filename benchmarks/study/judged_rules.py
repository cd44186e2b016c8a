"""The rules that are judged by what a model says under them, each at one level of its budget.

A rule gives every block a value; a level keeps the blocks whose value reaches it, beside the mandatory ones. So one
level means one budget for all layers and heads, and a density is met by moving it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.study.estimators import true_blocks
from rr_flex.config import RRConfig
from rr_flex.evaluation.equal_density import Spending, value_of
from rr_flex.evaluation.plain import plain_selection
from rr_flex.evaluation.rules import Case
from rr_flex.evaluation.true_mass import true_block_mass

Value = Float[Tensor, "1 Hq nQ nK"]
FLOOR = 0.6  # share of a row's mass that "threshold and floor" keeps whatever the threshold says


@dataclass(frozen=True)
class JudgedRule:
    """What is kept at a level: visible blocks with `value(case, visible, mandatory) >= level`."""

    block_size: tuple[int, int]  # tokens: (queries, keys)
    value: Callable[[Case, Tensor, Tensor], Value]
    config: RRConfig | None = None  # the library's settings that do the same, which are timed; None: an oracle

    def kept(self, case: Case, level: float, visible: Tensor, mandatory: Tensor) -> Bool[Tensor, "1 Hq nQ nK"]:
        return visible & (mandatory | (self.value(case, visible, mandatory) >= level))


def by_config(config: RRConfig, spending: Spending | None = None) -> JudgedRule:
    """The library's own estimate, spent as the config says or as told."""

    def value(case: Case, visible: Tensor, mandatory: Tensor) -> Value:
        mass = plain_selection(case.q, case.k, config=config).mass
        return value_of(mass, visible.expand_as(mass), mandatory.expand_as(mass), spending or config.budget)

    return JudgedRule(config.block_sizes, value, config)


def with_floor(config: RRConfig) -> JudgedRule:
    """One threshold, and in each row at least the largest blocks up to FLOOR of its mass."""
    thresholds, shares = by_config(config, "threshold"), by_config(config, "top_tau")

    def value(case: Case, visible: Tensor, mandatory: Tensor) -> Value:
        before = -shares.value(case, visible, mandatory)
        return torch.where(before < FLOOR, torch.inf, thresholds.value(case, visible, mandatory))

    return JudgedRule(config.block_sizes, value)


def by_row_length(config: RRConfig, slope: float) -> JudgedRule:
    """A threshold that falls with the row's number of visible blocks n, as n^-slope."""
    plain = by_config(config, "threshold")

    def value(case: Case, visible: Tensor, mandatory: Tensor) -> Value:
        return plain.value(case, visible, mandatory) * visible.sum(-1, keepdim=True) ** slope

    return JudgedRule(config.block_sizes, value)


def by_head(config: RRConfig, thresholds: Mapping[int, list[float]]) -> JudgedRule:
    """A threshold for every layer and head; the level is a factor of all of them."""
    plain = by_config(config, "threshold")

    def value(case: Case, visible: Tensor, mandatory: Tensor) -> Value:
        levels = torch.tensor(thresholds[case.layers[0]], device=case.q.device)
        return plain.value(case, visible, mandatory) / levels[:, None, None]

    return JudgedRule(config.block_sizes, value)


def oracle_mass(size: tuple[int, int]) -> JudgedRule:
    """The exact mass of every query and key."""

    def value(case: Case, visible: Tensor, mandatory: Tensor) -> Value:
        mass = true_block_mass(case.q, case.k, block_size=size)
        return value_of(mass, visible.expand_as(mass), mandatory.expand_as(mass), "threshold")

    return JudgedRule(size, value)


def oracle_displacement(size: tuple[int, int]) -> JudgedRule:
    """Σ over queries of ‖Σ_j p_j (v_j − out)‖², relative to the mean square of the layer's values: how far the output
    moves without the block."""

    def value(case: Case, visible: Tensor, mandatory: Tensor) -> Value:
        return true_blocks(case, size).displacement / case.v.float().square().sum(-1).mean()

    return JudgedRule(size, value)


def _keys(query_stride: int, key_stride: int, weight: float = 0.125, block_size=(128, 64)) -> RRConfig:
    """Pooled keys alone: `best` without its half of pooled queries."""
    return RRConfig(
        order=2,
        variance_weight=weight,
        query_stride=query_stride,
        key_stride=key_stride,
        block_size=block_size,
        budget="threshold",
    )


def _best(**settings) -> RRConfig:
    return RRConfig.from_preset("best", **settings)


KEYS16 = _keys(8, 16)
JUDGED: dict[str, JudgedRule] = {
    "rr": by_config(RRConfig()),
    "best": by_config(_best()),
    "fast": by_config(RRConfig.from_preset("fast")),
    "best 128×128": by_config(_best(block_size=128)),
    "best 64×64": by_config(_best(block_size=64)),
    "best, top-τ": by_config(_best(budget="top_tau")),
    "best, threshold and floor": with_floor(_best()),
    "best, threshold by row length": by_row_length(_best(), 0.5),
    "both 8/16": by_config(_best(key_stride=16)),
    "both 8/16 128×128": by_config(_best(key_stride=16, block_size=128)),
    "both 16/16": by_config(_best(stride=16, key_stride=16)),
    "both 8/8": by_config(_best(key_stride=8)),
    "keys 8/16": by_config(KEYS16),
    "keys 8/16, variance ¼": by_config(_keys(8, 16, 0.25)),
    "keys 8/16 128×128": by_config(_keys(8, 16, block_size=(128, 128))),
    "keys 8/16 64×64": by_config(_keys(8, 16, block_size=(64, 64))),
    "keys 8/16, top-τ": by_config(KEYS16.with_settings({"budget": "top_tau"})),
    "keys 8/16, threshold and floor": with_floor(KEYS16),
    "keys 8/8": by_config(_keys(8, 8)),
    "keys 16/16": by_config(_keys(16, 16)),
    "true mass": oracle_mass((128, 64)),
    "true mass 128×128": oracle_mass((128, 128)),
    "true displacement": oracle_displacement((128, 64)),
}
# Thresholds for every layer and head: by the error of a layer's output, by what it does to the prediction, and by one
# number a head for that.
BY_OUTPUT = "best, own budget by output"
BY_PREDICTION = "best, own budget by prediction"
BY_PREDICTION_128 = "best 128×128, own budget by prediction"
BY_KEYS = "keys 8/16, own budget by prediction"
BY_WEIGHT = "best, own budget by head weights"
