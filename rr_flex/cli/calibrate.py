"""`rr-flex calibrate`. torch and transformers are imported only when it runs."""

import argparse

from rr_flex.cli import flags
from rr_flex.cli.output import DONE, Progress, say, told

EXAMPLES = """
examples:
  rr-flex calibrate profile.json --target-density 0.4
  rr-flex calibrate profile.json --target-kl 0.01 --text my.txt code.py --length 4096
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    about = "measure a model on texts and write a profile: a threshold for every layer and head"
    parser = flags.add_command(commands, run, about, EXAMPLES)
    parser.add_argument("profile", type=flags.new_file, metavar="FILE", help="JSON file to write")
    flags.add_model(parser)
    flags.add_texts(parser, ("prose:0", "code:0"))
    length = {"type": flags.whole(2), "default": 2048, "metavar": "TOKENS"}
    parser.add_argument("--length", help="of each text [%(default)s]", **length)
    target = parser.add_mutually_exclusive_group(required=True)
    for name, kind, unit, text in (
        ("density", flags.share, "SHARE", "kept / visible blocks, in (0, 1]"),
        ("recall", flags.share, "SHARE", "of the true attention mass, in (0, 1]"),
        ("error", flags.positive, "ERROR", "relative output error of a layer"),
        ("kl", flags.positive, "NATS", "divergence from the dense model a token"),
    ):
        target.add_argument(f"--target-{name}", type=kind, metavar=unit, help=text)
    flags.add_preset(parser, "best")
    flags.add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    progress = Progress(arguments)
    progress("importing torch and transformers")
    with told():
        from rr_flex.calibration.thresholds import calibrate, must_be_reachable
        from rr_flex.cli.inputs import load, read_text
        from rr_flex.config import RRConfig

        config = RRConfig.from_preset(arguments.preset)
        texts = {source: read_text(source) for source in arguments.text}
        if arguments.target_density is not None:
            must_be_reachable(arguments.target_density, config, [arguments.length])
        prompts = load(arguments, texts, lambda config: None, progress)
        profile = calibrate(
            prompts.model,
            list(prompts.ids.values()),
            **{name: value for name, value in vars(arguments).items() if name.startswith("target_")},
            config=config,
            names=[f"{source}, {arguments.length} tokens" for source in texts],
            progress=progress,
        )
    profile.save(arguments.profile)
    progress.done()
    measured = ", ".join(f"{name} {value:.4f}" for name, value in profile.measured.items())
    say(f"{arguments.profile}: {len(profile.layers)} layers; on the calibration texts {measured}")
    (name, value) = next(iter(profile.target.items()))
    if name == "density" and profile.measured["density"] < value - 0.02:
        say("the density reached is lower than asked for: no threshold of the grid lies between")
    return DONE
