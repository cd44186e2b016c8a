"""`rr-flex demo`. transformers and matplotlib are imported only when it runs."""

import argparse
import sys
from pathlib import Path

from rr_flex.cli import flags
from rr_flex.cli.output import DONE, Progress, save_figure, show, stop, told

EXAMPLES = """
examples:
  rr-flex demo
  rr-flex demo --text my.txt --length 4096 --preset best
  rr-flex demo --text my.txt --json run.json --maps all && rr-flex page run.json
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    about = "prefill a real model with a long text, dense and with RRAttention, and compare the two"
    parser = flags.add_command(commands, run, about, EXAMPLES)
    flags.add_model(parser)
    text = "UTF-8 file, or a part of prose, code, chat, table, key-value [Python's own documentation]"
    parser.add_argument("--text", metavar="FILE|KIND:PART", help=text)
    length = {"type": flags.whole(2), "default": 2048, "metavar": "TOKENS"}
    parser.add_argument("--length", help="to prefill [%(default)s]", **length)
    flags.add_output(parser, default=Path("rr-flex-demo.png"), help="or .pdf, .svg [%(default)s]")
    layers = "layers whose block maps go into the JSON, for rr-flex page [none]"
    parser.add_argument("--maps", type=layer_list, default=(), metavar="all|LAYER,...", help=layers)
    flags.add_json(parser)
    flags.add_settings(parser)


def layer_list(text: str) -> tuple[int, ...] | None:
    """0,5,15, or None for all."""
    return None if text == "all" else flags.listed(flags.whole(0))(text)


def run(arguments: argparse.Namespace) -> int:
    progress = Progress(arguments)
    with told():
        if arguments.maps != () and arguments.json is None:
            raise ValueError("--maps must come with --json, which holds the maps, got none")
        progress("importing torch and transformers")
        from rr_flex.cli import demonstration, inputs

        config = flags.config_of(arguments)
        text = demonstration.default_text() if arguments.text is None else inputs.read_text(arguments.text)

        def check(shape) -> None:
            if max(arguments.maps or (0,)) >= shape.num_hidden_layers:
                raise ValueError(f"--maps must name layers below {shape.num_hidden_layers}, got {arguments.maps}")

        prompts = inputs.load(arguments, {arguments.text or "Python's own documentation": text}, check, progress)
    try:
        found = demonstration.measure(prompts, config, arguments, progress)
    except NotImplementedError as error:  # a model whose attention the demo cannot judge
        stop(str(error), error)
    progress.done()
    show(arguments, found.document(), found.table())
    save_figure(arguments.output, found.picture())
    if arguments.json == "-" and not arguments.quiet:
        print(f"block maps: {arguments.output}", file=sys.stderr)
    return DONE
