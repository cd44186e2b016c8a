"""`rr-flex page`: one HTML page from the JSON of other commands."""

import argparse
from pathlib import Path

from rr_flex.cli import flags
from rr_flex.cli.output import DONE, say, told
from rr_flex.runtime.writing import write_atomically

EXAMPLES = """
examples:
  rr-flex demo --maps all --json run.json && rr-flex page run.json -o page.html
  rr-flex page benchmarks/results/lengths.jsonl run.json -o both.html
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    about = "write one HTML page that needs no network: tables and interactive block maps"
    parser = flags.add_command(commands, run, about, EXAMPLES, aliases=["report"])
    files = "JSON of demo, evaluate or tasks, or JSON lines of benchmarks"
    parser.add_argument("files", type=Path, nargs="+", metavar="RUN.json", help=files)
    output = {"type": flags.new_file, "default": Path("rr-flex-page.html"), "metavar": "HTML"}
    parser.add_argument("-o", "--output", help="[%(default)s]", **output)
    parser.add_argument("--title", help="the page's title [the run's own]")


def run(arguments: argparse.Namespace) -> int:
    with told():
        from rr_flex.view.page import make_page, read_runs

        runs = [run for path in arguments.files for run in read_runs(path)]
        page = make_page(runs, title=arguments.title).encode()
    write_atomically(arguments.output, lambda stream: stream.write(page))
    say(f"{arguments.output}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
    return DONE
