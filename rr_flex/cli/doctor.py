"""`rr-flex doctor`: what this machine can do, what is missing, and the command that installs it."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from rr_flex.cli.arguments import (
    DONE,
    FAILED,
    Progress,
    add_command,
    add_json,
    add_quiet,
    check_writable,
    failed,
    quiet,
)
from rr_flex.runtime.writing import write_atomically

EXAMPLES = """
exit code: 0 where rr_attention can run, 1 where something that it needs is missing

examples:
  rr-flex doctor
  rr-flex doctor --no-compile --json
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    doctor = add_command(
        commands,
        "doctor",
        run,
        help="what this machine can do, and what is missing",
        description="Looks at torch, the devices, their backends and compilers, and compiles one small attention.",
        examples=EXAMPLES,
    )
    doctor.add_argument("--no-compile", action="store_true", help="only look: skip the attention that is compiled")
    add_json(doctor)
    add_quiet(doctor)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    progress = quiet if arguments.quiet else Progress()
    to_file = arguments.json not in (None, "-")
    if to_file:
        try:
            check_writable("--json", Path(arguments.json))
        except ValueError as error:
            return failed(parser, error)
    progress("importing torch")
    from rr_flex.cli import diagnosis as doctor

    findings = list(doctor.examine(attempt=not arguments.no_compile, progress=progress))
    progress("done")
    if not arguments.quiet:
        print(file=sys.stderr)
    document = json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2) + "\n"
    if to_file:
        write_atomically(Path(arguments.json), lambda stream: stream.write(document.encode()))
    print(document if arguments.json == "-" else doctor.table(findings))
    return FAILED if any(finding.state == "missing" for finding in findings) else DONE
