"""`rr-flex doctor`: what this machine can do, what is missing, and the command that installs it."""

import argparse
import dataclasses

from rr_flex.cli.arguments import DONE, FAILED, Progress, add_command, add_json, show, write_json

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
        EXAMPLES,
        help="what this machine can do, and what is missing",
        description="Looks at torch, the devices, their backends and compilers, and compiles one small attention.",
    )
    doctor.add_argument("--no-compile", action="store_true", help="only look: skip the attention that is compiled")
    add_json(doctor)


def run(arguments: argparse.Namespace) -> int:
    progress = Progress(arguments.quiet)
    progress("importing torch")
    from rr_flex.cli import diagnosis

    findings = list(diagnosis.examine(attempt=not arguments.no_compile, progress=progress))
    progress.done()
    document = [dataclasses.asdict(finding) for finding in findings]
    write_json(arguments, document)
    show(arguments, document, diagnosis.table(findings))
    return FAILED if any(finding.state == "missing" for finding in findings) else DONE
