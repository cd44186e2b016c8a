"""The command `rr-flex`: a parser of subcommands, each of which imports what it needs only when it runs."""

import argparse
import importlib.metadata
import sys

from rr_flex.commands import demo, tasks
from rr_flex.commands.options import INTERRUPTED

COMMANDS = (demo, tasks)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments, parser)
    except KeyboardInterrupt:
        print("\nrr-flex: interrupted, no file was left half-written", file=sys.stderr)
        return INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rr-flex", description="RRAttention block-sparse prefill on FlexAttention.")
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the installed version and exit")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


class ShowVersion(argparse.Action):
    """Asks for the version only when told to: a checkout that is not installed has none."""

    def __call__(self, parser, *_) -> None:
        parser.exit(message=f"rr-flex {importlib.metadata.version('rr-flex')}\n")
