"""`rr-flex tasks`. transformers, lm-eval and matplotlib are imported only when it runs."""

import argparse
import importlib
import importlib.util
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rr_flex.cli.arguments import (
    DONE,
    Progress,
    add_command,
    add_json,
    add_model,
    add_output,
    listed,
    name,
    new_file,
    save_figure,
    show,
    told,
    whole,
    write_json,
)
from rr_flex.cli.config_flags import add_settings, config_of

SUITES = ("ruler", "recall", "helmet", "video-mme")

EXAMPLES = """
examples:
  rr-flex tasks --suite recall --lengths 2048 --samples 5
  rr-flex tasks --suite ruler --tasks niah_single_1 --lengths 2048,4096 --output tasks.png
  rr-flex tasks --suite ruler --tau 0.9 --results tasks.jsonl && rr-flex page tasks.jsonl
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    tasks = add_command(
        commands,
        "tasks",
        run,
        EXAMPLES,
        help="score a model on long-context tasks, dense and with RRAttention",
        description="Long-context tasks, each sample dense and with RRAttention. A run that was cut off goes on.",
    )
    tasks.add_argument("--suite", choices=SUITES, default="ruler", help="[%(default)s]")
    tasks.add_argument("--tasks", type=listed(name), metavar="TASK,...", help="of the suite [those without a download]")
    tasks.add_argument(
        "--lengths", type=listed(whole(64)), metavar="TOKENS,...", help="of each prompt [2048,4096; helmet: 8192]"
    )
    tasks.add_argument("--samples", type=whole(1), default=10, metavar="N", help="a task and length [%(default)s]")
    tasks.add_argument("--batch-size", type=whole(1), default=1, metavar="N", help="at once, for ruler [%(default)s]")
    add_model(tasks)
    tasks.add_argument("--data", type=Path, metavar="DIR", help="folder of the data, for helmet and video-mme")
    tasks.add_argument("--chat-template", action="store_true", help="prompts through the model's chat template")
    tasks.add_argument("--no-dense", action="store_true", help="leave the dense baseline out")
    results = {"type": new_file, "default": Path("rr-flex-tasks.jsonl"), "metavar": "FILE"}
    tasks.add_argument("--results", help="one JSON line a cell, added to [%(default)s]", **results)
    add_output(tasks, help="heat map of all cells in the results")
    add_json(tasks)
    add_settings(tasks)


def run(arguments: argparse.Namespace) -> int:
    progress = Progress(arguments.quiet)
    video = arguments.suite == "video-mme"
    with told("tasks"):
        check(arguments)
        progress("importing torch and transformers")
        config = config_of(arguments)
        score, tasks, lengths = import_suite(arguments)
        from rr_flex.cli.inputs import device_and_dtype, model_config
        from rr_flex.models import loading
        from rr_flex.tasks import results, run

        results.read(arguments.results)
        where = device_and_dtype(arguments)
        if not video:
            model_config(arguments.model)
        progress("loading the model")
        if video:
            from rr_flex.tasks import video_mme

            model, tokenizer = video_mme.load(arguments.model, **where)
        else:
            model, tokenizer = loading.load_causal_lm(arguments.model, **where)
    plan = run.Plan(
        suite=arguments.suite,
        score=score,
        tasks=tasks,
        lengths=lengths,
        configs=[config] if arguments.no_dense else [None, config],
        same=results.Setting(
            model=arguments.model or loading.EMBEDDED_MODEL,
            samples=arguments.samples,
            chat=arguments.chat_template,
            batch_size=arguments.batch_size,
            device=loading.device_name(where["device"]),
            dtype=str(where["dtype"]).removeprefix("torch."),
        ),
    )
    for cell in run.run(model, tokenizer, plan, arguments.results, progress):
        progress(f"{cell.task}, {cell.length:,} tokens, {cell.attention}: {100 * cell.score:.1f}")
    progress.done()
    cells = [cell for cell in results.read(arguments.results) if cell.suite == arguments.suite]
    document = [asdict(cell) for cell in cells]
    write_json(arguments, document)
    show(arguments, document, results.table(cells))
    if arguments.output:
        save_figure(arguments.output, results.heat_map(cells))
    return DONE


def check(arguments: argparse.Namespace) -> None:
    """What can be wrong between arguments, before anything is imported."""
    suite = arguments.suite
    if arguments.batch_size > 1 and suite != "ruler":
        raise ValueError(f"--batch-size must be 1 but for --suite ruler, got {arguments.batch_size}")
    if suite in ("helmet", "video-mme") and (arguments.data is None or not arguments.data.is_dir()):
        raise ValueError(f"--data must be the data's folder for --suite {suite}, got {arguments.data}")
    if suite in ("ruler", "recall") and arguments.data is not None:
        raise ValueError(f"--data must come with --suite helmet or video-mme, got it with {suite}")
    if suite == "video-mme" and arguments.model is None:
        raise ValueError("--model must name a vision-language model for --suite video-mme, got none")
    if suite == "video-mme" and arguments.lengths is not None:
        raise ValueError(
            f"--lengths must not be given for --suite video-mme, whose videos decide, got {arguments.lengths}"
        )
    if suite == "ruler" and importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError("--suite ruler needs lm_eval", name="lm_eval")
    if arguments.output and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--output needs matplotlib", name="matplotlib")


def import_suite(arguments: argparse.Namespace):
    """(the suite's function that scores a task, tasks, lengths); ValueError for a task or length that it lacks."""
    suite = importlib.import_module(f"rr_flex.tasks.{arguments.suite.replace('-', '_')}")
    if arguments.data is not None:
        score = suite.scores_in(arguments.data)
    else:
        score = partial(suite.scores, batch_size=arguments.batch_size) if arguments.suite == "ruler" else suite.scores
    tasks, allowed = arguments.tasks or getattr(suite, "USUAL", tuple(suite.TASKS)), getattr(suite, "LENGTHS", None)
    lengths = arguments.lengths or (allowed[:1] if allowed else (2048, 4096))
    unknown = set(tasks) - set(suite.TASKS)
    if unknown:
        raise ValueError(f"--tasks must be among {', '.join(suite.TASKS)}, got {', '.join(sorted(unknown))}")
    if allowed and not set(lengths) <= set(allowed):
        raise ValueError(f"--lengths must be of {arguments.suite}'s, {sorted(allowed)}, got {lengths}")
    return score, tasks, lengths
