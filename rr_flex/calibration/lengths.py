"""One profile for all lengths: what its thresholds are multiplied by in a shorter prompt, so that density holds.

A block's share of its row falls as rows grow longer, in all heads alike (measured: about as L^-1.4, see the study).
The rows of a prompt's beginning are those of a shorter prompt, since attention is causal: so one prefill tells of every
shorter length too.
"""

import torch

from rr_flex.calibration.measured_curves import Curves
from rr_flex.config import RRConfig
from rr_flex.evaluation.equal_density import visible_and_mandatory
from rr_flex.geometry import ceil_div

LEFT = 0.04  # of the blocks that a target must leave to choose, beside the mandatory ones, for a factor to mean much


def length_factors(
    curves: Curves, thresholds: dict[int, list[float]], config: RRConfig, density: float, longest: int
) -> dict[int, float]:
    """Tokens -> factor with which the thresholds keep `density` of the blocks, for `longest` and those of its halves in
    which mandatory blocks leave LEFT of them to choose.

    `config` has the default mandatory blocks; all texts of the curves are `longest` tokens.
    """
    found = {longest: _factor(curves, thresholds, config, density, longest)}
    length = longest // 2
    while _mandatory_share(length, config) + LEFT <= density < 1:
        found[length] = _factor(curves, thresholds, config, density, length)
        length //= 2
    return dict(sorted(found.items()))


def _mandatory_share(length: int, config: RRConfig) -> float:
    visible, mandatory = visible_and_mandatory(length, config.block_sizes, torch.device("cpu"))
    return (mandatory.sum() / visible.sum()).item()


def _factor(curves: Curves, thresholds: dict[int, list[float]], config: RRConfig, density: float, length: int) -> float:
    rows, columns = (ceil_div(length, size) for size in config.block_sizes)
    visible, mandatory = (x[0, 0] for x in visible_and_mandatory(length, config.block_sizes, torch.device("cpu")))
    free = visible & ~mandatory
    over = [  # how many times its threshold a block's share is
        (shares[:, :rows, :columns] / torch.tensor(thresholds[layer])[:, None, None])[:, free].flatten()
        for text in curves.shares
        for layer, shares in text.items()
    ]
    ordered = torch.cat(over).sort(descending=True).values
    wanted = (density * visible.sum() - mandatory.sum()) / free.sum().clamp(min=1)  # of the blocks left to choose
    place = round(wanted.item() * len(ordered))
    # The threshold is exclusive: between the last block that is kept and the first that is not.
    pair = ordered[[max(place - 1, 0), min(max(place, 0), len(ordered) - 1)]]
    return pair.mean().clamp(min=1e-12).item() if place > 0 else 2 * ordered[0].item()
