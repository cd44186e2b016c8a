"""The command `rr-flex`: a parser of subcommands, each of which imports what it needs only when it runs."""

import argparse
import importlib.metadata
import sys

from rr_flex.cli import calibrate, demo, doctor, evaluate, page, plan, tasks, tune
from rr_flex.cli.flags import Parser, files_must_differ
from rr_flex.cli.output import INTERRUPTED, told

COMMANDS = (demo, evaluate, calibrate, tasks, page, tune, plan, doctor)

EPILOG = """\
start here:
  rr-flex doctor           what this machine can do, and what is missing
  rr-flex demo             a real model, dense and sparse, in about a minute
  rr-flex demo --help      every command's help ends with examples

exit codes: 0 done, 1 it ran and found something bad, 2 wrong usage, 130 interrupted"""


def main(argv: list[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    with told():
        files_must_differ(arguments)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\nrr-flex: interrupted, no file was left half-written", file=sys.stderr)
        return INTERRUPTED


def make_parser() -> Parser:
    about = {"description": "RRAttention block-sparse prefill on FlexAttention.", "epilog": EPILOG}
    parser = Parser(prog="rr-flex", formatter_class=argparse.RawDescriptionHelpFormatter, **about)
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the installed version and exit")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


class ShowVersion(argparse.Action):
    """Asks for the version only when told to: a checkout that is not installed has none."""

    def __call__(self, parser, *_) -> None:
        parser.exit(message=f"rr-flex {importlib.metadata.version('rr-flex')}\n")
