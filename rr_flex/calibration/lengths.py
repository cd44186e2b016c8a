"""Prompts longer than the texts: what thresholds are multiplied by there, to keep a density.

Two things change. Mandatory blocks become fewer, which geometry tells; and shares of a row become smaller, as a power
of the length that a text and its first half show: the rows of its beginning are those of a shorter prompt.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rr_flex.calibration.measured_curves import Curves
from rr_flex.config import RRConfig
from rr_flex.evaluation.equal_density import visible_and_mandatory
from rr_flex.geometry import ceil_div

LEFT = 0.04  # of the blocks that a target must leave to choose, beside the mandatory ones, for a factor to mean much
FARTHEST = 1 << 20  # tokens


def length_factors(
    curves: Curves, thresholds: dict[int, list[float]], config: RRConfig, density: float, longest: int
) -> dict[int, float]:
    """Tokens -> factor with which the thresholds keep `density` of the blocks: for `longest`, as long as all texts of
    the curves, and for its doubles up to FARTHEST."""
    own, share = _over(curves, thresholds, config, longest), _share_to_choose(longest, config, density)
    # The power over all blocks but those that are mandatory by default: of a short half no other may be left.
    plain = config.with_settings({"local_blocks": 1})
    whole, half = (_at(_over(curves, thresholds, plain, length), share) for length in (longest, longest // 2))
    power = math.log2(half / whole)
    found = {longest: _at(own, share)}
    length = 2 * longest
    while length <= FARTHEST:
        found[length] = _at(own, _share_to_choose(length, config, density)) * (length / longest) ** -power
        length *= 2
    return found


def own_factor(
    curves: Curves, thresholds: dict[int, list[float]], config: RRConfig, density: float, length: int
) -> float:
    """With which the thresholds keep the density of the curves' own texts, of `length` tokens: they are few numbers."""
    return _at(_over(curves, thresholds, config, length), _share_to_choose(length, config, density))


def _over(
    curves: Curves, thresholds: dict[int, list[float]], config: RRConfig, length: int
) -> Float[Tensor, " blocks"]:
    """How many times its threshold the share of each block is that is left to choose, descending."""
    rows, columns = (ceil_div(length, size) for size in config.block_sizes)
    visible, mandatory = (
        x[0, 0] for x in visible_and_mandatory(length, config.block_sizes, torch.device("cpu"), config.local_blocks)
    )
    free = visible & ~mandatory
    over = [
        (shares[:, :rows, :columns] / torch.tensor(thresholds[layer])[:, None, None])[:, free].flatten()
        for text in curves.shares
        for layer, shares in text.items()
    ]
    return torch.cat(over).sort(descending=True).values


def _at(over: Float[Tensor, " blocks"], share: float) -> float:
    """Between the last of so large a share and the first beyond: thresholds are exclusive."""
    place = min(max(round(share * len(over)), 0), len(over))
    pair = over[[max(place - 1, 0), min(place, len(over) - 1)]]
    return pair.mean().clamp(min=1e-12).item() if place else 2 * over[0].item()


def _share_to_choose(length: int, config: RRConfig, density: float) -> float:
    """Of the blocks that are not mandatory, those to keep for the density."""
    fixed = _mandatory_share(length, config)
    return (density - fixed) / (1 - fixed)


def leaves_room(length: int, config: RRConfig, density: float) -> bool:
    """Whether mandatory blocks leave LEFT of all to choose."""
    return _mandatory_share(length, config) + LEFT <= density


def _mandatory_share(length: int, config: RRConfig) -> float:
    """In closed form: the sink, the blocks near the diagonal and the last row, of all that is visible."""
    q_block, k_block = config.block_sizes
    rows = ceil_div(length, q_block)
    seen = [ceil_div(min((row + 1) * q_block, length), k_block) for row in range(rows)]
    near = config.sink_blocks + ceil_div(q_block, k_block) + config.local_blocks - 1
    return (sum(min(near, each) for each in seen[:-1]) + seen[-1]) / sum(seen)
