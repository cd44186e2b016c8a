"""The rules that are judged by what a model says under them, each at one level of its budget.

A rule gives every block a value; a level keeps the blocks whose value reaches it, beside the mandatory ones. So one
level means one budget for all layers and heads, and a density is met by moving it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from rr_flex.config import RRConfig
from rr_flex.evaluation.block_outputs import TOKENS, strips
from rr_flex.evaluation.equal_density import Spending, value_of, visible_and_mandatory
from rr_flex.evaluation.plain import plain_selection
from rr_flex.evaluation.rules import Case
from rr_flex.evaluation.true_mass import true_block_mass
from rr_flex.geometry import ceil_div

Value = Float[Tensor, "1 Hq nQ nK"]
FLOOR = 0.6  # share of a row's mass that "threshold and floor" keeps whatever the threshold says


@dataclass(frozen=True)
class JudgedRule:
    """What is kept at a level: visible blocks with `value(case, visible, mandatory) >= level`."""

    block_size: tuple[int, int]  # tokens: (queries, keys)
    value: Callable[[Case, Tensor, Tensor], Value]
    config: RRConfig | None = None  # the library's settings that do the same, which are timed; None: an oracle
    local_blocks: int = 1  # of each row, mandatory: the last that it sees

    def blocks(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The visible and the mandatory ones of a prompt."""
        return visible_and_mandatory(length, self.block_size, device, self.local_blocks)

    def kept(self, case: Case, level: float, visible: Tensor, mandatory: Tensor) -> Bool[Tensor, "1 Hq nQ nK"]:
        return visible & (mandatory | (self.value(case, visible, mandatory) >= level))


def by_config(config: RRConfig, spending: Spending | None = None) -> JudgedRule:
    """The library's own estimate, spent as the config says or as told."""

    def value(case: Case, visible: Tensor, mandatory: Tensor) -> Value:
        mass = plain_selection(case.q, case.k, config=config).mass
        return value_of(mass, visible.expand_as(mass), mandatory.expand_as(mass), spending or config.budget)

    return JudgedRule(config.block_sizes, value, config, config.local_blocks)


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

    return JudgedRule(config.block_sizes, value, local_blocks=config.local_blocks)


def oracle_mass(size: tuple[int, int]) -> JudgedRule:
    """The exact mass of every query and key."""

    def value(case: Case, visible: Tensor, mandatory: Tensor) -> Value:
        mass = true_block_mass(case.q, case.k, block_size=size)
        return value_of(mass, visible.expand_as(mass), mandatory.expand_as(mass), "threshold")

    return JudgedRule(size, value)


def true_displacement(case: Case, size: tuple[int, int]) -> Value:
    """Σ over a block's queries of ‖Σ_j p_j (v_j − out)‖², exact, in one pass over causal attention."""
    (B, Hq, L), (q_block, k_block) = case.q.shape[:3], size
    found = torch.zeros(B, Hq, ceil_div(L, q_block), ceil_div(L, k_block), device=case.q.device)
    step = k_block // TOKENS
    for row, parts in strips(case.q, case.k, case.v):
        total = parts.sum(2, keepdim=True)
        share = parts / total[..., -1:]  # B Hq nJ rows Dv+1: a block's part of the output, and of the mass
        joined = F.pad(share, (0, 0, 0, 0, 0, -share.shape[2] % step)).unflatten(2, (-1, step)).sum(3)
        moved = joined[..., :-1] - joined[..., -1:] * total[..., :-1] / total[..., -1:]
        found[..., row * TOKENS // q_block, : joined.shape[2]] += moved.square().sum((-1, -2))
    return found


def oracle_displacement(size: tuple[int, int]) -> JudgedRule:
    """How far the output moves without the block, relative to the mean square of the layer's values."""

    def value(case: Case, visible: Tensor, mandatory: Tensor) -> Value:
        return true_displacement(case, size) / case.v.float().square().sum(-1).mean()

    return JudgedRule(size, value)


WIDE = (128, 64)


def _keys(query_stride: int, key_stride: int, **settings) -> RRConfig:
    """Pooled keys alone: `best` without its half of pooled queries; blocks of 128×64 unless said otherwise."""
    strides = {"query_stride": query_stride, "key_stride": key_stride}
    chosen = {"order": 2, "variance_weight": 0.125, "block_size": WIDE, "budget": "threshold"} | strides | settings
    return RRConfig(**chosen)


def _both(**settings) -> RRConfig:
    """`best`'s estimate, blocks of 128×64 unless said otherwise."""
    return RRConfig.from_preset("best", **{"block_size": WIDE, "budget": "threshold"} | settings)


KEYS = _keys(8, 16)
JUDGED: dict[str, JudgedRule] = {
    "rr": by_config(RRConfig()),
    "best": by_config(RRConfig.from_preset("best")),
    "fast": by_config(RRConfig.from_preset("fast")),
    "best 128×64": by_config(_both()),
    "best and the block before": by_config(RRConfig.from_preset("best", local_blocks=2)),
    "best 128×64 and the block before": by_config(_both(local_blocks=2)),
    "best 64×64": by_config(_both(block_size=64)),
    "best 128×64, top-τ": by_config(_both(budget="top_tau")),
    "best 128×64, threshold and floor": with_floor(_both()),
    "best 128×64, threshold by row length": by_row_length(_both(), 0.5),
    "both, order 1, 8/32, 128×64": by_config(_both(order=1)),
    "both 8/16, 128×64": by_config(_both(key_stride=16)),
    "both 8/16": by_config(_both(key_stride=16, block_size=128)),
    "both 16/16, 128×64": by_config(_both(stride=16, key_stride=16)),
    "both 8/8, 128×64": by_config(_both(key_stride=8)),
    "keys 8/16, 128×64": by_config(KEYS),
    "keys 8/16, 128×64, variance ¼": by_config(_keys(8, 16, variance_weight=0.25)),
    "keys 8/16, 64×64": by_config(_keys(8, 16, block_size=64)),
    "keys 8/16, 128×64, top-τ": by_config(KEYS.with_settings({"budget": "top_tau"})),
    "keys 8/16, 128×64, threshold and floor": with_floor(KEYS),
    "keys 8/8, 128×64": by_config(_keys(8, 8)),
    "keys 16/16, 128×64": by_config(_keys(16, 16)),
    "true mass, 128×64": oracle_mass(WIDE),
    "true mass": oracle_mass((128, 128)),
    "true displacement, 128×64": oracle_displacement(WIDE),
}
# Thresholds for every layer and head: by what an error does to the prediction, by the error of a layer's output, and by
# one number a head.
OWN_BUDGETS = {
    "best, own budget": (RRConfig.from_preset("best"), True),
    "best and the block before, own budget": (RRConfig.from_preset("best", local_blocks=2), True),
    "best 128×64, own budget": (_both(), True),
    "best 128×64 and the block before, own budget": (_both(local_blocks=2), True),
    "best 128×64, own budget by output": (_both(), False),
    "keys 8/16, 128×64, own budget": (KEYS, True),
}
BY_WEIGHT = "best 128×64, own budget by head weights"
