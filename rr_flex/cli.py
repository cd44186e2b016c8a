"""The command `rr-flex`. transformers and matplotlib are imported only when the demo runs."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import sys
from pathlib import Path
from time import perf_counter
from typing import get_args

from rr_flex.config import Budget, Mandatory, RRConfig

USAGE_ERROR, INTERRUPTED = 2, 130


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments, parser)
    except KeyboardInterrupt:
        print("\nrr-flex: interrupted, no file was left half-written", file=sys.stderr)
        return INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rr-flex", description="RRAttention block-sparse prefill on FlexAttention.")
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the installed version and exit")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="prefill a real model dense and with RRAttention, and compare",
        description="Prefills a real model with a long text, dense and with RRAttention, and compares the two.",
    )
    demo.set_defaults(run=run_demo)
    add_demo_arguments(demo)
    return parser


class ShowVersion(argparse.Action):
    """Asks for the version only when told to: a checkout that is not installed has none."""

    def __call__(self, parser, *_) -> None:
        parser.exit(message=f"rr-flex {importlib.metadata.version('rr-flex')}\n")


SETTINGS_HELP = {
    "stride": "tokens per sampled query and per pooled key",
    "query_stride": "tokens per sampled query; the stride without it",
    "key_stride": "tokens per pooled key; the stride without it",
    "block_size": "64, 128 or QUERYxKEY tokens, as in 128x64",
    "order": "1: mean of a stride's logits, 2: and half their variance",
    "budget": "the rule that turns mass into kept blocks",
    "tau": "for top_tau: share of a row's estimated mass to keep, in (0, 1]",
    "threshold": "for threshold: keep blocks with a larger share of their row's mass than this",
    "mandatory": "mandatory blocks count towards tau, or are added to it",
    "sink_blocks": "key blocks always kept at the start",
    "local_blocks": "key blocks always kept up to the diagonal",
    "dense_last_rows": "block rows at the end that keep every visible block",
}


def add_demo_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--model", metavar="NAME", help="Hugging Face name, folder or .gguf file [SmolLM2-135M-Instruct]")
    demo.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to prefill [Python's own documentation]")
    demo.add_argument("--length", type=int, default=2048, metavar="TOKENS", help="tokens to prefill [%(default)s]")
    demo.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    demo.add_argument("--dtype", choices=dtypes, default="auto", help="[bfloat16 on a GPU, float32 on a CPU]")
    demo.add_argument("--heads", type=head_list, default=(), metavar="LAYER:HEAD,...", help="to draw [three of them]")
    demo.add_argument("--output", type=Path, default=Path("rr-flex-demo.png"), metavar="PNG", help="[%(default)s]")
    demo.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON, to FILE or in the table's place")
    demo.add_argument("--quiet", action="store_true", help="no progress on stderr")
    settings = demo.add_argument_group("settings of the selection (RRConfig)")
    types = {"block_size": block_size, "budget": str, "mandatory": str}
    choices = {"budget": get_args(Budget), "mandatory": get_args(Mandatory), "order": (1, 2)}
    for field in dataclasses.fields(RRConfig):
        kind = types.get(field.name, float if isinstance(field.default, float) else int)
        text = SETTINGS_HELP[field.name] + ("" if field.default is None else " [%(default)s]")
        shown = {"choices": choices[field.name]} if field.name in choices else {"metavar": kind.__name__.upper()}
        flag = "--" + field.name.replace("_", "-")
        settings.add_argument(flag, type=kind, default=field.default, help=text, **shown)


def block_size(text: str) -> int | tuple[int, int]:
    """128, or 128x64: query tokens by key tokens."""
    sizes = tuple(int(size) for size in text.split("x"))
    return sizes[0] if len(sizes) == 1 else sizes


def head_list(text: str) -> tuple[tuple[int, int], ...]:
    """5:0,15:3 is head 0 of layer 5 and head 3 of layer 15."""
    pairs = [pair.split(":") for pair in text.split(",")]
    return tuple((int(layer), int(head)) for layer, head in pairs)


def run_demo(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    progress = quiet if arguments.quiet else Progress()
    try:
        config = RRConfig(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(RRConfig)})
        check_writable("--output", arguments.output)
        if arguments.json not in (None, "-"):
            check_writable("--json", Path(arguments.json))
        progress("importing torch and transformers")
        demo = import_demo()
        options = demo.DemoOptions(
            config=config,
            model=arguments.model,
            text=arguments.text,
            length=arguments.length,
            heads=arguments.heads,
            **device_and_dtype(arguments.device, arguments.dtype),
        )
        # The model's own loading bars go to stderr.
        with contextlib.redirect_stderr(io.StringIO()) if arguments.quiet else contextlib.nullcontext():
            prepared = demo.prepare(options, progress)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(USAGE_ERROR, f"\nrr-flex: error: {error}\n")

    report = demo.measure(options, prepared, progress)
    progress("drawing")
    demo.write_atomically(arguments.output, lambda stream: demo.draw(options, prepared, report, stream))
    if arguments.json not in (None, "-"):
        document = demo.as_json(options, prepared, report).encode()
        demo.write_atomically(Path(arguments.json), lambda stream: stream.write(document))
    progress("done")
    print(file=sys.stderr)
    print(demo.as_json(options, prepared, report) if arguments.json == "-" else demo.table(options, prepared, report))
    print(f"block maps: {arguments.output}", file=sys.stderr)
    return 0


def import_demo():
    try:
        from rr_flex import demo
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rr_flex"):
            raise
        raise ModuleNotFoundError(
            f"the demo needs {error.name}; install it with: pip install 'rr-flex[demo]'"
        ) from error
    return demo


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
