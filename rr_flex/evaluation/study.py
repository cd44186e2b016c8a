"""Rules compared at equal density on captured q, k and v: errors and recall by rule, density, text and layer.

`python -m rr_flex.evaluation.study capture FOLDER --texts prose:0,code:1 --layers 6,14` writes what a model attends
with, `python -m rr_flex.evaluation.study run FOLDER --json FILE` judges RULES on it, on a GPU if there is one.
"""

import argparse
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rr_flex.evaluation.block_outputs import KeptBlocks, output_errors, true_blocks
from rr_flex.evaluation.equal_density import kept_at_density
from rr_flex.evaluation.estimators import RULES, Case, Rule
from rr_flex.evaluation.low_precision import LOW_PRECISION
from rr_flex.evaluation.measures import density as density_of
from rr_flex.evaluation.measures import recalled_mass
from rr_flex.geometry import ceil_div, diagonal_blocks

DENSITIES = (0.2, 0.25, 0.3, 0.4, 0.5)
SCOPES = ("layer", "model")  # what has the density: every layer on its own, or one level for all layers of a text


class Record(NamedTuple):
    """One rule at one density on one layer of one text."""

    rule: str
    scope: str
    density: float
    text: str
    layer: int
    kept: float  # kept / visible blocks, mean over heads
    error: float  # ‖out − dense‖ / ‖dense‖ of a head, mean over heads
    layer_error: float  # the same of all heads' outputs as one vector
    recall: float  # share of the true mass in kept blocks, mean over heads


def judge_text(
    text: str,
    layers: dict[int, tuple[Tensor, Tensor, Tensor]],
    rules: dict[str, Rule],
    densities: Sequence[float] = DENSITIES,
    scopes: Sequence[str] = SCOPES,
) -> list[Record]:
    """All rules on all layers (q, k, v) of one text; batch 1, L a multiple of 128."""
    sizes = sorted({rule.block_size for rule in rules.values()})
    true = {layer: true_blocks(*qkv, sizes) for layer, qkv in layers.items()}
    weights = {
        (name, layer): rule.weigh(Case(*layers[layer], true[layer])) for layer in layers for name, rule in rules.items()
    }
    chosen: dict[int, list[KeptBlocks]] = {layer: [] for layer in layers}
    labels = []
    L = next(iter(layers.values()))[0].shape[2]
    blocks = {size: visible_and_mandatory(L, size, next(iter(layers.values()))[0].device) for size in sizes}
    for name, rule in rules.items():
        visible, mandatory = blocks[rule.block_size]
        for scope in scopes:
            groups = [[layer] for layer in layers] if scope == "layer" else [list(layers)]
            for density in densities:
                labels.append((name, scope, density))
                for group in groups:
                    weight = torch.cat([weights[name, layer] for layer in group], 1)
                    kept = kept_at_density(weight, visible, mandatory, density=density, spending=rule.spending)
                    for layer, own in zip(group, kept.chunk(len(group), 1), strict=True):
                        chosen[layer].append(KeptBlocks(own, rule.block_size))
    records = []
    for layer, qkv in layers.items():
        errors = output_errors(*qkv, chosen[layer])
        for number, (label, selection) in enumerate(zip(labels, chosen[layer], strict=True)):
            visible, _ = blocks[selection.block_size]
            measured = (
                density_of(selection.kept, visible).mean(),
                errors.per_head[number].mean(),
                errors.per_layer[number].mean(),
                recalled_mass(true[layer][selection.block_size].mass, selection.kept).mean(),
            )
            records.append(Record(*label, text, layer, *(round(x.item(), 5) for x in measured)))
    return records


def visible_and_mandatory(L: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Causal; sink, diagonal and last block row are mandatory, as by default. Each [1, 1, nQ, nK]."""
    row = torch.arange(ceil_div(L, size[0]), device=device)[:, None]
    column = torch.arange(ceil_div(L, size[1]), device=device)
    visible = column * size[1] < (row + 1) * size[0]
    mandatory = (column == 0) | diagonal_blocks(row, column, L, size, 0, 0) | (row == row.max())
    return visible[None, None], (visible & mandatory)[None, None]


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def over_texts(values: dict[str, Sequence[float]], draws: int = 1000, seed: int = 0) -> Interval:
    """Mean over texts of each text's mean, with the 95 % interval of a bootstrap that draws whole texts."""
    means = [sum(each) / len(each) for each in values.values()]
    drawn = random.Random(seed)
    again = sorted(sum(drawn.choices(means, k=len(means))) / len(means) for _ in range(draws))
    return Interval(sum(means) / len(means), again[int(0.025 * draws)], again[math.ceil(0.975 * draws) - 1])


def summarise(
    records: Iterable[Record], *, scope: str, measure: str = "error", texts: Callable[[str], bool] = lambda text: True
) -> dict[str, dict[float, Interval]]:
    """By rule and density: the measure's mean over layers and texts, with an interval over texts."""
    found: dict[tuple[str, float], dict[str, list[float]]] = {}
    for record in records:
        if record.scope == scope and texts(record.text):
            by_text = found.setdefault((record.rule, record.density), {})
            by_text.setdefault(record.text, []).append(getattr(record, measure))
    summary: dict[str, dict[float, Interval]] = {}
    for (rule, density), by_text in found.items():
        summary.setdefault(rule, {})[density] = over_texts(by_text)
    return summary


def gain_over(
    records: Iterable[Record], rule: str, baseline: str, density: float, *, scope: str, texts=lambda text: True
) -> Interval:
    """1 − error of the rule / error of the baseline, paired by text: the mean over texts, with its interval."""
    errors: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if record.scope == scope and record.density == density and record.rule in (rule, baseline):
            errors.setdefault((record.text, record.rule), []).append(record.error)
    names = {text for text, _ in errors if texts(text)}
    return over_texts({text: [1 - sum(errors[text, rule]) / sum(errors[text, baseline])] for text in sorted(names)})


def capture(folder: Path, texts: Sequence[tuple[str, int]], length: int, layers: Sequence[int], model: str | None):
    """q, k and v of some layers of a dense prefill, float16, a file each: KINDpart_LENGTH_LAYER.pt."""
    from rr_flex.evaluation.texts import sample_text
    from rr_flex.models.attention import attention_by
    from rr_flex.models.loading import load_causal_lm, tokenize

    folder.mkdir(parents=True, exist_ok=True)
    network, tokenizer = load_causal_lm(model)
    for kind, part in texts:
        ids = tokenize(tokenizer, sample_text(kind, part), length)
        save = _saver(folder, f"{kind}{part}_{length}", layers)
        with torch.no_grad(), attention_by(network, save):
            network.base_model(ids, use_cache=False)
        print(f"{kind}:{part}, {length} tokens, layers {', '.join(map(str, layers))}", flush=True)


def _saver(folder: Path, name: str, layers: Sequence[int]):
    def attend(q, k, v, *, layer, scale, window):
        if layer in layers:
            if window is not None or not math.isclose(scale, q.shape[-1] ** -0.5):
                raise NotImplementedError(f"layer {layer} must be causal with scale 1/√D, got {window=}, {scale=}")
            torch.save(
                {n: x.half().clone() for n, x in zip("qkv", (q, k, v), strict=True)}, folder / f"{name}_{layer}.pt"
            )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)

    return attend


def captured_layers(folder: Path, length: int, layers: Sequence[int] | None, device: str):
    """(text, {layer: (q, k, v)}) for each text of a folder, float32 on the device, a text at a time."""
    names: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob(f"*_{length}_*.pt")):
        match = re.fullmatch(r"([a-z-]+\d+)_\d+_(\d+)", path.stem)
        if match and (layers is None or int(match[2]) in layers):
            names.setdefault(match[1], {})[int(match[2])] = path
    for text, files in names.items():
        loaded = {layer: torch.load(files[layer], weights_only=True) for layer in sorted(files)}
        yield text, {layer: tuple(x[n].float().to(device) for n in "qkv") for layer, x in loaded.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rr_flex.evaluation.study", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    capturing, running = commands.add_parser("capture"), commands.add_parser("run")
    for each in (capturing, running):
        each.add_argument("folder", type=Path)
        each.add_argument("--length", type=int, default=8192)
        each.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")])
        each.add_argument("--texts", type=lambda text: text.split(","), help="KIND:PART,... [all]")
    capturing.add_argument("--model")
    running.add_argument("--rules", nargs="*", help=f"of {'; '.join(RULES)} [all]")
    running.add_argument("--json", type=Path, required=True)
    running.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.command == "capture":
        texts = [(kind, int(part)) for kind, part in (text.split(":") for text in arguments.texts)]
        capture(arguments.folder, texts, arguments.length, arguments.layers, arguments.model)
        return
    known = RULES | LOW_PRECISION
    rules = RULES if not arguments.rules else {name: known[name] for name in arguments.rules}
    records: list[Record] = []
    wanted = None if arguments.texts is None else {text.replace(":", "") for text in arguments.texts}
    with torch.no_grad():
        for text, layers in captured_layers(arguments.folder, arguments.length, arguments.layers, arguments.device):
            if wanted is None or text in wanted:
                records += judge_text(text, layers, rules)
                print(text, flush=True)
                write_records(arguments.json, records)


WORDS = ("rule", "scope", "text")  # columns of few different words, stored once each


def write_records(path: Path, records: Sequence[Record]) -> None:
    """As columns, so that thousands of records stay small."""
    columns: dict[str, list] = {name: [getattr(record, name) for record in records] for name in Record._fields}
    for name in WORDS:
        words = list(dict.fromkeys(columns[name]))
        number = {word: index for index, word in enumerate(words)}
        columns[name] = [number[word] for word in columns[name]]
        columns[f"{name}s"] = words
    path.write_text(json.dumps(columns, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    columns = json.loads(path.read_text(encoding="utf-8"))
    for name in WORDS:
        if f"{name}s" in columns:
            columns[name] = [columns[f"{name}s"][index] for index in columns[name]]
    return [Record(*row) for row in zip(*(columns[name] for name in Record._fields), strict=True)]


if __name__ == "__main__":
    main()
