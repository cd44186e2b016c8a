"""What a model predicts under a budget, read off at a density: between the levels that were run."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDEST_GAP = 0.25  # of density between two levels; what lies inside a wider one was not measured


@dataclass(frozen=True)
class Prediction:
    """One run of the model, compared with the dense model as it was loaded."""

    rule: str  # "dense" for the quantised model without sparsity
    text: str
    level: float | None  # τ, threshold or density
    density: float
    kl: float  # nats a token
    agreement: float  # share of positions with the same most likely next token
    perplexity_ratio: float


def curve(predictions: Iterable[Prediction], rule: str, text: str, measure: str) -> list[tuple[float, float]]:
    """(density, measure) of a rule's levels on a text, ascending."""
    return sorted((x.density, getattr(x, measure)) for x in predictions if (x.rule, x.text) == (rule, text))


def between(points: Sequence[tuple[float, float]], density: float) -> tuple[float, float, float] | None:
    """The measure at the levels below and above a density, and the share of the way from the first to the second.

    None outside of what was measured, and between levels more than WIDEST_GAP apart.
    """
    for (low, below), (high, above) in itertools.pairwise(points):
        if density in (low, high):
            return below, above, float(density == high)
        if low < density < high:
            return (below, above, (density - low) / (high - low)) if high - low <= WIDEST_GAP else None
    return None


def kl_at(points: Sequence[tuple[float, float]], density: float) -> float | None:
    """The divergence at a density, log-linear between neighbours at most WIDEST_GAP apart; None elsewhere.

    Linear where one of them is rounded to 0 or below.
    """
    found = between(points, density)
    if found is None:
        return None
    below, above, share = found
    if min(below, above) <= 0:
        return value_at(points, density)
    return below ** (1 - share) * above**share


def value_at(points: Sequence[tuple[float, float]], density: float) -> float | None:
    """The measure at a density, linear between neighbours at most WIDEST_GAP apart; None elsewhere."""
    found = between(points, density)
    if found is None:
        return None
    below, above, share = found
    return below + (above - below) * share
