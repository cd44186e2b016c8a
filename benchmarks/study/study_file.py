"""The study's results as one file, and what is read off them: gains over a baseline, groups of texts."""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rr_flex.evaluation.judging import Record
from rr_flex.evaluation.predictions import WIDEST_GAP, Prediction, curve, kl_at
from rr_flex.evaluation.summaries import Interval, over_texts


def density_from(points: Sequence[tuple[float, float]], least: float) -> float | None:
    """The density from which on the measure stays at or above `least`, linear between neighbours.

    None if never, and if it gets there between two levels more than WIDEST_GAP apart.
    """
    found = None
    for (low, below), (high, above) in reversed(list(itertools.pairwise(points))):
        if above < least:
            return found
        if below < least:
            if above == least:
                return high
            return low + (high - low) * (least - below) / (above - below) if high - low <= WIDEST_GAP else None
        found = low
    return found


def gain_over(
    records: Iterable[Record],
    rule: str,
    baseline: str,
    density: float,
    *,
    scope: str,
    texts: Callable[[str], bool] = lambda text: True,
    oracle: str | None = None,
) -> Interval:
    """1 − error of the rule / error of the baseline, paired by text: the mean over texts, with its interval.

    With an oracle: the share of the baseline's error above the oracle's that the rule removes.
    """
    errors: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if record.scope == scope and record.density == density and record.rule in (rule, baseline, oracle):
            errors.setdefault((record.text, record.rule), []).append(record.error)
    found = {}
    # Means, since a file may have one rule's layers apart and another's as their mean.
    means = {label: sum(values) / len(values) for label, values in errors.items()}
    for text in sorted({text for text, _ in errors if texts(text)}):
        own, published = means[text, rule], means[text, baseline]
        floor = 0.0 if oracle is None else means[text, oracle]
        found[text] = [(published - own) / (published - floor)]
    return over_texts(found)


def over_layers(records: Iterable[Record]) -> list[Record]:
    """Each measure's mean over layers, as records whose layer is −1."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault((record.rule, record.scope, record.density, record.text), []).append(record)
    means = {
        label: [sum(values) / len(values) for values in zip(*(record[5:] for record in each), strict=True)]
        for label, each in found.items()
    }
    return [Record(*label, -1, *(round(x, 6) for x in row)) for label, row in means.items()]


def kl_gain(
    predictions: Sequence[Prediction], rule: str, baseline: str, density: float, texts: Iterable[str]
) -> Interval | None:
    """1 − divergence of the rule / divergence of the baseline at a density, paired by text, with its interval.

    None if a text has no measured levels on both sides of the density.
    """
    gains = {}
    for text in texts:
        pair = [kl_at(curve(predictions, each, text, "kl"), density) for each in (rule, baseline)]
        if None in pair:
            return None
        gains[text] = [1 - pair[0] / pair[1]]
    return over_texts(gains)


def group_of(text: str) -> str:
    """What a text of the study is for: "tuned on", "held out", "flatter" (held out, logits halved), "ten layers" (held
    out, where the others have fewer), "structured", that "tuned on", or the length of a shorter one."""
    if text.startswith("ten layers"):
        return "ten layers"
    if text.startswith("structured"):
        return "structured" if not text.startswith("structured0") else "structured, tuned on"
    if text.startswith("flatter"):
        return "flatter"
    length = text.rpartition("-")[2]
    if length.isdigit():
        return length
    return "tuned on" if text.endswith("0") else "held out"


def kind_of(text: str) -> str:
    return text.rstrip("0123456789")


def of_group(group: str) -> Callable[[str], bool]:
    return lambda text: group_of(text) == group


WORDS = ("rule", "scope", "text")  # columns of few different words, stored once each


class StudyFile(NamedTuple):
    """What `python -m benchmarks.study` found, as one file."""

    about: dict[str, Any]  # model, device, versions, seconds
    records: list[Record]
    predictions: dict[int, list[Prediction]]  # by length

    def write(self, path: Path) -> None:
        columns = {"records": to_columns(Record, self.records)}
        found = {length: to_columns(Prediction, runs) for length, runs in self.predictions.items()}
        document = {"about": self.about, **columns, "predictions": found}
        path.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "StudyFile":
        document = json.loads(path.read_text(encoding="utf-8"))
        predictions = {int(length): of_columns(Prediction, x) for length, x in document["predictions"].items()}
        return cls(document["about"], of_columns(Record, document["records"]), predictions)


def to_columns(kind: type, rows: Sequence) -> dict[str, list]:
    """Rows (Record or Prediction) by column, so that thousands stay small."""
    columns: dict[str, list] = {name: [getattr(row, name) for row in rows] for name in names_of(kind)}
    for name in WORDS:
        if name in columns:
            words = list(dict.fromkeys(columns[name]))
            number = {word: index for index, word in enumerate(words)}
            columns[name] = [number[word] for word in columns[name]]
            columns[f"{name}s"] = words
    return columns


def of_columns(kind: type, columns: dict[str, list]) -> list:
    columns = dict(columns)
    for name in WORDS:
        if name in columns:
            columns[name] = [columns[f"{name}s"][index] for index in columns[name]]
    return [kind(*row) for row in zip(*(columns[name] for name in names_of(kind)), strict=True)]


def names_of(kind: type) -> tuple[str, ...]:
    return tuple(kind.__annotations__)


def write_records(path: Path, records: Sequence[Record]) -> None:
    path.write_text(json.dumps(to_columns(Record, records), ensure_ascii=False) + "\n", encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    return of_columns(Record, json.loads(path.read_text(encoding="utf-8")))
