"""`rr-flex doctor`: what this machine can do, what is missing, and the command that installs it."""

import argparse

from rr_flex.cli import flags
from rr_flex.cli.output import DONE, FAILED, Progress, show

EXAMPLES = """
exit code: 0 where rr_attention can run, 1 where something that it needs is missing

examples:
  rr-flex doctor
  rr-flex doctor --no-compile --json
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = flags.add_command(commands, run, "tell what this machine can do, and what is missing", EXAMPLES)
    parser.add_argument("--no-compile", action="store_true", help="only look: skip the attention that is compiled")
    flags.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    progress = Progress(arguments)
    progress("importing torch, compiling a small attention")
    from rr_flex.cli import diagnosis

    findings = list(diagnosis.examine(attempt=not arguments.no_compile))
    progress.done()
    show(arguments, [finding._asdict() for finding in findings], diagnosis.table(findings))
    return FAILED if any(finding.state == "missing" for finding in findings) else DONE
