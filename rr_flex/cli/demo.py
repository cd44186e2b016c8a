"""`rr-flex demo`. transformers and matplotlib are imported only when it runs."""

import argparse
import contextlib
import io
import sys
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

EXAMPLES = """
examples:
  rr-flex demo
  rr-flex demo --text my.txt --length 4096 --order 2 --block-size 128x64
  rr-flex demo --text my.txt --json run.json --maps all && rr-flex report run.json
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    demo = add_command(
        commands,
        "demo",
        run,
        help="prefill a real model dense and with RRAttention, and compare",
        description="Prefills a real model with a long text, dense and with RRAttention, and compares the two.",
        examples=EXAMPLES,
    )
    add_model(demo)
    demo.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to prefill [Python's own documentation]")
    demo.add_argument("--length", type=int, default=2048, metavar="TOKENS", help="tokens to prefill [%(default)s]")
    add_device(demo)
    demo.add_argument("--heads", type=head_list, default=(), metavar="LAYER:HEAD,...", help="to draw [three of them]")
    demo.add_argument("--output", type=Path, default=Path("rr-flex-demo.png"), metavar="PNG", help="[%(default)s]")
    add_json(demo)
    layers = "layers whose block maps go into the JSON, for rr-flex report [none]"
    demo.add_argument("--maps", type=layer_list, default=(), metavar="all|LAYER,...", help=layers)
    add_quiet(demo)
    add_settings(demo)


def head_list(text: str) -> tuple[tuple[int, int], ...]:
    """5:0,15:3 is head 0 of layer 5 and head 3 of layer 15."""
    pairs = [pair.split(":") for pair in text.split(",")]
    return tuple((int(layer), int(head)) for layer, head in pairs)


def layer_list(text: str) -> tuple[int, ...] | None:
    """0,5,15, or None for all."""
    return None if text == "all" else tuple(int(layer) for layer in text.split(","))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    progress = quiet if arguments.quiet else Progress()
    try:
        config = config_of(arguments)
        if arguments.maps != () and arguments.json is None:
            raise ValueError("--maps must come with --json, which holds the maps, got none")
        check_writable("--output", arguments.output)
        if arguments.json not in (None, "-"):
            check_writable("--json", Path(arguments.json))
        progress("importing torch and transformers")
        demo = import_demo()
        options = demo.DemoOptions(
            config=config,
            model=arguments.model,
            text=arguments.text,
            length=arguments.length,
            heads=arguments.heads,
            maps=arguments.maps,
            **device_and_dtype(arguments.device, arguments.dtype),
        )
        # The model's own loading bars go to stderr.
        with contextlib.redirect_stderr(io.StringIO()) if arguments.quiet else contextlib.nullcontext():
            prepared = demo.prepare(options, progress)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return failed(parser, error)

    report = demo.measure(options, prepared, progress)
    progress("drawing")
    write_atomically(arguments.output, lambda stream: demo.draw(options, prepared, report, stream))
    if arguments.json not in (None, "-"):
        document = demo.as_json(options, prepared, report).encode()
        write_atomically(Path(arguments.json), lambda stream: stream.write(document))
    progress("done")
    print(file=sys.stderr)
    print(demo.as_json(options, prepared, report) if arguments.json == "-" else demo.table(options, prepared, report))
    print(f"block maps: {arguments.output}", file=sys.stderr)
    return 0


def import_demo():
    try:
        from rr_flex.cli import demonstration as demo
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rr_flex"):
            raise
        raise ModuleNotFoundError(
            f"the demo needs {error.name}; install it with: pip install 'rr-flex[demo]'"
        ) from error
    return demo
