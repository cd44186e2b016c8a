"""`python -m benchmarks run | chunks | tune | capture | report`: measure, tune the kernels' options, keep a model's
q, k, v, tabulate and draw."""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import prefill_tables, server_suites, server_tables, tables, task_tables, time_plot, together
from benchmarks import tuning as tune
from benchmarks.bench import Bench
from benchmarks.cases import SUITES, Case
from benchmarks.dense_kernels import MAKERS
from benchmarks.environment import describe
from benchmarks.runner import run, with_length
from benchmarks.timing import OutOfTime, Progress
from benchmarks.workloads import captured
from rr_flex.cli import flags
from rr_flex.evaluation.texts import KINDS, sample_text

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"  # the page of speed


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return options.command(options)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    running = commands.add_parser("run", help="measure suites of cases; one JSON line each")
    running.set_defaults(command=run_suites)
    running.add_argument("--suite", nargs="+", choices=sorted(SUITES), default=["quick"])
    running.add_argument("--only", nargs="+", default=[""], help="run the cases whose name holds one of these texts")
    running.add_argument(
        "--lengths", type=flags.whole(1), nargs="+", help="tokens; those of the suite, or its cases moved there"
    )
    running.add_argument(
        "--captured",
        type=flags.old_file,
        help="file of q, k, v from a real model (.pt, .safetensors) in place of structured ones",
    )
    running.add_argument(
        "--dense",
        choices=sorted(MAKERS),
        nargs="*",
        help="dense kernels to compare with; all that are installed unless given",
    )
    running.add_argument(
        "--jobs",
        type=flags.whole(1),
        default=1,
        help="processes that compile side by side; cases are timed one at a time",
    )
    running.add_argument(
        "--in-turns", action="store_true", help="time the whole call and the fastest dense kernel in turns"
    )
    running.add_argument(
        "--rest",
        type=flags.positive,
        default=0.0,
        help="with --in-turns, seconds of an idle card before each: at full clock",
    )
    running.add_argument("--seed", type=flags.whole(0), default=0)
    running.add_argument("--profile", action="store_true", help="add the kernels of one call and their times")
    running.add_argument("--list", action="store_true", help="only print the names of the cases")
    common(running)

    tuning = commands.add_parser("tune", help="find kernel options and the break-even with dense attention")
    tuning.set_defaults(command=tune_options)
    tuning.add_argument("--head-dims", type=flags.whole(16, 16), nargs="+", default=[128, 64])
    tuning.add_argument("--dtypes", choices=flags.DTYPES, nargs="+", default=["bfloat16", "float16"])
    tuning.add_argument("--what", nargs="+", choices=tune.PARTS, default=list(tune.PARTS))
    tuning.add_argument("--length", type=flags.whole(1), default=32768, help="tokens, for the kernel options")
    tuning.add_argument("--density", type=flags.share, default=0.3, help="of the blocks, for the kernel options")
    tuning.add_argument("--full", action="store_true", help="every option for every dtype; else the best of the first")
    tuning.add_argument("--table", type=flags.new_file, help="table to update; results/tuned.json unless given")
    common(tuning)

    capturing = commands.add_parser("capture", help="keep a model's q, k and v for run --captured")
    capturing.set_defaults(command=capture_layers)
    capturing.add_argument("--model", help="a Hugging Face name, a folder or a .gguf file [SmolLM2-135M-Instruct]")
    capturing.add_argument("--kind", choices=KINDS, default="code", help="of text [%(default)s]")
    capturing.add_argument("--length", type=flags.whole(1), default=8192, help="tokens [%(default)s]")
    capturing.add_argument("--layers", type=flags.whole(0), nargs="+", required=True, help="one a row of the batch")
    capturing.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    capturing.add_argument("--out", type=flags.new_file, required=True, metavar="FILE", help="a .pt file")

    serving = commands.add_parser("chunks", help="as a server prefills: prompts in chunks, cells of work, packed, host")
    serving.set_defaults(command=server_suites.run_suites)
    server_suites.add_arguments(serving)
    common(serving)

    reporting = commands.add_parser("report", help="write the page's tables and draw time against length")
    reporting.set_defaults(command=write_report)
    reporting.add_argument("--results", type=Path, default=RESULTS)
    reporting.add_argument("--readme", type=flags.old_file, default=README)
    reporting.add_argument("--plot", type=flags.picture, help="results/time-against-length.png unless given")
    reporting.add_argument("--suites", nargs="+", help="only rows of these suites")
    return parser


def common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=flags.new_folder, default=RESULTS, help="folder of the results")
    parser.add_argument("--budget-seconds", type=flags.positive, help="start no step after this; rows so far are kept")
    parser.add_argument("--seconds", type=flags.positive, default=1.0, help="about how long to repeat each timing")
    parser.add_argument("--commit", help="named in the rows where there is no git history")


def run_suites(options: argparse.Namespace) -> int:
    if options.rest and not options.in_turns:
        raise SystemExit(f"--rest needs --in-turns, got {options.rest:g} without it")
    cases = [(suite, case) for suite in options.suite for case in chosen_cases(suite, options)]
    if not cases:
        raise SystemExit(f"--only must be part of a case's name (--list), got {', '.join(options.only)}")
    if options.list:
        print("\n".join(f"{suite}: {case.name}" for suite, case in cases))
        return 0
    device = torch.device(options.device)
    about = describe(device, options.commit)
    if options.jobs > 1:
        return run_jobs(cases, options, about)
    progress = Progress(len(cases), options.budget_seconds)
    bench = Bench(device, progress, options.seconds, options.in_turns, rest=options.rest)
    rows = []
    try:
        for suite in options.suite:
            of_suite = [case for name, case in cases if name == suite]
            out = options.out / f"{suite}.jsonl"
            for row in run(of_suite, bench, out=out, suite=suite, about=about, profile=options.profile):
                rows.append(row)
                print("\n" + tables.one_line(row), file=sys.stderr)
    except OutOfTime as reason:
        print(f"\nstopped: {reason}; {len(rows)} of {len(cases)} rows are written", file=sys.stderr)
    print(tables.text_table(rows))
    return 1 if any(row["failed"] for row in rows) else 0


def run_jobs(cases: list[tuple[str, Case]], options: argparse.Namespace, about: dict[str, object]) -> int:
    start = time.time()
    chosen = {name: getattr(options, name) for name in ("device", "in_turns", "rest", "seconds", "profile", "out")}
    chosen |= {"about": about, "deadline": options.budget_seconds and start + options.budget_seconds}
    together.run_together(cases, options.jobs, chosen)
    names = {case.name for _, case in cases}
    files = [options.out / f"{suite}.jsonl" for suite in options.suite]
    lines = [line for path in files if path.exists() for line in path.read_text().splitlines()]
    rows = [row for row in map(json.loads, lines) if row["case"] in names and row["date"] == about["date"]]
    print(tables.text_table(rows))
    return 1 if len(rows) < len(cases) or any(row["failed"] for row in rows) else 0


def chosen_cases(suite: str, options: argparse.Namespace) -> list[Case]:
    cases = SUITES[suite]
    if options.lengths:
        cases = with_length(cases, options.lengths)
    changes = {"seed": options.seed}
    if options.captured:
        changes |= captured_shape(str(options.captured))
    cases = [replace(case, **changes) for case in cases]
    if options.dense is not None:  # a case that asks for none, since they take minutes there, keeps to that
        cases = [case if case.dense == () else replace(case, dense=tuple(options.dense)) for case in cases]
    cases = list(dict.fromkeys(cases))
    return [case for case in cases if any(text in case.name for text in options.only)]


def captured_shape(path: str) -> dict[str, object]:
    """The fields of a case that a file of q, k, v decides."""
    q, k, _ = captured(path, "cpu", torch.float16)
    B, Hq, L, D = q.shape
    if k.shape[2] != L:
        raise SystemExit(f"--captured must hold as many queries as keys, got {L} and {k.shape[2]}")
    return {"workload": path, "batch": B, "heads": Hq, "kv_heads": k.shape[1], "length": L, "head_dim": D}


def tune_options(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    if device.type != "cuda":
        raise SystemExit(f"--device must be a CUDA device for tune, whose options are the GPU kernels', got {device}")
    return tune.tune(options, device)


def capture_layers(options: argparse.Namespace) -> int:
    """Like the study's texts for tuning: part 0 of its kind."""
    if options.out.suffix != ".pt":
        raise SystemExit(f"--out must end in .pt, got {options.out}")
    from benchmarks import capture  # with transformers, which nothing else here needs
    from rr_flex.cli.inputs import model_config
    from rr_flex.models.loading import load_causal_lm, load_tokenizer, tokenize

    text, config = sample_text(options.kind), model_config(options.model)
    if config is not None and max(options.layers) >= config.num_hidden_layers:
        raise SystemExit(f"--layers must lie in [0, {config.num_hidden_layers}), got {options.layers}")
    tokenizer = load_tokenizer(options.model)
    tokenize(tokenizer, text, options.length)  # a text that is too short is an error
    model = load_causal_lm(options.model, device=options.device, tokenizer=tokenizer)
    found = capture.capture(*model, text, options.length, options.layers)
    capture.write(found, options.out)
    print(f"{options.out}: q {tuple(found.q.shape)}, k and v {tuple(found.k.shape)}")
    return 0


def write_report(options: argparse.Namespace) -> int:
    rows = tables.load(options.results, options.suites)
    if not rows:
        raise SystemExit(f"--results must hold rows, got none in {options.results}")
    tables.write_page(options.readme, rows)
    task_tables.write_page(task_tables.load(options.results))
    prefills, server_rows = prefill_tables.load(options.results), server_tables.load(options.results)
    (options.results / tables.ALL_ROWS).write_text(tables.every_row(rows) + server_tables.every_row(server_rows))
    time_plot.draw(rows, options.plot or options.results / "time-against-length.png")
    task_tables.draw(options.results)
    if prefills:
        prefill_tables.write_page(options.readme, prefills)
    if server_rows:
        server_tables.write_page(options.readme, server_rows)
        server_tables.draw(server_rows, options.results / "chunks.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
