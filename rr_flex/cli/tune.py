"""`rr-flex tune`: hands over to `python -m benchmarks tune`, a program beside the packages that a clone has."""

import argparse
import subprocess
import sys
from pathlib import Path

from rr_flex.cli import flags
from rr_flex.cli.output import told

ROOT = Path(__file__).parents[2]

EXAMPLES = """
Everything after `tune` goes to `python -m benchmarks tune`; `rr-flex tune --help` shows its options.

examples:
  rr-flex tune
  rr-flex tune --head-dims 128 --dtypes bfloat16 --what break-even --table rr_flex/kernels/tuned.json
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    about = "find kernel options and the break-even with dense attention for this GPU (in a clone of the repository)"
    # Options are the other program's: here they are words like any other.
    parser = flags.add_command(commands, run, about, EXAMPLES, add_help=False, prefix_chars="+")
    parser.add_argument("options", nargs="*", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    with told():
        if not (ROOT / "benchmarks" / "__main__.py").is_file():
            raise FileNotFoundError(
                f"tune must run in a clone of the repository, which has benchmarks/ beside rr_flex/, got {ROOT}; "
                "install the clone with: pip install -e ."
            )
    command = [sys.executable, "-m", "benchmarks", "tune", *arguments.options]
    return subprocess.run(command, cwd=ROOT, check=False).returncode
