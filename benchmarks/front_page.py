"""The project's front page: `python -m benchmarks.front_page` writes the tables of README.md from the files of results.

With `--picture` it also draws README's picture, for which it runs the small model once (a minute on a CPU).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import prefill_tables, server_tables
from benchmarks.study import judge_tables
from benchmarks.tables import Row, load, markdown_table, number, replace_between, timed

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
CARD = "NVIDIA H200"  # of which the front page tells; the others are on benchmarks/README.md
WHOLE_MODEL, WHOLE_LENGTH = "llama-8b-shape", 131072
CPU_TOKENS = 2048  # of the shortest prompt on a CPU


class Call(NamedTuple):
    """One row of the speed table: which measured case it shows."""

    what: str
    length: int  # tokens
    label: str
    density: float | None = None  # that the case asked for
    error: float | None = None  # likewise
    timed: str = "in turns"


AS_CALLED = "rr"  # label of a case without a setting
BEST_TRITON = "rr key_stride=32 pool=both block_size=128x64 order=2 variance_weight=0.125 budget=threshold triton"
BEST_FLASH = BEST_TRITON.replace(" block_size=128x64", "").replace("triton", "flash")
SCALED_TRITON, SCALED_FLASH = (label.replace("=threshold", "=scaled_threshold") for label in (BEST_TRITON, BEST_FLASH))
CALLS = (
    Call("default settings", 8192, AS_CALLED),
    Call("default settings", 16384, AS_CALLED),
    Call("`best`, FLASH", 131072, SCALED_FLASH, timed="rested"),
    Call("`best`, blocks of 128×64, Triton", 131072, SCALED_TRITON, timed="rested"),
    Call("`best`, FLASH, threshold for an error of .03", 131072, BEST_FLASH, error=0.03),
    Call("the same", 32768, BEST_FLASH, error=0.03),
)
# What the accuracy table shows -> the judged rule.
RULES_SHOWN = {
    "`rr`, as published": "rr",
    "`fast`": "fast",
    "`best`": "best",
    "`best`, calibrated for the model": "best and the block before, own budget",
    "limit: the true mass": "true mass",
}


def speed_table(rows: Sequence[Row], prefills: Sequence[Row]) -> str:
    """Seven rows of CARD: a layer's attention at several lengths, and a whole model's prefill."""
    heads = ["one layer's attention", "tokens", "density", "output error", "dense, ms", "rr_flex, ms", "faster by"]
    found = [row_of(call, rows) for call in CALLS]
    cells = [
        [
            call.what,
            f"{call.length:,}",
            "1, dense" if row["density"] == 1 else number(row["density"]),
            "–" if row["density"] == 1 else number(row["error"], ".3f"),
            number(row["fastest_dense_ms"], ".1f"),
            number(row["total_ms"], ".1f"),
            f"{row['speedup']:.1f} ×",
        ]
        for call, row in zip(CALLS, found, strict=True)
    ]
    whole = [row for row in prefills if (row["model"], row["length"]) == (WHOLE_MODEL, WHOLE_LENGTH)]
    dense, sparse = (
        next(row for row in whole if row["attention"] == name) for name in ("flash_attention_4", "rr_flex")
    )
    times = [f"{row['ms']:,.0f}" for row in (dense, sparse)]
    shape = "**whole model**, Llama-3.1-8B's shape"
    cells.append([shape, f"{WHOLE_LENGTH:,}", number(sparse["density"]), "–", *times, f"{sparse['speedup']:.1f} ×"])
    return "\n".join(markdown_table(heads, cells)) + "\n"


def row_of(call: Call, rows: Sequence[Row]) -> Row:
    """The last measured of CARD's rows that show this call; timed in turns with the fastest dense kernel."""
    wanted = (call.length, call.label, call.density, call.error)
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 1, "dtype": "bfloat16", "workload": "structured"}
    matching = [
        row
        for row in rows
        if (row["length"], row["label"], row["wanted_density"], row["wanted_error"]) == wanted
        and row["card"] == CARD
        and timed(row) == call.timed
        and all(row[name] == value for name, value in shape.items())
    ]
    if not matching:
        raise SystemExit(f"{RESULTS} must hold a row of {CARD} for {call}, got none")
    return max(matching, key=lambda row: row["date"])


def accuracy_table(found: dict[str, dict[str, list[dict]]]) -> str:
    """What models say under a rule at the same density, and what a layer takes on a card."""
    clock = judge_tables.Clock()
    heads = ["at equal density, .30"]
    heads += [f"{model}: {what}" for model in found for what in ("KL", "same next token")]
    cells = []
    for label, rule in RULES_SHOWN.items():
        row = [label]
        for rules in found.values():
            judged = judge_tables.at(rules[rule])
            row += [f"{judged.mean:.4f}", f"{100 * judged.agreement:.1f} %"]
        timed = f"{clock.ms(rule, judge_tables.DENSITY, 'flash'):.0f}" if rule in judge_tables.TIMED else "–"
        cells.append([*row, timed])
    return "\n".join(markdown_table([*heads, "ms a layer, 128K"], cells)) + "\n"


def cpu_table(results: Path) -> str:
    """How many times torch's dense kernel's time `rr_attention` saves on a CPU, by length and density; mandatory blocks
    alone can be more than was asked for."""
    cells = [row for row in server_tables.load(results) if row["suite"] == "cells" and row["card"].startswith("CPU")]
    cells = [row for row in cells if (row["batch"], row["head_dim"], row["dtype"]) == (1, 64, "float32")]
    whole = [row for row in cells if row["queries"] == row["keys"] >= CPU_TOKENS]
    faster = {(row["keys"], row["wanted_density"]): row for row in whole}
    lengths, densities = (sorted({key[place] for key in faster}) for place in (0, 1))
    table = []
    for length in lengths:
        of_length = [faster[length, density] for density in densities]
        met = [abs(row["density"] - row["wanted_density"]) < 0.03 for row in of_length]
        times = [f"{row['dense_ms'] / row['sparse_ms']:.1f} ×" for row in of_length]
        table.append([f"{length:,} tokens", *(time if there else "–" for time, there in zip(times, met, strict=True))])
    return "\n".join(markdown_table(["on a CPU", *(f"density {density:g}" for density in densities)], table)) + "\n"


def write(readme: Path, results: Path = RESULTS) -> None:
    """Replaces what stands between README's three pairs of markers."""
    sections = {
        "speed": speed_table(load(results), prefill_tables.load(results)),
        "accuracy": accuracy_table(judge_tables.read(results / "judge.jsonl")),
        "cpu": cpu_table(results),
    }
    text = readme.read_text(encoding="utf-8")
    for name, table in sections.items():
        text = replace_between(text, f"<!-- {name}: begin -->", f"<!-- {name}: end -->", table, readme)
    readme.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.front_page", description=__doc__.splitlines()[0])
    parser.add_argument("--picture", action="store_true", help="also draw results/front-page.png, with the small model")
    options = parser.parse_args(arguments)
    write(README)
    if options.picture:
        from benchmarks.front_picture import draw  # with matplotlib and transformers, which the tables do without

        draw(load(RESULTS), RESULTS / "front-page.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
