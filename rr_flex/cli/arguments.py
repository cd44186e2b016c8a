"""What the subcommands of `rr-flex` share: checked arguments, texts, devices, progress. Imports no torch."""

import argparse
import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from rr_flex.runtime.writing import write_atomically

# Exit codes of every subcommand. FAILED: it ran, and what it found is bad (a check of `doctor`, a failed case).
DONE, FAILED, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130

PICTURES = (".png", ".pdf", ".svg")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where help is."""

    def error(self, message: str):
        message = message.removeprefix("argument ").replace(": must ", " must ", 1)
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}   ({self.prog} --help)\n")


def add_command(commands: argparse._SubParsersAction, name: str, run: Callable, examples: str, **about: Any) -> Parser:
    """A subcommand whose help ends with examples, one a line; `about` (help, description, …) is ArgumentParser's."""
    parser = commands.add_parser(
        name, epilog=examples.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, **about
    )
    parser.set_defaults(run=run)
    return parser


def add_output(parser: argparse.ArgumentParser, **about: Any) -> None:
    parser.add_argument("--output", type=picture, metavar="PNG", **about)


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json FILE writes it there; --json alone prints it in the table's place. And --quiet."""
    text = "JSON, to FILE or in the table's place"
    parser.add_argument("--json", nargs="?", const="-", type=json_target, metavar="FILE", help=text)
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --device and --dtype, for `rr_flex.cli.inputs`."""
    text = "Hugging Face name, folder or .gguf file [SmolLM2-135M-Instruct]"
    parser.add_argument("--model", metavar="NAME", help=text)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="[bfloat16 on a GPU, float32 on a CPU]")


def add_texts(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """--text, for `rr_flex.cli.inputs`."""
    text = "UTF-8 files, or parts of the standard library's prose, code, chat, table, key-value [%(default)s]"
    parser.add_argument("--text", nargs="+", metavar="FILE|KIND:PART", default=list(default), help=text)


def bounded(kind: type, rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A parser of one finite number for which `rule` holds."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not holds(value):
            sort = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {sort} {rule}, got {text!r}")
        return value

    return parse


def whole(least: int, multiple: int = 1) -> Callable[[str], int]:
    rule = f"of at least {least}" + (f" and a multiple of {multiple}" if multiple > 1 else "")
    return bounded(int, rule, lambda value: value >= least and value % multiple == 0)


share = bounded(float, "in (0, 1]", lambda value: 0 < value <= 1)
positive = bounded(float, "above 0", lambda value: value > 0)


def listed(parse: Callable[[str], Any]) -> Callable[[str], tuple]:
    """A parser of values between commas."""
    return lambda text: tuple(parse(part) for part in text.split(","))


def name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must be names between commas, got an empty one")
    return text


def new_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must name a file in an existing folder that can be written to, got {text!r}")
    return path


def picture(text: str) -> Path:
    if Path(text).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(PICTURES)}, got {text!r}")
    return new_file(text)


def json_target(text: str) -> Path | str:
    return text if text == "-" else new_file(text)


def save_figure(path: Path, figure: Any) -> None:
    """As the name's end says: PNG, PDF or SVG."""
    write_atomically(path, lambda stream: figure.savefig(stream, format=path.suffix[1:], dpi=130))


def write_json(arguments: argparse.Namespace, document: Any) -> None:
    """Where --json says, to a file; "-" is left to `show`."""
    if arguments.json not in (None, "-"):
        text = json.dumps(document, indent=2) + "\n"
        write_atomically(arguments.json, lambda stream: stream.write(text.encode()))


def show(arguments: argparse.Namespace, document: Any, table: str) -> None:
    """The table on stdout, or with --json alone the document."""
    print(json.dumps(document, indent=2) if arguments.json == "-" else table)


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


def stop(message: str, error: Exception | None = None):
    print("rr-flex: error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(USAGE_ERROR) from error


class Progress:
    """The stage on stderr, with the seconds since the start: one line, rewritten; off a terminal a line every 15 s."""

    def __init__(self, quiet: bool) -> None:
        self.start, self.shown, self.stage = perf_counter(), 0.0, ""
        self.stream = io.StringIO() if quiet else sys.stderr

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
