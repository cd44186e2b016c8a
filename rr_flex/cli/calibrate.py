"""`rr-flex calibrate`. torch and transformers are imported only when it runs."""

import argparse

from rr_flex.cli.arguments import (
    DONE,
    Progress,
    add_command,
    add_model,
    add_texts,
    new_file,
    positive,
    share,
    told,
    whole,
)
from rr_flex.cli.config_flags import PRESETS

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
        EXAMPLES,
        help="find a threshold for every layer and head, and save them as a profile",
        description="Measures a model on texts and writes a profile: a threshold for every layer and head.",
    )
    calibrate.add_argument("profile", type=new_file, metavar="FILE", help="JSON file to write")
    add_model(calibrate)
    add_texts(calibrate, ("prose:0", "code:0"))
    calibrate.add_argument("--length", type=whole(2), default=2048, metavar="TOKENS", help="of each text [%(default)s]")
    target = calibrate.add_mutually_exclusive_group(required=True)
    target.add_argument("--target-density", type=share, metavar="SHARE", help="kept / visible blocks, in (0, 1]")
    target.add_argument("--target-recall", type=share, metavar="SHARE", help="of the true attention mass, in (0, 1]")
    target.add_argument("--target-error", type=positive, metavar="ERROR", help="relative output error of a layer")
    target.add_argument("--target-kl", type=positive, metavar="NATS", help="divergence from the dense model a token")
    calibrate.add_argument("--preset", default="best", choices=PRESETS, help="[%(default)s]")
    calibrate.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(arguments: argparse.Namespace) -> int:
    progress = Progress(arguments.quiet)
    progress("importing torch and transformers")
    with told():
        from rr_flex.calibration.thresholds import calibrate
        from rr_flex.cli.inputs import load, read_text
        from rr_flex.config import RRConfig

        texts = {source: read_text(source) for source in arguments.text}
        prompts = load(arguments, texts, lambda config: None, progress)
        targets = {name: getattr(arguments, name) for name in vars(arguments) if name.startswith("target_")}
        profile = calibrate(
            prompts.model,
            list(prompts.ids.values()),
            **targets,
            config=RRConfig.from_preset(arguments.preset),
            names=[f"{source}, {arguments.length} tokens" for source in texts],
            progress=progress,
        )
    profile.save(arguments.profile)
    progress.done()
    measured = ", ".join(f"{name} {value:.4f}" for name, value in profile.measured.items())
    print(f"{arguments.profile}: {len(profile.layers)} layers; on the calibration texts {measured}")
    (name, value) = next(iter(profile.target.items()))
    if name == "density" and profile.measured["density"] < value - 0.02:
        print("the density reached is lower than asked for: no threshold of the grid lies between")
    return DONE
