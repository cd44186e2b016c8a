"""Selection rules at equal density on the structured workload: `python -m benchmarks.study.accuracy --json FILE`.

A seed is a text of one layer; rules are those of `rr_flex.evaluation.judging`. Runs on a GPU if there is one.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.study.every_rule import BEST, FAST, RULES
from benchmarks.study.study_file import write_records
from benchmarks.workloads import Shape, structured
from rr_flex.evaluation.judging import Record, judge_text
from rr_flex.evaluation.rules import Rule
from rr_flex.evaluation.summaries import summarise

COMPARED = (
    "rr",
    "rr, threshold",
    "rr 128×64, threshold",
    "order 2",
    "order 2 128×64, threshold",
    "order 2 128×64, threshold, strides 16/8",
    "pooled queries, order 2",
    "pooled queries (64), order 2",
    FAST,
    BEST,
    "both, order 1, 16/16",
    "both, order 2, 16/16",
    "both, order 2, 8/8",
    "both, order 1, 8/32 128×128",
    "best 128×128",
    "best, top-τ",
    "oracle mass",
    "oracle mass 128×64",
    "oracle displacement 128×64",
)


def judge_structured(seed: int, length: int, heads: int, rules: dict[str, Rule], device: torch.device) -> list[Record]:
    """The rules on one layer of the structured workload, four query heads to a key head, head dim 128."""
    inputs = structured(Shape(length, heads, heads // 4, 128), dtype=torch.float32, device=device, seed=seed)
    with torch.no_grad():
        return judge_text(f"structured{seed}-{length}", {0: tuple(inputs)}, rules, scopes=("layer",))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8, help="query heads, four to a key head")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="seed 0 is what rules were chosen on")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records = []
    for seed in arguments.seeds:
        rules = {rule: RULES[rule] for rule in COMPARED}
        records += judge_structured(seed, arguments.length, arguments.heads, rules, device)
        write_records(arguments.json, records)
        for rule, row in summarise(
            records, scope="layer", texts=lambda text: text.endswith(str(arguments.length))
        ).items():
            print(
                f"seeds to {seed}  {rule:42}" + "".join(f"{row[density].mean:9.4f}" for density in sorted(row)),
                flush=True,
            )


if __name__ == "__main__":
    main()
