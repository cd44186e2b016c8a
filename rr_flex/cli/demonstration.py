"""`rr-flex demo`: a real model's prefill, dense and with RRAttention, as a table, as JSON and as a picture."""

import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import BinaryIO

import torch
from torch import Tensor

from rr_flex.config import RRConfig
from rr_flex.evaluation.prefill import PrefillReport, compare_prefill
from rr_flex.models.loading import device_name, embedded_gguf, load_causal_lm, tokenize
from rr_flex.view.page.block_maps_json import maps_as_json
from rr_flex.view.plots import HeadMap, block_map_figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    config: RRConfig
    model: str | None = None  # Hugging Face name, folder or .gguf file; None: the embedded SmolLM2
    text: Path | None = None  # None: the standard library's pydoc topics
    length: int = 2048  # tokens of the text to prefill
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    heads: tuple[tuple[int, int], ...] = ()  # (layer, head) to draw; (): one head of each of three layers
    maps: tuple[int, ...] | None = ()  # layers whose block maps go into the JSON; None: all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What has to be right before the long computation starts."""

    name: str
    model: torch.nn.Module
    ids: Tensor
    tokens: list[str]  # as text, one an id


def prepare(options: DemoOptions, progress: Callable[..., None]) -> Prepared:
    """Loads model and text; raises ValueError or OSError on what the user can mend."""
    name = options.model or embedded_gguf().stem
    text = default_text() if options.text is None else options.text.read_text(encoding="utf-8")
    progress(f"loading {name}")
    model, tokenizer = load_causal_lm(options.model, device=options.device, dtype=options.dtype)
    model_config = model.config.get_text_config()
    longest = getattr(model_config, "max_position_embeddings", options.length)
    if not 2 <= options.length <= longest:
        raise ValueError(f"--length must lie in [2, {longest}] for {name}, got {options.length}")
    for layer, head in options.heads:
        if layer >= model_config.num_hidden_layers or head >= model_config.num_attention_heads:
            shape = f"{model_config.num_hidden_layers} layers of {model_config.num_attention_heads} heads"
            raise ValueError(f"--heads must lie within {shape}, got {layer}:{head}")
    for layer in options.maps or ():
        if layer >= model_config.num_hidden_layers:
            raise ValueError(f"--maps must name layers below {model_config.num_hidden_layers}, got {layer}")
    ids = tokenize(tokenizer, text, options.length).to(options.device)
    tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
    return Prepared(name=name, model=model, ids=ids, tokens=tokens)


def measure(options: DemoOptions, prepared: Prepared, progress: Callable[..., None]) -> PrefillReport:
    drawn = drawn_layers(options, prepared)
    every = range(prepared.model.config.get_text_config().num_hidden_layers)
    layers = tuple(sorted({*drawn, *(every if options.maps is None else options.maps)}))
    return compare_prefill(prepared.model, prepared.ids, options.config, map_layers=layers, progress=progress)


def drawn_layers(options: DemoOptions, prepared: Prepared) -> tuple[int, ...]:
    return tuple(layer for layer, _ in options.heads) or spread_layers(prepared.model.config.get_text_config())


def default_text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def spread_layers(model_config) -> tuple[int, ...]:
    """Three layers, in the middle of the first, second and last third of the model."""
    n_layers = model_config.num_hidden_layers
    return tuple(sorted({(2 * third + 1) * n_layers // 6 for third in range(3)}))


def draw(options: DemoOptions, prepared: Prepared, report: PrefillReport, stream: BinaryIO) -> None:
    """The block maps of `options.heads`, or of each mapped layer's head of middling density, as PNG."""
    heads = options.heads or tuple(
        (layer, int(report.layers[layer].density.argsort()[len(report.layers[layer].density) // 2]))
        for layer in drawn_layers(options, prepared)
        if layer in report.maps
    )
    maps = []
    for layer, head in heads:
        each = {field.name: getattr(report.maps[layer], field.name)[head] for field in dataclasses.fields(HeadMap)[1:]}
        recall = report.layers[layer].recall[head]
        maps.append(HeadMap(title=f"layer {layer}, head {head}\nrecalled mass {recall:.1%}", **each))
    L = prepared.ids.shape[1]
    title = f"{prepared.name}, {L:,} tokens, {settings(options.config)}"
    figure = block_map_figure(maps, Lq=L, Lk=L, block_size=options.config.block_sizes, title=title)
    figure.savefig(stream, format="png", dpi=130)


def settings(config: RRConfig) -> str:
    """The budget, and whatever differs from the defaults."""
    default = RRConfig()
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name) or field.name == budget_field(config)
    }
    return ", ".join(f"{'τ' if name == 'tau' else name} = {value}" for name, value in changed.items())


def budget_field(config: RRConfig) -> str:
    return {"top_tau": "tau", "threshold": "threshold", "density": "target_density"}[config.budget]


def table(options: DemoOptions, prepared: Prepared, report: PrefillReport) -> str:
    """For people: one line a layer, means over heads, then the totals."""
    seconds = dict(report.seconds)
    compilation = seconds.pop("compilation")
    rows = [f"{'layer':>5}  {'density':>8}  {'mass recalled':>13}  {'output error':>12}"]
    for layer, measures in report.layers.items():
        values = measures.density.mean(), measures.recall.mean(), measures.error.mean()
        rows.append("{:>5}  {:>8.3f}  {:>13.4f}  {:>12.4f}".format(layer, *values))
    means = totals(report)
    rows.append(
        "{:>5}  {:>8.3f}  {:>13.4f}  {:>12.4f}".format("mean", means["density"], means["recall"], means["error"])
    )
    lm = report.language_model
    where = f"{prepared.ids.shape[1]:,} tokens, {hardware(options.device)}, {str(options.dtype).removeprefix('torch.')}"
    return "\n".join(
        [
            f"{prepared.name}, {where}, {settings(options.config)}",
            "",
            *rows,
            "",
            f"perplexity             dense {lm.perplexity:.4f}, with RR {lm.perplexity_compared:.4f} "
            f"({lm.perplexity_compared / lm.perplexity - 1:+.2%})",
            f"next token             the same at {lm.agreement:.2%} of positions",
            f"KL(dense, RR)          {lm.kl:.2e} nats a token",
            f"wall time of {len(report.layers)} layers' attention, compiled in {compilation:.0f} s:",
            *(f"  {name:<32} {value:7.2f} s" for name, value in seconds.items()),
            f"peak memory            {report.peak_memory / 2**30:.2f} GiB",
        ]
    )


def totals(report: PrefillReport) -> dict[str, float]:
    """Means over layers and heads."""
    return {
        name: torch.stack([getattr(measures, name) for measures in report.layers.values()]).mean().item()
        for name in ("density", "recall", "error")
    }


def as_json(options: DemoOptions, prepared: Prepared, report: PrefillReport) -> str:
    """For machines: the same numbers, per head."""
    layers = [
        {
            "layer": layer,
            **{field.name: getattr(measures, field.name).tolist() for field in dataclasses.fields(measures)},
        }
        for layer, measures in report.layers.items()
    ]
    document = {
        "model": prepared.name,
        "tokens": prepared.ids.shape[1],
        "config": dataclasses.asdict(options.config),
        "device": hardware(options.device),
        "dtype": str(options.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mean": totals(report),
        "layers": layers,
        "language_model": dataclasses.asdict(report.language_model),
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory,
    }
    wanted = report.maps if options.maps is None else {n: report.maps[n] for n in options.maps if n in report.maps}
    if wanted:
        document["maps"] = maps_as_json(
            wanted, length=prepared.ids.shape[1], block_size=options.config.block_sizes, tokens=prepared.tokens
        )
    return json.dumps(document, indent=2) + "\n"


def hardware(device: str) -> str:
    """The device's name, and on a CPU its threads, which the times depend on."""
    name = device_name(device)
    return f"{name}, {torch.get_num_threads()} threads" if name == "CPU" else name
