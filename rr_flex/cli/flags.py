"""What the subcommands of `rr-flex` are asked for: flags and their checks. Help imports it, so it imports no torch."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rr_flex.cli.output import USAGE_ERROR

if TYPE_CHECKING:
    from rr_flex.config import RRConfig

PICTURES = (".png", ".pdf", ".svg")
PRESETS = ("rr", "best", "fast")
DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where help is."""

    def error(self, message: str):
        message = message.removeprefix("argument ").replace(": must ", " must ", 1)
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}   ({self.prog} --help)\n")


def add_command(commands: argparse._SubParsersAction, run: Callable, about: str, examples: str, **more: Any) -> Parser:
    """The subcommand named as `run`'s module; its help ends with examples, one a line. `more` is ArgumentParser's."""
    about = {"help": about, "description": f"{about[0].upper()}{about[1:]}.", "epilog": examples.strip()}
    name, form = run.__module__.split(".")[-1], argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, formatter_class=form, **about, **more)
    parser.set_defaults(run=run)
    return parser


def add_output(parser: argparse.ArgumentParser, **about: Any) -> None:
    parser.add_argument("--output", type=picture, metavar="PNG", **about)


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json FILE writes it there; --json alone prints it in the table's place. And --quiet."""
    text = "JSON, to FILE or in the table's place"
    parser.add_argument("--json", nargs="?", const="-", type=json_target, metavar="FILE", help=text)
    add_quiet(parser)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --device and --dtype, for `rr_flex.cli.inputs`."""
    text = "Hugging Face name, folder or .gguf file [SmolLM2-135M-Instruct]"
    parser.add_argument("--model", metavar="NAME", help=text)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="[bfloat16 on a GPU, float32 on a CPU]"
    )


def add_texts(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """--text, for `rr_flex.cli.inputs`."""
    text = f"UTF-8 files, or parts of the standard library's prose, code, chat, table, key-value [{' '.join(default)}]"
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


def new_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must name a file in an existing folder that can be written to, got {text!r}")
    return path


def new_folder(text: str) -> Path:
    path = Path(text)
    above = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise argparse.ArgumentTypeError(f"must name a folder that can be written to, got {text!r}")
    return path


def old_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must name a file that exists, got {text!r}")
    return Path(text)


def picture(text: str) -> Path:
    if Path(text).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(PICTURES)}, got {text!r}")
    return new_file(text)


def json_target(text: str) -> Path | str:
    return text if text == "-" else new_file(text)


def files_must_differ(arguments: argparse.Namespace) -> None:
    """ValueError where two arguments name one file: what is written to it would take the other's place."""
    named = []
    for value in vars(arguments).values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Path) or (isinstance(each, str) and Path(each).is_file()):
                named.append(Path(each).resolve())
    for path in named:
        if named.count(path) > 1:
            raise ValueError(f"files must differ, got {path} twice")


def block_size(text: str) -> int | tuple[int, int]:
    """128, or 128x64: query tokens by key tokens."""
    sizes = text.split("x")
    if not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"must be 64, 128 or QUERYxKEY of them, got {text!r}")
    return int(sizes[0]) if len(sizes) == 1 else tuple(int(size) for size in sizes)


# field of RRConfig, which checks it: (how its value is read, help, what is taken where it is not said)
SETTINGS = {
    "stride": (int, "tokens per sampled query and per pooled key", "8"),
    "query_stride": (int, "tokens per sampled query", "the stride"),
    "key_stride": (int, "tokens per pooled key", "the stride"),
    "pool": (str, "pooled before it is scored: keys of a stride, queries of a block, or both in turn", "keys"),
    "query_pool": (int, "tokens per pooled query", "the query block"),
    "block_size": (block_size, "64, 128 or QUERYxKEY tokens, as in 128x64", "128"),
    "order": (int, "1: mean of the pooled logits, 2: and their variance", "1"),
    "variance_weight": (float, "of the variance, order 2 only", "0.5"),
    "budget": (str, "turns mass into kept blocks: top_tau, threshold, scaled_threshold or density", "top_tau"),
    "tau": (float, "for top_tau: share of a row's estimated mass to keep, in (0, 1]", "0.95"),
    "threshold": (
        float,
        "for the thresholds: keep blocks with a larger share of their row's mass",
        "0.01",
    ),
    "target_density": (float, "for density: kept / visible blocks, mean over heads", "0.4"),
    "mandatory": (str, "mandatory blocks count towards tau, or are added (add)", "count"),
    "sink_blocks": (int, "key blocks always kept at the start", "1"),
    "local_blocks": (int, "key blocks always kept up to the diagonal", "1"),
    "dense_last_rows": (int, "block rows at the end that keep every visible block", "1"),
    "min_length": (int, "keys under which attention is dense", "0; in tasks dense where that is faster"),
}


def add_preset(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--preset", choices=PRESETS, default=default, help="where unsaid settings come from [%(default)s]"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """--preset, and a flag for every field of RRConfig."""
    add_preset(parser, "rr")
    settings = parser.add_argument_group("settings of the selection (RRConfig)")
    for field, (kind, text, unsaid) in SETTINGS.items():
        flag = "--" + field.replace("_", "-")
        settings.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=f"{text} [{unsaid}]")


def config_of(arguments: argparse.Namespace) -> "RRConfig":
    """The RRConfig that the flags describe; raises what RRConfig raises."""
    from rr_flex.config import RRConfig

    said = {field: value for field in SETTINGS if (value := getattr(arguments, field)) is not None}
    return RRConfig.from_preset(arguments.preset, **said)
