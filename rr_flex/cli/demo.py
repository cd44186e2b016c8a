"""`rr-flex demo`. transformers and matplotlib are imported only when it runs."""

import argparse
import sys
from pathlib import Path

from rr_flex.cli.arguments import (
    DONE,
    Progress,
    add_command,
    add_json,
    add_model,
    add_output,
    listed,
    save_figure,
    show,
    stop,
    told,
    whole,
    write_json,
)
from rr_flex.cli.config_flags import add_settings, config_of

EXAMPLES = """
examples:
  rr-flex demo
  rr-flex demo --text my.txt --length 4096 --preset best
  rr-flex demo --text my.txt --json run.json --maps all && rr-flex page run.json
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    demo = add_command(
        commands,
        "demo",
        run,
        EXAMPLES,
        help="prefill a real model dense and with RRAttention, and compare",
        description="Prefills a real model with a long text, dense and with RRAttention, and compares the two.",
    )
    add_model(demo)
    text = "UTF-8 file, or a part of prose, code, chat, table, key-value [Python's own documentation]"
    demo.add_argument("--text", metavar="FILE|KIND:PART", help=text)
    demo.add_argument("--length", type=whole(2), default=2048, metavar="TOKENS", help="to prefill [%(default)s]")
    demo.add_argument(
        "--heads", type=listed(pair), default=(), metavar="LAYER:HEAD,...", help="to draw [three of them]"
    )
    add_output(demo, default=Path("rr-flex-demo.png"), help="or .pdf, .svg [%(default)s]")
    layers = "layers whose block maps go into the JSON, for rr-flex page [none]"
    demo.add_argument("--maps", type=layer_list, default=(), metavar="all|LAYER,...", help=layers)
    add_json(demo)
    add_settings(demo)


def pair(text: str) -> tuple[int, int]:
    """5:0 is head 0 of layer 5."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be LAYER:HEAD, as in 5:0,15:3, got {text!r}")
    return int(parts[0]), int(parts[1])


def layer_list(text: str) -> tuple[int, ...] | None:
    """0,5,15, or None for all."""
    return None if text == "all" else listed(whole(0))(text)


def run(arguments: argparse.Namespace) -> int:
    progress = Progress(arguments.quiet)
    with told():
        if arguments.maps != () and arguments.json is None:
            raise ValueError("--maps must come with --json, which holds the maps, got none")
        progress("importing torch and transformers")
        from rr_flex.cli import demonstration, inputs

        config = config_of(arguments)
        text = demonstration.default_text() if arguments.text is None else inputs.read_text(arguments.text)
        texts = {arguments.text or "Python's own documentation": text}

        def check(shape) -> None:
            layers, heads = shape.num_hidden_layers, shape.num_attention_heads
            for layer, head in arguments.heads:
                if layer >= layers or head >= heads:
                    raise ValueError(f"--heads must lie within {layers} layers of {heads} heads, got {layer}:{head}")
            for layer in arguments.maps or ():
                if layer >= layers:
                    raise ValueError(f"--maps must name layers below {layers}, got {layer}")

        prompts = inputs.load(arguments, texts, check, progress)
        wanted = demonstration.Wanted(
            config=config, preset=arguments.preset, heads=arguments.heads, maps=arguments.maps
        )
    try:
        found = demonstration.measure(prompts, wanted, progress)
    except NotImplementedError as error:  # a model whose attention the demo cannot judge
        stop(str(error), error)
    progress.done()
    document = demonstration.document(prompts, wanted, found)
    write_json(arguments, document)
    show(arguments, document, demonstration.table(prompts, wanted, found, arguments.output))
    save_figure(arguments.output, demonstration.picture(prompts, wanted, found))
    if arguments.json == "-" and not arguments.quiet:
        print(f"block maps: {arguments.output}", file=sys.stderr)
    return DONE
