"""What a rule is that `judging` compares: the library's own settings, and the oracle that knows the true mass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rr_flex.config import RRConfig
from rr_flex.evaluation.equal_density import Spending
from rr_flex.evaluation.plain import plain_selection
from rr_flex.evaluation.true_mass import true_block_mass

Weigh = Callable[["Case"], Float[Tensor, "B Hq nQ nK"]]


@dataclass(frozen=True)
class Case:
    """A prefill, causal, with equally long q and k, of one or more layers: they are the batch."""

    q: Float[Tensor, "B Hq L D"]
    k: Float[Tensor, "B Hkv L D"]
    v: Float[Tensor, "B Hkv L D"]
    layers: Sequence[int] = (0,)


@dataclass(frozen=True)
class Rule:
    weigh: Weigh
    block_size: tuple[int, int]
    spending: Spending
    config: RRConfig | None = None  # the settings, where the rule is the library's own


def configured(**settings) -> Rule:
    """The library's own mass for these settings of RRConfig; its budget says how to spend, its level is not used."""
    config = RRConfig().with_settings(settings)

    def weigh(case: Case) -> Tensor:
        return plain_selection(case.q, case.k, config=config).mass

    return Rule(weigh, config.block_sizes, config.budget, config)


def true_mass(size: tuple[int, int], spending: Spending = "threshold") -> Rule:
    """Oracle: the exact mass of every query and key."""
    return Rule(lambda case: true_block_mass(case.q, case.k, block_size=size), size, spending)


PUBLISHED, WIDE = (128, 128), (128, 64)
BEST = "best 128×64"
FAST = "both, order 1, 8/32"

# What `rr-flex evaluate` offers.
RULES: dict[str, Rule] = {
    "rr": configured(),
    "rr, threshold": configured(budget="threshold"),
    "order 2, threshold": configured(order=2, budget="threshold"),
    "order 2 128×64, threshold": configured(order=2, block_size=WIDE, budget="threshold"),
    FAST: configured(pool="both", key_stride=32, block_size=WIDE, budget="threshold"),
    BEST: configured(preset="best", block_size=WIDE),
    "both, order 1, 8/32 128×128": configured(pool="both", key_stride=32, budget="threshold"),
    "best 128×128": configured(preset="best"),
    "fast": configured(preset="fast"),
    "oracle mass": true_mass(PUBLISHED),
    "oracle mass 128×64": true_mass(WIDE),
}
