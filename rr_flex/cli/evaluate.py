"""`rr-flex evaluate`. torch, transformers and matplotlib are imported only when it runs."""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

from rr_flex.cli.arguments import (
    Progress,
    add_command,
    add_device,
    add_json,
    add_model,
    add_quiet,
    check_writable,
    device_and_dtype,
    failed,
    quiet,
)

DEFAULT_RULES = (
    "rr",
    "order 2 128×64, threshold",
    "both, order 1, 8/32 (fast)",
    "both, order 2, 8/32 (best)",
    "oracle mass 128×64",
)


EXAMPLES = """
examples:
  rr-flex evaluate
  rr-flex evaluate --text my.txt --length 8192 --output curves.png --json results.json
  rr-flex evaluate --list-rules
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        run,
        help="output error and predictions of selection rules against density",
        description="Compares selection rules at equal density on a real model and texts of several kinds.",
        examples=EXAMPLES,
    )
    add_model(evaluate)
    evaluate.add_argument(
        "--text",
        nargs="+",
        metavar="FILE|KIND:PART",
        default=["prose:1", "code:1", "chat:1", "table:0", "key-value:0"],
        help="UTF-8 files, or parts of the standard library's prose, code, chat, table, key-value [%(default)s]",
    )
    evaluate.add_argument("--rules", nargs="+", default=list(DEFAULT_RULES), metavar="RULE", help="[%(default)s]")
    evaluate.add_argument("--list-rules", action="store_true", help="print the names of all rules and exit")
    evaluate.add_argument("--length", type=int, default=2048, metavar="TOKENS", help="a multiple of 128 [%(default)s]")
    evaluate.add_argument("--layers", type=numbers(int), metavar="N,...", help="[three, one a third of the model]")
    evaluate.add_argument(
        "--densities", type=numbers(float), default=(0.25, 0.3, 0.4, 0.5), metavar="D,...", help="[.25,.3,.4,.5]"
    )
    evaluate.add_argument("--no-predictions", action="store_true", help="no runs of the model with sparse attention")
    evaluate.add_argument("--quantize", metavar="KIND", help="int8-dynamic, int8-weight-only, fp8-weight-only")
    add_device(evaluate)
    evaluate.add_argument("--output", type=Path, metavar="PNG", help="curves of error; beside it NAME-predictions.png")
    add_json(evaluate)
    add_quiet(evaluate)


def numbers(kind: type):
    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(","))

    return parse


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    progress = quiet if arguments.quiet else Progress()
    try:
        if arguments.output:
            check_writable("--output", arguments.output)
        if arguments.json not in (None, "-"):
            check_writable("--json", Path(arguments.json))
        if arguments.length % 128 or arguments.length < 256:
            raise ValueError(f"--length must be a multiple of 128 from 256 on, got {arguments.length}")
        if not all(0 < density <= 1 for density in arguments.densities):
            raise ValueError(f"--densities must lie in (0, 1], got {arguments.densities}")
        progress("importing torch and transformers")
        with contextlib.redirect_stderr(io.StringIO()) if arguments.quiet else contextlib.nullcontext():
            found, about = measure(arguments, progress)
    except (ValueError, OSError, ModuleNotFoundError, NotImplementedError) as error:
        return failed(parser, error)
    if found is None:
        print("\n".join(about))
        return 0
    progress("done")
    print(file=sys.stderr)
    document = json.dumps(about | found.as_dict()) + "\n"
    if arguments.json not in (None, "-"):
        Path(arguments.json).write_text(document, encoding="utf-8")
    if arguments.output:
        draw(arguments.output, found, about["title"])
    print(document if arguments.json == "-" else table(found, about), end="")
    return 0


def measure(arguments: argparse.Namespace, progress):
    """(Evaluation, what was run), or (None, names) for --list-rules."""
    import torch

    from rr_flex.evaluation.rules import RULES
    from rr_flex.evaluation.rules_on_texts import QUANTIZATIONS, evaluate
    from rr_flex.evaluation.texts import KINDS, sample_text
    from rr_flex.models.loading import embedded_gguf, load_causal_lm, tokenize

    if arguments.list_rules:
        return None, list(RULES)
    unknown = [name for name in arguments.rules if name not in RULES]
    if unknown:
        raise ValueError(f"--rules must be of those that --list-rules prints, got {unknown}")
    if arguments.quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"--quantize must be one of {', '.join(QUANTIZATIONS)}, got {arguments.quantize!r}")
    texts = {}
    for source in arguments.text:
        kind, _, part = source.partition(":")
        texts[source] = sample_text(kind, int(part or 0)) if kind in KINDS else Path(source).read_text(encoding="utf-8")
    name = arguments.model or embedded_gguf().stem
    progress(f"loading {name}")
    where = device_and_dtype(arguments.device, arguments.dtype)
    model, tokenizer = load_causal_lm(arguments.model, **where)
    n_layers = model.config.get_text_config().num_hidden_layers
    layers = arguments.layers or tuple(sorted({(2 * third + 1) * n_layers // 6 for third in range(3)}))
    if max(layers) >= n_layers or min(layers) < 0:
        raise ValueError(f"--layers must lie in [0, {n_layers}), got {layers}")
    ids = {source: tokenize(tokenizer, text, arguments.length).to(where["device"]) for source, text in texts.items()}
    found = evaluate(
        model,
        ids,
        {name: RULES[name] for name in arguments.rules},
        layers=layers,
        densities=arguments.densities,
        predict=not arguments.no_predictions,
        quantization=arguments.quantize,
        progress=progress,
    )
    about = {
        "title": f"{name}, {arguments.length:,} tokens, layers {', '.join(map(str, layers))}",
        "model": name,
        "tokens": arguments.length,
        "layers": list(layers),
        "texts": list(texts),
        "quantization": arguments.quantize,
        "dtype": str(where["dtype"]).removeprefix("torch."),
        "torch": torch.__version__,
    }
    return found, about


def table(found, about: dict) -> str:
    """Errors by rule and density, then what the model makes of each budget; means over layers and texts."""
    from rr_flex.evaluation.summaries import summarise

    lines = [about["title"], "", "output error at equal density in every layer (95 % interval over texts)"]
    summary = summarise(found.records, scope="layer")
    densities = sorted(next(iter(summary.values())))
    lines.append(" " * 42 + "".join(f"{density:>22.2f}" for density in densities))
    for rule, row in summary.items():
        cells = (f"{row[d].mean:.4f} ({row[d].low:.4f}–{row[d].high:.4f})" for d in densities)
        lines.append(f"{rule:<42}" + "".join(f"{cell:>22}" for cell in cells))
    if found.predictions:
        heading = f"{'the model itself, mean over texts':<42}{'level':>8}{'density':>9}{'KL':>11}{'agreement':>11}"
        lines += ["", heading + f"{'perplexity':>12}"]
        by_run: dict[tuple, list] = {}
        for each in found.predictions:
            by_run.setdefault((each.rule, each.level), []).append(each)
        for (rule, level), runs in by_run.items():

            def mean(field: str, runs=runs) -> float:
                return sum(getattr(each, field) for each in runs) / len(runs)

            shown = "" if level is None else f"{level:g}"
            lines.append(
                f"{rule:<42}{shown:>8}{mean('density'):>9.3f}{mean('kl'):>11.2e}{mean('agreement'):>11.2%}"
                f"{mean('perplexity_ratio') - 1:>+12.2%}"
            )
    return "\n".join(lines) + "\n"


def draw(path: Path, found, title: str) -> None:
    from rr_flex.evaluation.curves import error_figure, prediction_figure

    error_figure(found.records, title=title).savefig(path, dpi=130)
    sparse = [each for each in found.predictions if each.rule != "dense"]
    if sparse:
        prediction_figure(sparse, title=title).savefig(path.with_stem(f"{path.stem}-predictions"), dpi=130)
