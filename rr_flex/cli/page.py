"""`rr-flex page`: one HTML page from the JSON of other commands."""

import argparse
import sys
from pathlib import Path

from rr_flex.cli.arguments import DONE, add_command, add_json, new_file, show, told, write_json
from rr_flex.runtime.writing import write_atomically

EXAMPLES = """
examples:
  rr-flex demo --maps all --json run.json && rr-flex page run.json -o page.html
  rr-flex page benchmarks/results/lengths.jsonl run.json -o both.html
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    page = add_command(
        commands,
        "page",
        run,
        EXAMPLES,
        aliases=["report"],
        help="one HTML page, with interactive block maps, from the JSON of other commands",
        description="Writes one HTML page that needs no network: tables, charts and interactive block maps.",
    )
    files = "JSON of demo, evaluate or tasks, or JSON lines of benchmarks"
    page.add_argument("files", type=Path, nargs="+", metavar="RUN.json", help=files)
    output = {"type": new_file, "default": Path("rr-flex-page.html"), "metavar": "HTML"}
    page.add_argument("-o", "--output", help="[%(default)s]", **output)
    page.add_argument("--title", help="the page's title [the run's own]")
    add_json(page)


def run(arguments: argparse.Namespace) -> int:
    with told():
        from rr_flex.view.page import make_page, read_runs

        runs = [run for path in arguments.files for run in read_runs(path)]
        page = make_page(runs, title=arguments.title).encode()
    write_atomically(arguments.output, lambda stream: stream.write(page))
    about = {"output": str(arguments.output), "bytes": len(page), "runs": [str(path) for path in arguments.files]}
    write_json(arguments, about)
    if arguments.json == "-":
        show(arguments, about, "")
    if not arguments.quiet:
        print(f"{arguments.output}: {len(runs)} run{'s' if len(runs) > 1 else ''}", file=sys.stderr)
    return DONE
