"""The accuracy study as tables: `python -m benchmarks.study.study_tables [RAW_DIR ...]` writes notebooks/README.md's.

Folders that `benchmarks.study` wrote go into notebooks/study.json first: predictions of a length take the place of the
file's at that length, errors (means over layers) that of the file's if they are of all its texts.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.every_rule import BEST, FAST, RULES
from benchmarks.study.study_file import (
    StudyFile,
    group_of,
    of_group,
    over_layers,
    read_records,
)
from benchmarks.tables import markdown_table, replace_between
from rr_flex.evaluation.judging import Record
from rr_flex.evaluation.predictions import Prediction
from rr_flex.evaluation.rules import multiplications
from rr_flex.evaluation.summaries import summarise

ROOT = Path(__file__).parents[2]
STUDY, PAGE = ROOT / "notebooks" / "study.json", ROOT / "notebooks" / "README.md"
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
DENSITIES = (0.25, 0.3, 0.4, 0.5)
SHOWN = {
    "rr": "published RR, τ",
    "order 2 128×64, threshold": "order 2, 128×64, one threshold",
    FAST: "both, order 1, 8/32, 128×64",
    "best 128×128": '`preset="best"`',
    BEST: "best 128×64",
    "both, order 2, 8/32": "best 128×64, `variance_weight=0.5`",
    "oracle mass": "oracle: true mass, 128×128",
    "oracle mass 128×64": "oracle: true mass, 128×64",
}
BY_LAYER = ("prose1", "code1")  # texts of which the file has every layer, of the rules above
# Rules of which it has, on held-out texts, both definitions of equal density: every layer's, and all layers' together.
BOTH_SCOPES = ("rr", "order 2", "order 2 128×64", "order 2 128×64, threshold")
BOTH_SCOPES += (BEST, "oracle mass", "oracle mass 128×64")
NAMES = {
    "ten layers": "ten layers, prose and code",
    "held out": "all texts",
    "flatter": "all texts, flatter attention",
    "structured": "structured",
}
RUN = ("device", "torch", "transformers", "python", "commit", "date")  # of `about`: what made the figures


def groups_of(records: Sequence[Record]) -> list[str]:
    """What there is of the groups that tables show, in their order."""
    found = {group_of(record.text) for record in records}
    return [group for group in ("ten layers", "held out", "flatter", "structured") if group in found]


def error_table(records: Sequence[Record]) -> str:
    """Output error by rule and density, four columns a group of texts."""
    named = [group for group in groups_of(records) if group != "flatter"]
    groups = [summarise(records, scope="layer", texts=of_group(each)) for each in named]
    rows = []
    for rule, label in SHOWN.items():
        config = RULES[rule].config
        cost = "–" if config is None else f"{multiplications(config):.3g}"
        found = (group.get(rule, {}).get(density) for group in groups for density in DENSITIES)
        cells = ("–" if interval is None else f"{interval.mean:.3f}" for interval in found)
        rows.append([label, cost, *cells])
    heads = [f"{NAMES[name]}: {DENSITIES[0]}".replace("0.", ".") for name in named]
    columns = [head for first in heads for head in (first, *(f"{density:.2f}"[1:] for density in DENSITIES[1:]))]
    return "\n".join(markdown_table(["", "multiplications", *columns], rows))


def condense(folder: Path) -> StudyFile:
    """The raw results as means over layers, but for the tables' rules on BY_LAYER; every layer at the density, and for
    BOTH_SCOPES also all layers together."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    predictions: dict[int, list[Prediction]] = {}
    for row in json.loads((folder / "predictions.json").read_text(encoding="utf-8")):
        length = row.pop("length")
        row |= {name: round(row[name], 6) for name in ("density", "agreement", "perplexity_ratio")}
        row["kl"] = float(f"{row['kl']:.6g}")  # some are below a millionth, and are read log-linearly
        predictions.setdefault(length, []).append(Prediction(**row))
    shown, others = [], []
    for record in read_records(folder / "records.json"):
        if record.scope == "layer":
            (shown if record.rule in SHOWN and record.text in BY_LAYER else others).append(record)
        elif record.rule in BOTH_SCOPES and group_of(record.text) == "held out":
            others.append(record)
    about["predictions"] = {str(length): {name: about[name] for name in RUN} for length in predictions}
    return StudyFile(about, shown + over_layers(others), predictions)


def judged_texts(study: StudyFile) -> set[str]:
    """Those of which the tables tell; "ten layers" of a text are left to a run that has them for every text."""
    return {x.text for x in study.records if group_of(x.text) in NAMES and group_of(x.text) != "ten layers"}


def merge(study: StudyFile, new: StudyFile) -> StudyFile:
    """`study` with the predictions of `new` at its lengths, and with its errors if they are of all texts and more."""
    runs = study.about.get("predictions", {}) | new.about["predictions"]
    errors = new if new.records and judged_texts(new) >= judged_texts(study) else study
    return StudyFile(errors.about | {"predictions": runs}, errors.records, study.predictions | new.predictions)


def where(run: dict) -> str:
    return f"{run['device']}, torch {run['torch']}, Python {run['python']}, {run['date']}"


def layers_told(about: dict) -> str:
    """Which layers the groups of texts have, and the size of the structured workload."""
    told = f"Layers of each text: {', '.join(map(str, about['layers']))}"
    if "ten layers" in about:
        told += f'; "ten layers": {", ".join(map(str, about["ten layers"]))}'
    length, heads = about["structured"]
    return f"{told}. Structured: {length:,} tokens, {heads} heads of 128, two seeds."


def section(study: StudyFile) -> str:
    parts = [
        f"Output error at equal density in every layer ({where(study.about)}):",
        layers_told(study.about),
        error_table(study.records),
    ]
    return "\n\n".join(parts)


def replace_section(text: str, new: str) -> str:
    return replace_between(text, BEGIN, END, f"{new}\n", PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.study_tables", description=__doc__.splitlines()[0]
    )
    parser.add_argument("raw", type=Path, nargs="*", metavar="RAW_DIR")
    study = StudyFile.read(STUDY)
    for folder in parser.parse_args().raw:
        new = condense(folder)
        merged = merge(study, new)
        if new.records and merged.records is study.records:
            print(f"{folder}: errors left out, without {sorted(judged_texts(study) - judged_texts(new))}")
        study = merged
    study.write(STUDY)
    PAGE.write_text(replace_section(PAGE.read_text(encoding="utf-8"), section(study)), encoding="utf-8")
    print(section(study))


if __name__ == "__main__":
    main()
