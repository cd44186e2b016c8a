"""Means over texts, with their intervals."""

import math
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rr_flex.evaluation.judging import Record


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def over_texts(values: dict[str, Sequence[float]], draws: int = 1000, seed: int = 0) -> Interval:
    """Mean over texts of each text's mean, with the 95 % interval of a bootstrap that draws whole texts."""
    means = [sum(each) / len(each) for each in values.values()]
    drawn = random.Random(seed)
    again = sorted(sum(drawn.choices(means, k=len(means))) / len(means) for _ in range(draws))
    return Interval(sum(means) / len(means), again[int(0.025 * draws)], again[math.ceil(0.975 * draws) - 1])


def summarise(records: Iterable[Record], measure: str = "error") -> dict[str, dict[float, Interval]]:
    """By rule and density: the measure's mean over layers and texts, with an interval over texts."""
    found: dict[tuple[str, float], dict[str, list[float]]] = {}
    for record in records:
        by_text = found.setdefault((record.rule, record.density), {})
        by_text.setdefault(record.text, []).append(getattr(record, measure))
    summary: dict[str, dict[float, Interval]] = {}
    for (rule, density), by_text in found.items():
        summary.setdefault(rule, {})[density] = over_texts(by_text)
    return summary
