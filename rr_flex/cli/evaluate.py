"""`rr-flex evaluate`. torch, transformers and matplotlib are imported only when it runs."""

import argparse
import shlex
from collections import defaultdict
from statistics import mean

from rr_flex.cli import flags
from rr_flex.cli.output import DONE, Progress, need, save_figure, say, show, told, write_json

DEFAULT_RULES = (
    "rr",
    "order 2 128×64, threshold",
    "both, order 1, 8/32",
    "best 128×64",
    "oracle mass 128×64",
)
TEXTS = ("prose:1", "code:1", "chat:1", "table:0", "key-value:0")
QUANTIZATIONS = ("int8-dynamic", "int8-weight-only", "fp8-weight-only")

EXAMPLES = """
examples:
  rr-flex evaluate
  rr-flex evaluate --text my.txt --length 8192 --output curves.png --json results.json
  rr-flex evaluate --list-rules
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    about = "compare selection rules at equal density on a real model and texts of several kinds"
    parser = flags.add_command(commands, run, about, EXAMPLES)
    flags.add_model(parser)
    flags.add_texts(parser, TEXTS)
    parser.add_argument(
        "--rules", nargs="+", default=list(DEFAULT_RULES), metavar="RULE", help=f"[{shlex.join(DEFAULT_RULES)}]"
    )
    parser.add_argument("--list-rules", action="store_true", help="print the names of all rules and exit")
    length = {"type": flags.whole(256, 128), "default": 2048, "metavar": "TOKENS"}
    parser.add_argument("--length", help="a multiple of 128 [%(default)s]", **length)
    layers = {"type": flags.listed(flags.whole(0)), "metavar": "N,..."}
    parser.add_argument("--layers", help="[three, one a third of the model]", **layers)
    densities = {"type": flags.listed(flags.share), "default": (0.25, 0.3, 0.4, 0.5), "metavar": "D,..."}
    parser.add_argument("--densities", help="[.25,.3,.4,.5]", **densities)
    parser.add_argument("--no-predictions", action="store_true", help="no runs of the model with sparse attention")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="the model's linear layers, by torchao")
    flags.add_output(parser, help="curves of error; beside it NAME-predictions.png")
    flags.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    progress = Progress(arguments)
    with told("quant" if arguments.quantize else "demo"):
        if arguments.quantize and arguments.no_predictions:
            raise ValueError(
                "--quantize must come without --no-predictions: only predictions are of the quantized model"
            )
        need("torchao", arguments.quantize)
        need("matplotlib", arguments.output)
        progress("importing torch and transformers")
        from rr_flex.cli.inputs import load, read_text
        from rr_flex.evaluation.rules import RULES
        from rr_flex.evaluation.rules_on_texts import Evaluation

        if arguments.list_rules:
            say("\n".join(RULES))
            return DONE
        unknown = [name for name in arguments.rules if name not in RULES]
        if unknown:
            raise ValueError(f"--rules must be of those that --list-rules prints, got {unknown}")
        texts = {source: read_text(source) for source in arguments.text}
        layers: tuple[int, ...] = ()

        def check(config) -> None:
            nonlocal layers
            kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
            full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
            if not full:
                raise ValueError("--model must have layers of full causal attention, got one without")
            layers = arguments.layers or tuple(full[place] for place in spread_layers(len(full)))
            if not set(layers) <= set(full):
                known = f"[0, {len(kinds)})" if len(full) == len(kinds) else f"{full}, those of full causal attention"
                raise ValueError(f"--layers must lie in {known}, got {layers}")

        prompts = load(arguments, texts, check, progress)
        title = f"{prompts.about['model']}, {arguments.length:,} tokens, layers {', '.join(map(str, layers))}"
        about = {"title": title, **prompts.about, "layers": list(layers), "quantization": arguments.quantize}
        found = Evaluation(
            rules={name: RULES[name] for name in arguments.rules},
            layers=layers,
            densities=arguments.densities,
            predict=not arguments.no_predictions,
            quantization=arguments.quantize,
        )
        try:
            found.run(prompts.model, prompts.ids, progress)
        finally:  # what was measured before an error or Ctrl-C is kept
            if found.records:
                write_json(arguments, about | found.as_dict())
    progress.done()
    show(arguments, about | found.as_dict(), table(found, title))
    if arguments.output:
        draw(arguments.output, found, title)
    return DONE


def spread_layers(count: int) -> tuple[int, ...]:
    """Three layers, in the middle of the first, second and last third of a model's."""
    return tuple(sorted({(2 * third + 1) * count // 6 for third in range(3)}))


def table(found, title: str) -> str:
    """Errors by rule and density, then what the model makes of each budget; means over layers and texts."""
    from rr_flex.evaluation.summaries import summarise

    lines = [title, "", "output error at equal density in every layer (95 % interval over texts)"]
    errors, kept = (summarise(found.records, measure) for measure in ("error", "kept"))
    densities = sorted(next(iter(errors.values())))
    lines.append(" " * 42 + "".join(f"{density:>22.2f}" for density in densities))
    for rule, row in errors.items():
        cells = (f"{row[d].mean:.4f} ({row[d].low:.4f}–{row[d].high:.4f})" for d in densities)
        lines.append(f"{rule:<42}" + "".join(f"{cell:>22}" for cell in cells))
    missed = [
        f"{kept[rule][d].mean:.2f} for {d:g} ({rule})"
        for rule in kept
        for d in densities
        if kept[rule][d].mean > d + 0.01
    ]
    if missed:
        lines.append(f"out of reach, where mandatory blocks alone are more, and what was kept: {'; '.join(missed)}")
    if found.predictions:
        heading = f"{'the model itself, mean over texts':<42}{'level':>8}{'density':>9}{'KL':>11}{'agreement':>11}"
        lines += ["", heading + f"{'perplexity':>12}"]
        runs = defaultdict(list)
        for each in found.predictions:
            shown = "" if each.level is None else f"{each.level:g}"
            runs[each.rule, shown].append((each.density, each.kl, each.agreement, each.perplexity_ratio - 1))
        for (rule, level), values in runs.items():
            cells = "{:>9.3f}{:>11.2e}{:>11.2%}{:>+12.2%}".format(*map(mean, zip(*values, strict=True)))
            lines.append(f"{rule:<42}{level:>8}{cells}")
    return "\n".join(lines)


def draw(path, found, title: str) -> None:
    from rr_flex.evaluation.pictures import error_figure, prediction_figure

    save_figure(path, error_figure(found.records, title=title))
    sparse = [each for each in found.predictions if each.rule != "dense"]
    if sparse:
        save_figure(path.with_stem(f"{path.stem}-predictions"), prediction_figure(sparse, title=title))
