"""What the subcommands of `rr-flex` give: tables, JSON, pictures, progress, errors in one line, exit codes."""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from rr_flex.runtime.writing import write_atomically

# Exit codes of every subcommand. FAILED: it ran, and what it found is bad (a check of `doctor`, a failed case).
DONE, FAILED, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130


def save_figure(path: Path, figure: Any) -> None:
    """As the name's end says: PNG, PDF or SVG."""
    write_atomically(path, lambda stream: figure.savefig(stream, format=path.suffix[1:], dpi=130))


def write_json(arguments: argparse.Namespace, document: Any) -> None:
    """Where --json says, to a file; "-" is left to `show`."""
    if arguments.json not in (None, "-"):
        text = json.dumps(document, indent=2) + "\n"
        write_atomically(arguments.json, lambda stream: stream.write(text.encode()))


def show(arguments: argparse.Namespace, document: Any, table: str) -> None:
    """The table on stdout, or with --json alone the document; with --json FILE both."""
    write_json(arguments, document)
    say(json.dumps(document, indent=2) if arguments.json == "-" else table)


def say(text: str) -> None:
    """On stdout. A reader that has gone (`| head`) has seen enough; what is still to be written is."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def told(extra: str = "demo") -> Iterator[None]:
    """What the user can mend (a value, a file, a package) becomes one line on stderr and USAGE_ERROR.

    A package that is missing is installed by `extra`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rr_flex"):
            raise
        install = "" if "pip install" in str(error) else f"; install it with: pip install 'rr-flex[{extra}]'"
        stop(f"{error}{install}", error)
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        stop(str(error), error)


def need(package: str, asked: Any) -> None:
    """ModuleNotFoundError for a package that is `asked` for and missing."""
    if asked and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"this needs {package}", name=package)


def stop(message: str, error: Exception):
    print("rr-flex: error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(USAGE_ERROR) from error


class Progress:
    """The stage on stderr, with the seconds since the start: one line, rewritten; off a terminal a line every 15 s."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.start, self.shown, self.stage = perf_counter(), 0.0, ""
        self.stream = io.StringIO() if arguments.quiet else sys.stderr

    def __call__(self, stage: str, done: int = 0, of: int = 0) -> None:
        now = perf_counter()
        line = f"{now - self.start:6.1f} s  {stage}" + (f": {done} of {of}" if of else "")
        if self.stream.isatty():
            print(f"\r\033[K{line}", end="", file=self.stream, flush=True)
        elif stage != self.stage or now - self.shown > 15:
            self.shown = now
            print(line, file=self.stream, flush=True)
        self.stage = stage

    def done(self) -> None:
        """The terminal's line is cleared."""
        if self.stream.isatty():
            print("\r\033[K", end="", file=self.stream, flush=True)
