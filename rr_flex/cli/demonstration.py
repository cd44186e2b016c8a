"""What `rr-flex demo` measures on a real model's prefill, as a table with its point, as JSON and as a picture."""

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from matplotlib.figure import Figure

from rr_flex.cli import on_a_card
from rr_flex.cli.evaluate import spread_layers
from rr_flex.cli.inputs import Prompts
from rr_flex.config import RRConfig
from rr_flex.evaluation.prefill import PrefillComparison, compare_prefill
from rr_flex.models.loading import device_name
from rr_flex.tasks.results import describe
from rr_flex.view.page.block_maps_json import maps_as_json
from rr_flex.view.plots import HeadMap, block_map_figure

MEASURES = ("density", "recall", "error")
ROW = "{:>5}  {:>8.3f}  {:>13.4f}  {:>12.4f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    config: RRConfig
    preset: str  # that the config came from
    heads: tuple[tuple[int, int], ...] = ()  # (layer, head) to draw; (): one head of each of three layers
    maps: tuple[int, ...] | None = ()  # layers whose block maps go into the JSON; None: all


def default_text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def measure(prompts: Prompts, wanted: Wanted, progress: Callable[..., None]) -> PrefillComparison:
    """Raises ValueError for a model whose attention this cannot judge."""
    every = range(prompts.model.config.get_text_config().num_hidden_layers)
    layers = {layer for layer, _ in wanted.heads} or set(spread_layers(len(every)))
    layers |= set(every if wanted.maps is None else wanted.maps)
    (ids,) = prompts.ids.values()
    return compare_prefill(prompts.model, ids, wanted.config, map_layers=tuple(sorted(layers)), progress=progress)


def totals(found: PrefillComparison) -> dict[str, float]:
    """Means over layers and heads."""
    layers = found.layers.values()
    return {name: torch.stack([getattr(each, name) for each in layers]).mean().item() for name in MEASURES}


def table(prompts: Prompts, wanted: Wanted, found: PrefillComparison, picture: Path) -> str:
    """For people: one line a layer, means over heads; what that comes to; what a card would make of it; what next."""
    rows = [f"{'layer':>5}  {'density':>8}  {'mass recalled':>13}  {'output error':>12}"]
    for layer, measures in found.layers.items():
        rows.append(ROW.format(layer, *(getattr(measures, name).mean() for name in MEASURES)))
    mean, lm, about = totals(found), found.language_model, prompts.about
    rows.append(ROW.format("mean", *mean.values()))
    card, shape = on_a_card.TIMES["card"], on_a_card.TIMES["shape"]
    lines = [
        f"{prompts.name}, {about['tokens']:,} tokens, {hardware(prompts.device)}, {about['dtype']}, "
        f"{title(wanted.config)}",
        "",
        *rows,
        "",
        f"{mean['density']:.0%} of the blocks hold {mean['recall']:.1%} of the attention's mass.",
        f"The next token is the same at {lm.agreement:.2%} of positions; perplexity {lm.perplexity:.4f} dense, "
        f"{lm.perplexity_compared:.4f} with RR ({lm.perplexity_compared / lm.perplexity - 1:+.2%}); "
        f"KL {lm.kl:.2e} nats a token.",
        *missed(wanted.config, mean["density"]),
        "",
        f"What that saves on a GPU ({card}, one layer of {shape}; measured, selection included):",
        on_a_card.table(mean["density"], wanted.preset),
        "Density falls as texts grow longer; `--length 4096` shows by how much.",
        "",
        *here(found),
        f"Pictures of true mass, kept blocks and error: {picture}",
        f"Try next: {next_command(wanted)}",
    ]
    return "\n".join(lines)


def here(found: PrefillComparison) -> list[str]:
    """What it took on this machine."""
    seconds = found.seconds
    dense, sparse = (
        next(value for name, value in seconds.items() if name.startswith(kind)) for kind in ("dense", "rr_")
    )
    faster = "which is faster here" if dense < sparse else "which is slower here"
    return [
        f"On this machine {len(found.layers)} layers' attention took {sparse:.2f} s with rr_attention (compiled in "
        f"{seconds['compilation']:.0f} s), {dense:.2f} s dense,",
        f"{faster}: it pays on long texts. Peak memory {found.peak_memory / 2**30:.2f} GiB.",
        "",
    ]


def missed(config: RRConfig, density: float) -> list[str]:
    """Why a density that was asked for was not reached."""
    if config.budget != "density" or abs(density - config.target_density) < 0.02:
        return []
    why = "mandatory blocks alone are more" if density > config.target_density else "ties are kept or dropped as one"
    return [f"The density asked for was {config.target_density:g}; {density:.2f} was reached: {why}."]


def next_command(wanted: Wanted) -> str:
    if wanted.preset == "rr":
        return "rr-flex demo --preset best --length 4096      (a better rule, a longer text)"
    return "rr-flex demo --text YOUR.txt --preset best --maps all --json run.json && rr-flex page run.json"


def title(config: RRConfig) -> str:
    """The settings that differ from the defaults, the budget's number among them."""
    return describe(config).replace("tau=", "τ = ")


def picture(prompts: Prompts, wanted: Wanted, found: PrefillComparison) -> Figure:
    """True mass, kept blocks and error of `wanted.heads`, or of three layers' heads of middling density."""
    heads = wanted.heads or tuple(
        (layer, int(found.layers[layer].density.argsort()[len(found.layers[layer].density) // 2]))
        for layer in spread_layers(prompts.model.config.get_text_config().num_hidden_layers)
        if layer in found.maps
    )
    maps = []
    for layer, head in heads:
        own = {field.name: getattr(found.maps[layer], field.name)[head] for field in dataclasses.fields(HeadMap)[1:]}
        recall = found.layers[layer].recall[head]
        maps.append(HeadMap(title=f"layer {layer}, head {head}\nrecalled mass {recall:.1%}", **own))
    L, block_size = prompts.about["tokens"], wanted.config.block_sizes
    about = f"{prompts.name}, {L:,} tokens, {title(wanted.config)}"
    columns = ("true", "kept", "error")
    return block_map_figure(maps, Lq=L, Lk=L, block_size=block_size, title=about, columns=columns)


def document(prompts: Prompts, wanted: Wanted, found: PrefillComparison) -> dict[str, Any]:
    """For machines: the same numbers, per head."""
    written = prompts.about | {
        "config": dataclasses.asdict(wanted.config),
        "device": hardware(prompts.device),
        "python": platform.python_version(),
        "mean": totals(found),
        "layers": [
            {"layer": layer} | {name: getattr(measures, name).tolist() for name in MEASURES}
            for layer, measures in found.layers.items()
        ],
        "language_model": dataclasses.asdict(found.language_model),
        "seconds": found.seconds,
        "peak_memory_bytes": found.peak_memory,
    }
    maps = found.maps if wanted.maps is None else {n: found.maps[n] for n in wanted.maps if n in found.maps}
    if maps:
        (ids,) = prompts.ids.values()
        tokens = [prompts.tokenizer.decode([token]) for token in ids[0].tolist()]
        size = wanted.config.block_sizes
        written["maps"] = maps_as_json(maps, length=written["tokens"], block_size=size, tokens=tokens)
    return written


def hardware(device: str) -> str:
    """The device's name, and on a CPU its threads, which the times depend on."""
    name = device_name(device)
    return f"{name}, {torch.get_num_threads()} threads" if name == "CPU" else name
