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
    density_from,
    gain_over,
    group_of,
    kind_of,
    kl_gain,
    of_group,
    over_layers,
    read_records,
)
from benchmarks.tables import markdown_table, replace_between
from rr_flex.evaluation.judging import Record
from rr_flex.evaluation.predictions import Prediction, curve, kl_at, value_at
from rr_flex.evaluation.rules import multiplications
from rr_flex.evaluation.summaries import summarise

ROOT = Path(__file__).parents[2]
STUDY, PAGE = ROOT / "notebooks" / "study.json", ROOT / "notebooks" / "README.md"
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
DENSITIES = (0.25, 0.3, 0.4, 0.5)
SHOWN = {
    "rr": "published RR, τ",
    "order 2 128×64, threshold": "order 2, 128×64, one threshold",
    FAST: '`preset="fast"`',
    BEST: '`preset="best"`',
    "best 128×128": '`preset="best"`, 128×128',
    "both, order 2, 8/32": '`preset="best"`, `variance_weight=0.5`',
    "oracle mass": "oracle: true mass, 128×128",
    "oracle mass 128×64": "oracle: true mass, 128×64",
}
BY_LAYER = ("prose1", "code1")  # texts of which the file has every layer, of the rules above
# Rules of which it has, on held-out texts, both definitions of equal density: every layer's, and all layers' together.
BOTH_SCOPES = ("rr", "order 2", "order 2 128×64", "order 2 128×64, threshold")
BOTH_SCOPES += (BEST, "oracle mass", "oracle mass 128×64")
PREDICTED = {
    "rr": "published RR, τ",
    FAST: '`preset="fast"`',
    BEST: '`preset="best"`',
    "both, order 2, 8/32": '`preset="best"`, `variance_weight=0.5`',
    "best, every layer at the density": '`preset="best"`, `budget="density"`',
    "best, calibrated": '`preset="best"`, calibrated profile',
    "oracle mass 128×64": "oracle: true mass, 128×64",
}
NAMES = {
    "ten layers": "ten layers, prose and code",
    "held out": "all texts",
    "flatter": "all texts, flatter attention",
    "structured": "structured",
}
LENGTHS = (8192, 4096, 2048)  # whose predictions the page tells of, measured or not
PREDICTED_AT = (0.3, 0.4, 0.5, 0.6)
AGREEMENT, PERPLEXITY = 0.99, 1.005  # what the predictions should reach
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


def gain_table(records: Sequence[Record]) -> str:
    """How much lower than published RR's the error is, by group and kind, and the share of the gap to the oracle.

    A dash: not measured.
    """
    measured = {record.rule for record in records}
    kinds = list(dict.fromkeys(kind_of(r.text) for r in records if group_of(r.text) == "held out"))
    named = [(NAMES[group], of_group(group)) for group in groups_of(records)]
    named += [(kind, lambda text, kind=kind: group_of(text) == "held out" and kind_of(text) == kind) for kind in kinds]
    rows = []
    for name, texts in named:
        row = [name]
        for rule in (FAST, BEST):
            if rule not in measured:
                row += ["–"] * len(DENSITIES)
                continue
            row += [percent(gain_over(records, rule, "rr", d, scope="layer", texts=texts)) for d in DENSITIES]
        for density in (0.3, 0.5):
            to_oracle = {"scope": "layer", "texts": texts, "oracle": "oracle mass 128×64"}
            row.append(percent(gain_over(records, BEST, "rr", density, **to_oracle)) if BEST in measured else "–")
        rows.append(row)
    heads = [f"{rule} {density:.2f}".replace("0.", ".") for rule in ("fast", "best") for density in DENSITIES]
    return "\n".join(markdown_table(["", *heads, "of the gap, .30", ".50"], rows))


def percent(interval) -> str:
    return f"{100 * interval.mean:.0f} %"


def prediction_table(predictions: Sequence[Prediction]) -> str:
    """By rule, mean over texts: what is predicted at densities, and the density from which it is as good as dense."""
    texts = list(dict.fromkeys(each.text for each in predictions))
    rows = []
    for rule, label in PREDICTED.items():

        def at(measure: str, density: float, rule: str = rule) -> float | None:
            read = kl_at if measure == "kl" else value_at
            values = [read(curve(predictions, rule, text, measure), density) for text in texts]
            return None if None in values else sum(values) / len(values)

        cells = [(at("kl", density), ".4f", 0) for density in PREDICTED_AT]
        cells += [(at("agreement", density), ".1%", 0) for density in PREDICTED_AT[::2]]
        cells += [(at("perplexity_ratio", density), "+.1%", 1) for density in PREDICTED_AT[::2]]
        row = [label, *("–" if x is None else format(x - less, form).replace("%", " %") for x, form, less in cells)]
        for measure, least in (("agreement", AGREEMENT), ("perplexity_ratio", PERPLEXITY)):
            row.append(mean_density(predictions, rule, texts, measure, least))
        rows.append(row)
    heads = [f"KL at {density:.2f}".replace("0.", ".") for density in PREDICTED_AT]
    heads += [
        f"{what} at {x:.2f}".replace("0.", ".") for what in ("agreement", "perplexity") for x in PREDICTED_AT[::2]
    ]
    return "\n".join(markdown_table(["", *heads, "agreement ≥ 99 % from", "perplexity within .5 % from"], rows))


def mean_density(predictions: Sequence[Prediction], rule: str, texts: Sequence[str], measure: str, least: float) -> str:
    """A dash where the highest level reaches it, but from where on was not measured closely enough."""
    found, reached_last = [], False
    for text in texts:
        points = curve(predictions, rule, text, measure)
        if measure == "perplexity_ratio":
            points, least_value = [(x, -abs(y - 1)) for x, y in points], -(least - 1)
        else:
            least_value = least
        found.append(density_from(points, least_value))
        reached_last |= bool(points) and points[-1][1] >= least_value
    reached = [x for x in found if x is not None]
    if not reached:
        return "–" if reached_last else "not reached"
    mean = f"{sum(reached) / len(reached):.2f}"
    return mean if len(reached) == len(found) else f"{mean} ({len(reached)} of {len(found)} texts)"


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


def calibration_gains(predictions: Sequence[Prediction]) -> str:
    """How much lower the divergence of calibrated thresholds is than that of one for all, at equal density."""
    texts = list(dict.fromkeys(each.text for each in predictions))
    found = []
    for density in PREDICTED_AT:
        gain = kl_gain(predictions, "best, calibrated", BEST, density, texts)
        if gain is not None:
            at = f"{density:.2f}".replace("0.", ".")
            found.append(f"{100 * gain.mean:.0f} % at density {at} ({100 * gain.low:.0f} to {100 * gain.high:.0f})")
    return "; ".join(found) or "not measured"


def prediction_parts(study: StudyFile, length: int) -> list[str]:
    if length not in study.predictions:
        return [f"What SmolLM2 predicts at {length:,} tokens: not measured."]
    predictions = study.predictions[length]
    texts = list(dict.fromkeys(each.text for each in predictions))
    parts = [
        f"What SmolLM2 predicts at {length:,} tokens, mean over held-out texts ({', '.join(texts)}; "
        f"{where(study.about['predictions'][str(length)])}):",
        prediction_table(predictions),
        "KL of the calibrated profile below that of one threshold for all at the same density, mean over texts "
        f"(95 % interval): {calibration_gains(predictions)}.",
    ]
    rounded = [each for each in predictions if each.rule == "dense, bfloat16"]
    if rounded:
        kl, agreement = (sum(getattr(x, name) for x in rounded) / len(rounded) for name in ("kl", "agreement"))
        parts.append(f"For scale, the dense model in bfloat16: KL {kl:.4f}, agreement {100 * agreement:.1f} %.")
    return parts


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
        "How much lower that is than for published RR, and the part of the gap to the oracle that `best` closes (above "
        "100: better than the oracle of true mass, which does not look at values):",
        gain_table(study.records),
    ]
    for length in LENGTHS:
        parts += prediction_parts(study, length)
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
