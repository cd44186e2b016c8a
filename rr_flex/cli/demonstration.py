"""What `rr-flex demo` measures on a real model's prefill, as a table with its point, as JSON and as a picture."""

import dataclasses
import platform
from argparse import Namespace
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from matplotlib.figure import Figure

from rr_flex.cli import on_a_card
from rr_flex.cli.evaluate import spread_layers
from rr_flex.cli.inputs import Prompts
from rr_flex.config import RRConfig
from rr_flex.evaluation.prefill import PrefillComparison, compare_prefill
from rr_flex.tasks.results import describe
from rr_flex.view.page.block_maps_json import maps_as_json
from rr_flex.view.plots import HeadMap, block_map_figure

MEASURES = ("density", "recall", "error")
ROW = "{:>5}  {:>8.3f}  {:>13.4f}  {:>12.4f}"


def default_text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def measure(prompts: Prompts, config: RRConfig, arguments: Namespace, progress: Callable[..., None]) -> "Demonstration":
    """Raises ValueError for a model whose attention this cannot judge."""
    every = range(prompts.model.config.get_text_config().num_hidden_layers)
    layers = sorted({*spread_layers(len(every)), *(every if arguments.maps is None else arguments.maps)})
    (ids,) = prompts.ids.values()
    found = compare_prefill(prompts.model, ids, config, map_layers=tuple(layers), progress=progress)
    return Demonstration(prompts, config, arguments, found)


@dataclasses.dataclass(frozen=True)
class Demonstration:
    prompts: Prompts
    config: RRConfig
    arguments: Namespace  # of the command
    found: PrefillComparison

    @property
    def heading(self) -> str:
        """The model, and the settings that differ from the defaults, the budget's number among them."""
        about = self.prompts.about
        return f"{about['model']}, {about['tokens']:,} tokens, {describe(self.config).replace('tau=', 'τ = ')}"

    @property
    def mean(self) -> dict[str, float]:
        """Means over layers and heads."""
        layers = self.found.layers.values()
        return {name: torch.stack([getattr(each, name) for each in layers]).mean().item() for name in MEASURES}

    def table(self) -> str:
        """For people: a line a layer, means over heads; what that comes to; what a card would make of it; what next."""
        rows = [f"{'layer':>5}  {'density':>8}  {'mass recalled':>13}  {'output error':>12}"]
        for layer, measures in self.found.layers.items():
            rows.append(ROW.format(layer, *(getattr(measures, name).mean() for name in MEASURES)))
        mean, lm, about = self.mean, self.found.language_model, self.prompts.about
        card, shape = on_a_card.TIMES["card"], on_a_card.TIMES["shape"]
        lines = [
            f"{self.heading}, {about['device']}, {about['dtype']}",
            "",
            *rows,
            ROW.format("mean", *mean.values()),
            "",
            f"{mean['density']:.0%} of the blocks hold {mean['recall']:.1%} of the attention's mass.",
            f"The next token is the same at {lm.agreement:.2%} of positions; perplexity {lm.perplexity:.4f} dense, "
            f"{lm.perplexity_compared:.4f} with RR ({lm.perplexity_compared / lm.perplexity - 1:+.2%}); "
            f"KL {lm.kl:.2e} nats a token.",
            "",
            f"What that saves on a GPU ({card}, one layer of {shape}; measured, selection included):",
            on_a_card.table(mean["density"], self.arguments.preset),
            "Density falls as texts grow longer; `--length 4096` shows by how much.",
            "",
            *self._here(),
            "",
            f"Pictures of true mass, kept blocks and error: {self.arguments.output}",
            f"Try next: {self._next()}",
        ]
        return "\n".join(lines)

    def _here(self) -> list[str]:
        """What it took on this machine."""
        seconds = self.found.seconds
        dense, sparse = (
            next(value for name, value in seconds.items() if name.startswith(kind)) for kind in ("dense", "rr_")
        )
        return [
            f"On this machine {len(self.found.layers)} layers' attention took {sparse:.2f} s with rr_attention "
            f"(compiled in {seconds['compilation']:.0f} s), {dense:.2f} s dense,",
            f"which is {'faster' if dense < sparse else 'slower'} here: it pays on long texts. "
            f"Peak memory {self.found.peak_memory / 2**30:.2f} GiB.",
        ]

    def _next(self) -> str:
        if self.arguments.preset == "rr":
            return "rr-flex demo --preset best --length 4096      (a better rule, a longer text)"
        return "rr-flex demo --text YOUR.txt --preset best --maps all --json run.json && rr-flex page run.json"

    def picture(self) -> Figure:
        """True mass, kept blocks and error of three layers' heads of middling density."""
        maps = []
        for layer in spread_layers(self.prompts.model.config.get_text_config().num_hidden_layers):
            if layer in self.found.maps:
                own, measures = vars(self.found.maps[layer]), self.found.layers[layer]
                head = int(measures.density.argsort()[len(measures.density) // 2])
                title = f"layer {layer}, head {head}\nrecalled mass {measures.recall[head]:.1%}"
                maps.append(HeadMap(title=title, **{name: values[head] for name, values in own.items()}))
        L, columns = self.prompts.about["tokens"], ("true", "kept", "error")
        size = self.config.block_sizes
        return block_map_figure(maps, Lq=L, Lk=L, block_size=size, title=self.heading, columns=columns)

    def document(self) -> dict[str, Any]:
        """For machines: the same numbers, per head."""
        found, maps = self.found, self.arguments.maps
        written = {"title": self.heading, **self.prompts.about} | {
            "python": platform.python_version(),
            "peak_memory_bytes": found.peak_memory,
            "mean": self.mean,
            "language_model": dataclasses.asdict(found.language_model),
            "layers": [
                {"layer": layer} | {name: getattr(measures, name).tolist() for name in MEASURES}
                for layer, measures in found.layers.items()
            ],
            "seconds": found.seconds,
            "config": dataclasses.asdict(self.config),
        }
        maps = found.maps if maps is None else {layer: found.maps[layer] for layer in maps if layer in found.maps}
        if maps:
            (ids,) = self.prompts.ids.values()
            tokens = [self.prompts.tokenizer.decode([token]) for token in ids[0].tolist()]
            size = self.config.block_sizes
            written["maps"] = maps_as_json(maps, length=written["tokens"], block_size=size, tokens=tokens)
        return written
