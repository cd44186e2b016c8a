"""What a model predicts under a budget, read off at a density: between the levels that were run."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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


def kl_at(points: Sequence[tuple[float, float]], density: float) -> float | None:
    """The divergence at a density, log-linear between neighbours; None outside of what was measured."""
    for (low, below), (high, above) in itertools.pairwise(points):
        if low <= density <= high:
            share = 0.0 if high == low else (density - low) / (high - low)
            return math.exp((1 - share) * math.log(below) + share * math.log(above))
    return None


def value_at(points: Sequence[tuple[float, float]], density: float) -> float | None:
    """The measure at a density, linear between neighbours; None outside of what was measured."""
    for (low, below), (high, above) in itertools.pairwise(points):
        if low <= density <= high:
            return above if high == low else below + (above - below) * (density - low) / (high - low)
    return None


def density_from(points: Sequence[tuple[float, float]], least: float) -> float | None:
    """The density from which on the measure stays at or above `least`, linear between neighbours; None if never."""
    found = None
    for (low, below), (high, above) in reversed(list(itertools.pairwise(points))):
        if above < least:
            return found
        if below < least:
            return high if above == below else low + (high - low) * (least - below) / (above - below)
        found = low
    return found
