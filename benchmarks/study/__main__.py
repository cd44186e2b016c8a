"""The accuracy study: `python -m benchmarks.study --out DIR`, on a GPU if there is one.

What SmolLM2 predicts at each budget, on texts of five kinds and at several lengths; then rules at equal density on its
own q, k and v, the same with flatter attention, and the structured workload. Work is cut into tasks, the most telling
first: predictions at the first length, then what the tables show, then all rules. What does not fit into
--budget-seconds is left out, and named in about.json. `benchmarks.study.study_tables` puts the folders of several runs
together.
"""

import argparse
import dataclasses
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.environment import describe
from benchmarks.study.every_rule import RULES
from benchmarks.study.parts import HELD_OUT_PARTS, SHORT_RULES, TABLED, TUNING_PART, Study
from benchmarks.study.study_file import write_records
from rr_flex.evaluation.texts import KINDS
from rr_flex.models.loading import EMBEDDED_MODEL, load_causal_lm

LENGTHS = (8192, 2048, 4096)
PARTS = ("predictions", "tables", "errors")  # "tables": errors of the few rules that tables show
FIRST_GUESS = 10.0  # seconds of a task of a kind that has not run yet


class Task(NamedTuple):
    name: str
    like: str  # tasks that take about as long
    run: Callable[[], None]


def tasks_of(study: Study, lengths: Sequence[int], structured: tuple[int, int], parts: Sequence[str]) -> list[Task]:
    """The most telling first; `structured`: that workload's length and query heads."""
    full, *others = lengths
    first, second = HELD_OUT_PARTS
    tasks: list[Task] = []

    def calibrate(length: int) -> None:
        tasks.append(Task(f"calibrate {length}", f"calibrate {length}", lambda: study.calibrate(length)))

    def predict(part: int, length: int) -> None:
        for kind in study.kinds:
            name = f"predict {kind}{part} {length}"
            tasks.append(Task(name, f"predict {length}", lambda kind=kind: study.predict(kind, part, length)))

    def errors(part: int, length: int, rules: Sequence[str]) -> None:
        for kind in study.kinds:
            name, like = f"errors {kind}{part} {length}, {len(rules)} rules", f"errors {length}, {len(rules)} rules"
            tasks.append(Task(name, like, lambda kind=kind: study.errors(kind, part, length, rules)))

    def synthetic(seed: int, rules: Sequence[str]) -> None:
        like = f"structured, {len(rules)} rules"
        tasks.append(Task(f"{like}, seed {seed}", like, lambda: study.structured(seed, *structured, rules)))

    calibrate(full)
    if "predictions" in parts:
        predict(first, full)
    if "tables" in parts:
        errors(first, full, TABLED)
        errors(second, full, TABLED)
        synthetic(1, TABLED)
        synthetic(2, TABLED)
    if "predictions" in parts:
        predict(second, full)
        for length in others:
            calibrate(length)
            predict(first, length)
            predict(second, length)
    if "errors" in parts:
        for part in (first, second, TUNING_PART):
            errors(part, full, tuple(RULES))
        for length in others:
            errors(first, length, SHORT_RULES)
        for seed in (1, 2, 0):
            synthetic(seed, SHORT_RULES)
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face name, a folder or a .gguf file [SmolLM2-135M-Instruct]")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="from the start [no limit]")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS", help="[%(default)s]")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=tuple(KINDS), help="of text [all]")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of N levels of a budget one [%(default)s]")
    parser.add_argument("--only", choices=PARTS, help="leave the rest out")
    parser.add_argument("--smoke", action="store_true", help="code only, 1,024 and 512 tokens, two layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="named in the results where there is no git history")
    arguments = parser.parse_args()
    start = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_causal_lm(arguments.model, device=arguments.device)
    where = torch.device(arguments.device)
    parts = PARTS if arguments.only is None else (arguments.only,)
    if arguments.smoke:
        lengths = (1024, 512)
        study = Study(where, model, tokenizer, ("code",), lengths[0], (2, 5), every=10)
        workload = (2048, 8)
    else:
        lengths = arguments.lengths
        study = Study(where, model, tokenizer, arguments.kinds, lengths[0], range(2, 30, 3), every=arguments.every)
        workload = (16384, 32)
    tasks = tasks_of(study, lengths, workload, parts)
    about = environment(study, arguments.model, arguments.commit) | {"structured": workload}
    about["loading"] = round(time.perf_counter() - start, 1)
    try:
        run_tasks(tasks, study, about, arguments.out, start, arguments.budget_seconds)
    finally:
        write(arguments.out, study, about)
    print(f"{time.perf_counter() - start:.0f} s; failed {list(about['failed'])}; left out {about['left out']}")


def run_tasks(tasks: Sequence[Task], study: Study, about: dict, out: Path, start: float, budget_seconds: float) -> None:
    """Each task that is expected to end in time; one that fails is told of in `about` and stops no other."""
    longest: dict[str, float] = {}
    written = time.perf_counter()
    for name, like, run in tasks:
        begun = time.perf_counter()
        if begun - start + 1.1 * longest.get(like, FIRST_GUESS) > budget_seconds:
            about["left out"].append(name)
            continue
        try:
            run()
        except Exception:
            about["failed"][name] = traceback.format_exc()[-1500:]
        if study.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        longest[like] = max(seconds, longest.get(like, 0))
        about["seconds"][name] = round(seconds, 2)
        print(f"{begun - start:7.1f} s  {name}: {seconds:.1f} s", about["failed"].get(name, ""), flush=True)
        if time.perf_counter() - written > 30:
            write(out, study, about)
            written = time.perf_counter()


def environment(study: Study, model: str | None, commit: str | None) -> dict:
    import transformers

    where = describe(study.device, commit)
    return {
        "model": EMBEDDED_MODEL if model is None else model.rstrip("/").rsplit("/", 1)[-1],
        "tokens": study.length,
        "layers": list(study.judged),
        "device": where["card"],
        "torch": where["torch"],
        "transformers": transformers.__version__,
        "python": where["python"],
        "commit": where["commit"],
        "date": where["date"][:10],
        "seconds": {},
        "failed": {},
        "left out": [],
    }


def write(folder: Path, study: Study, about: dict) -> None:
    write_records(folder / "records.json", study.records)
    (folder / "predictions.json").write_text(json.dumps(study.predictions), encoding="utf-8")
    profiles = {
        length: {density: dataclasses.asdict(study.profile(density, length)) for density in study.targets(length)}
        for length in study.curves
    }
    (folder / "profiles.json").write_text(json.dumps(profiles), encoding="utf-8")
    (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
