"""What the subcommands of `rr-flex` share: flags of RRConfig, devices, progress on stderr, checks of paths."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

from rr_flex.config import Mandatory, Preset, RRConfig
from rr_flex.registry import BUDGETS, ESTIMATORS

# Exit codes of every subcommand. FAILED: it ran, and what it found is bad (a check of `doctor`, a failed case).
DONE, FAILED, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace, argparse.ArgumentParser], int],
    *,
    help: str,
    description: str,
    examples: str,
    **settings: Any,
) -> argparse.ArgumentParser:
    """A subcommand whose help ends with examples, one a line; further `settings` are ArgumentParser's."""
    shown = {"epilog": examples.strip(), "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = commands.add_parser(name, help=help, description=description, **shown, **settings)
    parser.set_defaults(run=run)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json FILE writes it there; --json alone prints it in the table's place."""
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON, to FILE or in the table's place")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, for `load_causal_lm`."""
    text = "Hugging Face name, folder or .gguf file [SmolLM2-135M-Instruct]"
    parser.add_argument("--model", metavar="NAME", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype, for `device_and_dtype`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="[bfloat16 on a GPU, float32 on a CPU]")


def failed(parser: argparse.ArgumentParser, error: Exception) -> int:
    """Says on stderr what the user can mend, and exits with USAGE_ERROR."""
    parser.exit(USAGE_ERROR, f"\nrr-flex: error: {error}\n")


SETTINGS_HELP = {
    "stride": "tokens per sampled query and per pooled key",
    "query_stride": "tokens per sampled query; the stride without it",
    "key_stride": "tokens per pooled key; the stride without it",
    "pool": "what is pooled before it is scored: a stride's keys, a block's queries, or both in turn",
    "query_pool": "tokens per pooled query; the query block without it",
    "block_size": "64, 128 or QUERYxKEY tokens, as in 128x64",
    "order": "1: mean of the pooled logits, 2: and their variance",
    "variance_weight": "of the variance, order 2 only; 1/2 is right for Gaussian logits",
    "budget": "the rule that turns mass into kept blocks",
    "tau": "for top_tau: share of a row's estimated mass to keep, in (0, 1]",
    "threshold": "for threshold: keep blocks with a larger share of their row's mass than this",
    "target_density": "for density: kept / visible blocks, mean over heads",
    "mandatory": "mandatory blocks count towards tau, or are added to it",
    "sink_blocks": "key blocks always kept at the start",
    "local_blocks": "key blocks always kept up to the diagonal",
    "dense_last_rows": "block rows at the end that keep every visible block",
    "min_length": "keys under which attention is dense",
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """--preset, and a flag for every field of RRConfig."""
    settings = parser.add_argument_group("settings of the selection (RRConfig)")
    presets = {"choices": get_args(Preset), "default": "rr", "help": "where unsaid settings come from [%(default)s]"}
    settings.add_argument("--preset", **presets)
    types = {"block_size": block_size} | dict.fromkeys(("budget", "mandatory", "pool"), str)
    choices = {"budget": tuple(BUDGETS), "mandatory": get_args(Mandatory), "order": (1, 2), "pool": tuple(ESTIMATORS)}
    for field in dataclasses.fields(RRConfig):
        kind = types.get(field.name, float if isinstance(field.default, float) else int)
        text = SETTINGS_HELP[field.name] + ("" if field.default is None else f" [{field.default}]")
        shown = {"choices": choices[field.name]} if field.name in choices else {"metavar": kind.__name__.upper()}
        flag = "--" + field.name.replace("_", "-")
        settings.add_argument(flag, type=kind, help=text, **shown)


def config_of(arguments: argparse.Namespace) -> RRConfig:
    """The RRConfig that `add_settings`'s flags describe; raises what RRConfig raises."""
    said = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(RRConfig)}
    return RRConfig.from_preset(arguments.preset, **{name: x for name, x in said.items() if x is not None})


def block_size(text: str) -> int | tuple[int, int]:
    """128, or 128x64: query tokens by key tokens."""
    sizes = tuple(int(size) for size in text.split("x"))
    return sizes[0] if len(sizes) == 1 else sizes


def device_and_dtype(device: str, dtype: str) -> dict[str, object]:
    """auto: a GPU if there is one; bfloat16 on a GPU, float32 on a CPU."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that torch can use, got {device!r}: {error}") from error
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return {"device": device, "dtype": getattr(torch, dtype)}


def check_writable(flag: str, path: Path) -> None:
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"{flag} must name a file in an existing folder, got {str(path)!r}")


def quiet(stage: str, done: int = 0, of: int = 0) -> None:
    pass


class Progress:
    """The stage on stderr, with the seconds since the start: one line, rewritten; off a terminal a line every 5 s."""

    def __init__(self) -> None:
        self.start, self.shown, self.stage = perf_counter(), 0.0, ""
        self.terminal = sys.stderr.isatty()

    def __call__(self, stage: str, done: int = 0, of: int = 0) -> None:
        now = perf_counter()
        line = f"{now - self.start:6.1f} s  {stage}" + (f": layer {done} of {of}" if of else "")
        if self.terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif stage != self.stage or now - self.shown > 5:
            self.shown = now
            print(line, file=sys.stderr, flush=True)
        self.stage = stage
