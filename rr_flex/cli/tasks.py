"""`rr-flex tasks`. transformers, lm-eval and matplotlib are imported only when it runs."""

import argparse
import importlib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from rr_flex.cli import flags
from rr_flex.cli.output import DONE, Progress, need, save_figure, show, told

NEED_DATA = ("helmet", "video-mme")
SUITES = ("ruler", "recall", *NEED_DATA)

EXAMPLES = """
examples:
  rr-flex tasks --suite recall --lengths 2048 --samples 5
  rr-flex tasks --suite ruler --tasks niah_single_1 --lengths 2048,4096 --output tasks.png
  rr-flex tasks --suite ruler --tau 0.9 --results tasks.jsonl && rr-flex page tasks.jsonl
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    about = (
        "score a model on long-context tasks, each sample dense and with RRAttention; a run that was cut off goes on"
    )
    parser = flags.add_command(commands, run, about, EXAMPLES)
    parser.add_argument("--suite", choices=SUITES, default="ruler", help="[%(default)s]")
    parser.add_argument("--tasks", type=flags.listed(str), metavar="TASK,...", help="[those without a download]")
    lengths = {"type": flags.listed(flags.whole(64)), "metavar": "TOKENS,..."}
    parser.add_argument("--lengths", help="of each prompt [2048,4096; helmet: 8192]", **lengths)
    number = {"type": flags.whole(1), "metavar": "N"}
    parser.add_argument("--samples", default=10, help="a task and length [%(default)s]", **number)
    parser.add_argument("--batch-size", default=1, help="at once, for ruler [%(default)s]", **number)
    flags.add_model(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data, for helmet and video-mme")
    parser.add_argument("--chat-template", action="store_true", help="prompts through the model's chat template")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense baseline out")
    results = {"type": flags.new_file, "default": Path("rr-flex-tasks.jsonl"), "metavar": "FILE"}
    parser.add_argument("--results", help="one JSON line a cell, added to [%(default)s]", **results)
    flags.add_output(parser, help="heat map of all cells in the results")
    flags.add_json(parser)
    flags.add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    progress = Progress(arguments)
    with told("tasks"):
        check(arguments)
        progress("importing torch and transformers")
        config = flags.config_of(arguments)
        suite, tasks, lengths = import_suite(arguments)
        from rr_flex.cli.inputs import device_and_dtype, model_config
        from rr_flex.models import enable, loading
        from rr_flex.tasks import results, run

        results.read(arguments.results)
        where = device_and_dtype(arguments)
        plan = run.Plan(
            suite=arguments.suite,
            scores=suite.scores,
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
                data="" if arguments.data is None else str(arguments.data),
            ),
        )
        progress("checking data and lengths")
        if arguments.suite == "video-mme":
            load_tokenizer, load = suite.load_processor, suite.load
        else:
            load_tokenizer, load = loading.load_tokenizer, loading.load_causal_lm
            model_config(arguments.model)
        tokenizer = load_tokenizer(arguments.model)
        check_samples(suite, plan, tokenizer)
        progress("loading the model")
        model, _ = load(arguments.model, tokenizer=tokenizer, **where)
        enable(model, config=config).restore()  # a model that it does not take is an error before the dense cells
        for cell in run.run(model, tokenizer, plan, arguments.results, progress):
            progress(f"{cell.task}, {cell.length:,} tokens, {cell.attention}: {100 * cell.score:.1f}")
    progress.done()
    cells = [cell for cell in results.read(arguments.results) if cell.suite == arguments.suite]
    show(arguments, [asdict(cell) for cell in cells], results.table(cells))
    if arguments.output:
        save_figure(arguments.output, results.heat_map(cells))
    return DONE


def check(arguments: argparse.Namespace) -> None:
    """What can be wrong between arguments, before anything is imported."""
    suite, data = arguments.suite, arguments.data
    if arguments.batch_size > 1 and suite != "ruler":
        raise ValueError(f"--batch-size must be 1 but for --suite ruler, got {arguments.batch_size}")
    if suite in NEED_DATA and (data is None or not data.is_dir()):
        raise ValueError(f"--data must be the data's folder for --suite {suite}, got {data}")
    if suite not in NEED_DATA and data is not None:
        raise ValueError(f"--data must come with --suite helmet or video-mme, got it with {suite}")
    if suite == "video-mme" and arguments.model is None:
        raise ValueError("--model must name a vision-language model for --suite video-mme, got none")
    if suite == "video-mme" and arguments.lengths is not None:
        raise ValueError(f"--lengths must not be given for video-mme, whose videos decide, got {arguments.lengths}")
    for package in ("lm_eval", "wonderwords", "nltk"):
        need(package, suite == "ruler")
    need("matplotlib", arguments.output)


def check_samples(suite: ModuleType, plan, tokenizer) -> None:
    """What can be wrong with data, lengths and the chat template. ValueError or FileNotFoundError."""
    for asked in plan.asked:
        try:
            suite.check(asked, tokenizer)
        except (KeyError, StopIteration) as error:
            raise ValueError(f"--data must hold rows of {asked.task} as published, got one without {error}") from error
    if (plan.same.chat or plan.suite == "video-mme") and tokenizer.chat_template is None:
        raise ValueError(f"--model must have a chat template for these prompts, got {plan.same.model}, which has none")


def import_suite(arguments: argparse.Namespace) -> tuple[ModuleType, tuple[str, ...], tuple[int, ...]]:
    """(the suite's module, tasks, lengths); ValueError for a task or length that it lacks."""
    suite = importlib.import_module(f"rr_flex.tasks.{arguments.suite.replace('-', '_')}")
    tasks, allowed = arguments.tasks or getattr(suite, "USUAL", tuple(suite.TASKS)), getattr(suite, "LENGTHS", None)
    lengths = arguments.lengths or (allowed[:1] if allowed else (2048, 4096))
    unknown = set(tasks) - set(suite.TASKS)
    if unknown:
        raise ValueError(f"--tasks must be among {', '.join(suite.TASKS)}, got {', '.join(sorted(unknown))}")
    if allowed and not set(lengths) <= set(allowed):
        raise ValueError(f"--lengths must be of {arguments.suite}'s, {sorted(allowed)}, got {lengths}")
    return suite, tasks, lengths
