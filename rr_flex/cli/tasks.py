"""`rr-flex tasks`. transformers, lm-eval and matplotlib are imported only when it runs."""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rr_flex.cli.arguments import (
    Progress,
    add_command,
    add_device,
    add_json,
    add_model,
    add_quiet,
    add_settings,
    check_writable,
    config_of,
    device_and_dtype,
    failed,
    quiet,
)
from rr_flex.runtime.writing import write_atomically

SUITES = ("ruler", "recall", "helmet", "video-mme")

EXAMPLES = """
examples:
  rr-flex tasks --suite recall --lengths 2048 --samples 5
  rr-flex tasks --suite ruler --tasks niah_single_1 --lengths 2048,4096 --output tasks.png
  rr-flex tasks --suite ruler --tau 0.9 --results tasks.jsonl && rr-flex report tasks.jsonl
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    tasks = add_command(
        commands,
        "tasks",
        run,
        help="score a model on long-context tasks, dense and with RRAttention",
        description="Long-context tasks, each sample dense and with RRAttention. A run that was cut off goes on.",
        examples=EXAMPLES,
    )
    tasks.add_argument("--suite", choices=SUITES, default="ruler", help="[%(default)s]")
    tasks.add_argument("--tasks", type=names, metavar="TASK,...", help="of the suite [those that need no download]")
    tasks.add_argument("--lengths", type=lengths, default=(2048, 4096), metavar="TOKENS,...", help="[2048,4096]")
    tasks.add_argument("--samples", type=int, default=10, help="a task and length [%(default)s]")
    tasks.add_argument("--batch-size", type=int, default=1, help="samples at once, for ruler [%(default)s]")
    add_model(tasks)
    tasks.add_argument("--data", type=Path, metavar="DIR", help="folder of the data, for helmet and video-mme")
    tasks.add_argument("--chat-template", action="store_true", help="prompts through the model's chat template")
    tasks.add_argument("--no-dense", action="store_true", help="leave the dense baseline out")
    add_device(tasks)
    tasks.add_argument(
        "--results", type=Path, default=Path("rr-flex-tasks.jsonl"), help="one JSON line a cell, added to [%(default)s]"
    )
    tasks.add_argument("--output", type=Path, metavar="PNG", help="heat map of all cells in the results")
    add_json(tasks)
    add_quiet(tasks)
    add_settings(tasks)


def names(text: str) -> list[str]:
    return text.split(",")


def lengths(text: str) -> list[int]:
    return [int(length) for length in text.split(",")]


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    progress = quiet if arguments.quiet else Progress()
    try:
        config = config_of(arguments)
        check_writable("--results", arguments.results)
        if arguments.output:
            check_writable("--output", arguments.output)
        if arguments.json not in (None, "-"):
            check_writable("--json", Path(arguments.json))
        if arguments.samples < 1:
            raise ValueError(f"--samples must be at least 1, got {arguments.samples}")
        if arguments.batch_size < 1 or (arguments.batch_size > 1 and arguments.suite != "ruler"):
            raise ValueError(f"--batch-size must be 1, or more for --suite ruler, got {arguments.batch_size}")
        progress("importing torch and transformers")
        score, tasks = import_suite(arguments)
        from rr_flex.models.loading import EMBEDDED_MODEL, device_name, load_causal_lm
        from rr_flex.tasks import results
        from rr_flex.tasks.run import run as run_suite

        results.read(arguments.results)
        progress("loading the model")
        where = device_and_dtype(arguments.device, arguments.dtype)
        if arguments.suite == "video-mme":
            from rr_flex.tasks import video_mme

            if arguments.model is None:
                raise ValueError("--model must name a vision-language model for --suite video-mme, got none")
            model, tokenizer = video_mme.load(arguments.model, **where)
            arguments.lengths = [0]
        else:
            model, tokenizer = load_causal_lm(arguments.model, **where)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return failed(parser, error)

    configs = [config] if arguments.no_dense else [None, config]
    for cell in run_suite(
        model,
        tokenizer,
        suite=arguments.suite,
        score=score,
        tasks=tasks,
        lengths=arguments.lengths,
        samples=arguments.samples,
        configs=configs,
        name=arguments.model or EMBEDDED_MODEL,
        path=arguments.results,
        chat=arguments.chat_template,
        batch_size=arguments.batch_size,
        device=device_name(where["device"]),
        dtype=str(where["dtype"]).removeprefix("torch."),
        progress=lambda text, done, of: progress(f"{bar(done, of)}  {text}"),
    ):
        progress(f"{cell.task}, {cell.length:,} tokens, {cell.attention}: {100 * cell.score:.1f}")
    print(file=sys.stderr)
    cells = [cell for cell in results.read(arguments.results) if cell.suite == arguments.suite]
    if arguments.output:
        results.heat_map(cells, arguments.output)
    document = json.dumps([asdict(cell) for cell in cells]) + "\n"
    if arguments.json not in (None, "-"):
        write_atomically(Path(arguments.json), lambda stream: stream.write(document.encode()))
    print(document if arguments.json == "-" else results.table(cells))
    return 0


def bar(done: int, of: int, width: int = 20) -> str:
    """[#####---------------] 1 of 4"""
    filled = width * done // of
    return f"[{'#' * filled}{'-' * (width - filled)}] {done} of {of}"


def import_suite(arguments: argparse.Namespace):
    """(the suite's function that scores a task, the tasks to run); ValueError for a task that it lacks."""
    try:
        if arguments.suite == "ruler":
            import lm_eval  # noqa: F401

            from rr_flex.tasks import ruler

            score = partial(ruler.scores, batch_size=arguments.batch_size)
            known, usual = list(ruler.TASKS), list(ruler.NO_ESSAY)
        elif arguments.suite == "recall":
            from rr_flex.tasks import recall

            score, known = recall.scores, list(recall.TASKS)
            usual = known
        else:
            if arguments.data is None or not arguments.data.is_dir():
                raise ValueError(
                    f"--data must be the data's folder for --suite {arguments.suite}, got {arguments.data}"
                )
            from rr_flex.tasks import helmet, video_mme

            module = helmet if arguments.suite == "helmet" else video_mme
            known = list(helmet.TASKS if module is helmet else video_mme.DURATIONS)
            score, usual = module.scores_in(arguments.data), known
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rr_flex"):
            raise
        raise ModuleNotFoundError(f"the tasks need {error.name}; install: pip install 'rr-flex[tasks]'") from error
    tasks = arguments.tasks or usual
    unknown = set(tasks) - set(known)
    if unknown:
        raise ValueError(f"--tasks must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return score, tasks
