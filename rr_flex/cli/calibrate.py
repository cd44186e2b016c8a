"""`rr-flex calibrate`. torch and transformers are imported only when it runs."""

import argparse
import contextlib
import io
import sys
from pathlib import Path

from rr_flex.cli.arguments import (
    Progress,
    add_command,
    add_device,
    add_model,
    add_quiet,
    check_writable,
    device_and_dtype,
    failed,
    quiet,
)

EXAMPLES = """
examples:
  rr-flex calibrate profile.json --target-density 0.4
  rr-flex calibrate profile.json --target-kl 0.01 --text my.txt code.py --length 4096
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    calibrate = add_command(
        commands,
        "calibrate",
        run,
        help="find a threshold for every layer and head, and save them as a profile",
        description="Measures a model on texts and writes a profile: a threshold for every layer and head.",
        examples=EXAMPLES,
    )
    calibrate.add_argument("profile", type=Path, help="JSON file to write")
    add_model(calibrate)
    calibrate.add_argument(
        "--text",
        nargs="+",
        metavar="FILE|KIND:PART",
        default=["prose:0", "code:0"],
        help="UTF-8 files, or parts of the standard library's prose, code, chat, table, key-value [%(default)s]",
    )
    calibrate.add_argument("--length", type=int, default=2048, metavar="TOKENS", help="of each text [%(default)s]")
    target = calibrate.add_mutually_exclusive_group(required=True)
    target.add_argument("--target-density", type=float, metavar="SHARE", help="kept / visible blocks, in (0, 1]")
    target.add_argument("--target-recall", type=float, metavar="SHARE", help="of the true attention mass, in (0, 1)")
    target.add_argument("--target-error", type=float, metavar="ERROR", help="relative output error of a layer")
    target.add_argument("--target-kl", type=float, metavar="NATS", help="divergence from the dense model a token")
    calibrate.add_argument("--preset", default="best", choices=("rr", "best", "fast"), help="[%(default)s]")
    calibrate.add_argument("--weigh-layers", action="store_true", help="by what each does to the predictions: slow")
    add_device(calibrate)
    add_quiet(calibrate)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    progress = quiet if arguments.quiet else Progress()
    try:
        check_writable("profile", arguments.profile)
        progress("importing torch and transformers")
        with contextlib.redirect_stderr(io.StringIO()) if arguments.quiet else contextlib.nullcontext():
            profile = find(arguments, progress)
    except (ValueError, OSError, ModuleNotFoundError, NotImplementedError) as error:
        return failed(parser, error)
    profile.save(arguments.profile)
    progress("done")
    print(file=sys.stderr)
    measured = ", ".join(f"{name} {value:.4f}" for name, value in profile.measured.items())
    print(f"{arguments.profile}: {len(profile.layers)} layers; on the calibration texts {measured}")
    return 0


def find(arguments: argparse.Namespace, progress):
    from rr_flex.calibration.thresholds import calibrate
    from rr_flex.config import RRConfig
    from rr_flex.evaluation.texts import KINDS, sample_text
    from rr_flex.models.loading import load_causal_lm, tokenize

    texts = {}
    for source in arguments.text:
        kind, _, part = source.partition(":")
        texts[source] = sample_text(kind, int(part or 0)) if kind in KINDS else Path(source).read_text(encoding="utf-8")
    progress("loading the model")
    where = device_and_dtype(arguments.device, arguments.dtype)
    model, tokenizer = load_causal_lm(arguments.model, **where)
    ids = [tokenize(tokenizer, text, arguments.length).to(where["device"]) for text in texts.values()]
    names = [f"{source}, {arguments.length} tokens" for source in texts]
    targets = {name: getattr(arguments, name) for name in vars(arguments) if name.startswith("target_")}
    return calibrate(
        model,
        ids,
        **targets,
        config=RRConfig.from_preset(arguments.preset),
        names=names,
        weigh_layers=arguments.weigh_layers,
        progress=progress,
    )
