"""`rr-flex report`: one page from the JSON of other commands."""

import argparse
import json
import sys
from pathlib import Path

from rr_flex.cli.arguments import add_command, add_json, add_quiet, check_writable, failed
from rr_flex.runtime.writing import write_atomically

EXAMPLES = """
examples:
  rr-flex demo --maps all --json run.json && rr-flex report run.json -o report.html
  rr-flex report benchmarks/results/lengths.jsonl run.json -o both.html
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    report = add_command(
        commands,
        "report",
        run,
        help="one HTML page, with interactive block maps, from the JSON of other commands",
        description="Writes one HTML page that needs no network: tables, charts and interactive block maps.",
        examples=EXAMPLES,
    )
    files = "JSON of demo, evaluate or tasks, or JSON lines of benchmarks"
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN.json", help=files)
    page = {"type": Path, "default": Path("rr-flex-report.html"), "metavar": "HTML"}
    report.add_argument("-o", "--output", help="[%(default)s]", **page)
    report.add_argument("--title", help="the page's title [the run's own]")
    add_json(report)
    add_quiet(report)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from rr_flex.view.page import read_runs, report_page

    try:
        check_writable("--output", arguments.output)
        if arguments.json not in (None, "-"):
            check_writable("--json", Path(arguments.json))
        runs = [run for path in arguments.runs for run in read_runs(path)]
    except (ValueError, OSError) as error:
        return failed(parser, error)
    page = report_page(runs, title=arguments.title).encode()
    write_atomically(arguments.output, lambda stream: stream.write(page))
    if arguments.json is not None:
        about = {"output": str(arguments.output), "bytes": len(page), "runs": [str(path) for path in arguments.runs]}
        document = json.dumps(about, indent=2)
        if arguments.json == "-":
            print(document)
        else:
            write_atomically(Path(arguments.json), lambda stream: stream.write(document.encode()))
    if not arguments.quiet:
        print(f"{arguments.output}: {len(runs)} run{'s' if len(runs) > 1 else ''}", file=sys.stderr)
    return 0
