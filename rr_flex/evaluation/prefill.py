"""One prompt through a Hugging Face model twice, dense and with RRAttention in every layer, measured layer by layer."""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import PreTrainedModel

from mask_mods import SpanMask, sliding_window
from rr_flex.attention import rr_attention
from rr_flex.config import RRConfig
from rr_flex.evaluation.language_model import LanguageModelComparison, compare_logits
from rr_flex.evaluation.measures import density, output_error, recalled_mass
from rr_flex.evaluation.true_mass import true_block_mass
from rr_flex.kernels.options import attention_options
from rr_flex.models.attention_by import attention_by
from rr_flex.pipeline import select_blocks
from rr_flex.result import Selection


@dataclass(frozen=True, kw_only=True)
class LayerMeasures:
    """What RR would do to one layer's attention on the dense run's own q, k, v; each [Hq]."""

    density: Float[Tensor, "Hq"]  # kept blocks / visible blocks
    recall: Float[Tensor, "Hq"]  # true mass in kept blocks / true mass
    error: Float[Tensor, "Hq"]  # ‖out - dense‖ / ‖dense‖


@dataclass(frozen=True, kw_only=True)
class LayerMaps:
    """One layer's block maps, batch 0, each [Hq, nQ, nK], on the CPU."""

    true_mass: Float[Tensor, "Hq nQ nK"]
    estimated_mass: Float[Tensor, "Hq nQ nK"]
    kept: Bool[Tensor, "Hq nQ nK"]
    visible: Bool[Tensor, "Hq nQ nK"]
    row_error: Float[Tensor, "Hq nQ"]  # ‖out - dense‖ / ‖dense‖ of each block row


@dataclass(frozen=True, kw_only=True)
class PrefillComparison:
    """What one prompt says of a selection."""

    layers: dict[int, LayerMeasures]  # by layer; a layer without softmax attention has none
    maps: dict[int, LayerMaps]  # by layer, for the layers that were asked for
    language_model: LanguageModelComparison
    seconds: dict[str, float]  # wall time over all layers, compilation apart
    peak_memory: int  # bytes; of the GPU's allocator, or of the whole process on a CPU


@dataclass
class Stopwatch:
    """Wall time by name. The first call under a key runs twice, and the first time counts as "compilation"."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: {"compilation": 0.0})
    warm: set = field(default_factory=set)

    def __call__(self, name: str, variant: object, function: Callable, *args, **settings):
        if (name, variant) not in self.warm:
            self.warm.add((name, variant))
            self._run("compilation", function, *args, **settings)
        return self._run(name, function, *args, **settings)

    def _run(self, name: str, function: Callable, *args, **settings):
        self._synchronize()
        start = perf_counter()
        result = function(*args, **settings)
        self._synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start
        return result

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def compare_prefill(
    model: PreTrainedModel,
    ids: Int[Tensor, "1 L"],
    config: RRConfig,
    *,
    map_layers: tuple[int, ...] = (),
    progress: Callable[..., None] = lambda stage, done=0, of=0: None,
) -> PrefillComparison:
    """Runs `ids` dense, measuring what RR would change in each layer, then with RR in every layer.

    Models whose attention is causal, optionally with a sliding window; batch 1, no padding. Without a `min_length`
    every length is selected from: what is measured is the selection.
    """
    if config.min_length is None:
        config = config.with_settings({"min_length": 0})
    device = ids.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timed = Stopwatch(device)
    # Every layer has one shape. A dynamic one can fail to compile on a CPU (torch 2.13): its kernel template renames
    # size symbols by substring, and the mask_mod's captured map has sizes.
    attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    n_layers = model.config.get_text_config().num_hidden_layers
    layers: dict[int, LayerMeasures] = {}
    maps: dict[int, LayerMaps] = {}

    def dense_and_measure(q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor:
        mask_mod = mask_of(window)
        dense = timed("dense attention, torch's SDPA", window, dense_attention, q, k, v, scale, mask_mod)
        choice = {"mask_mod": mask_mod, "scale": scale, "config": config}
        selection = timed("select_blocks, eager", window, select_blocks, q, k, **choice)
        options = attention_options(q, config.block_sizes)
        settings = {"block_mask": selection.block_mask, "scale": scale, "enable_gqa": True, "kernel_options": options}
        sparse = timed("flex_attention over its blocks", window, attend, q, k, v, **settings)
        true_mass = true_block_mass(q, k, block_size=config.block_sizes, mask_mod=mask_mod, scale=scale)
        layers[layer] = measure(selection, true_mass, sparse, dense)
        if layer in map_layers:
            maps[layer] = keep_maps(selection, true_mass, row_errors(sparse, dense, config.block_sizes[0]))
        progress("dense prefill and measures", layer + 1, n_layers)
        return dense

    def sparse(q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor:
        mask_mod = mask_of(window)
        choice = {"mask_mod": mask_mod, "scale": scale, "config": config}
        out = timed("rr_attention, both in one graph", window, rr_attention, q, k, v, **choice)
        progress("prefill with rr_attention", layer + 1, n_layers)
        return out

    progress("compiling flex_attention")
    with attention_by(model, dense_and_measure):
        reference = model(ids, use_cache=False).logits[0]
    progress("compiling rr_attention")
    with attention_by(model, sparse):
        compared = model(ids, use_cache=False).logits[0]
    return PrefillComparison(
        layers=layers,
        maps=maps,
        language_model=compare_logits(reference, compared, ids[0]),
        seconds=timed.seconds,
        peak_memory=peak_memory(device),
    )


def mask_of(window: int | None) -> SpanMask | None:
    """None is causal, in every call that takes it."""
    return None if window is None else sliding_window(window)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask_mod: SpanMask | None) -> Tensor:
    settings = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if mask_mod is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **settings)
    position = torch.arange(q.shape[2], device=q.device)
    visible = mask_mod(position.new_zeros(()), position.new_zeros(()), position[:, None], position)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, **settings)


def measure(selection: Selection, true_mass: Tensor, sparse: Tensor, dense: Tensor) -> LayerMeasures:
    return LayerMeasures(
        density=density(selection.kept, selection.visible)[0].cpu(),
        recall=recalled_mass(true_mass, selection.kept)[0].cpu(),
        error=output_error(sparse, dense)[0].cpu(),
    )


def row_errors(out: Tensor, dense: Tensor, q_block: int) -> Float[Tensor, "B Hq nQ"]:
    """`output_error` of each block row by itself."""
    pairs = zip(out.split(q_block, 2), dense.split(q_block, 2), strict=True)
    return torch.stack([output_error(*pair) for pair in pairs], 2)


def keep_maps(selection: Selection, true_mass: Tensor, row_error: Tensor) -> LayerMaps:
    return LayerMaps(
        true_mass=true_mass[0].cpu(),
        estimated_mass=selection.mass[0].cpu(),
        kept=selection.kept[0].cpu(),
        visible=selection.visible.expand_as(selection.kept)[0].cpu(),
        row_error=row_error[0].cpu(),
    )


def peak_memory(device: torch.device) -> int:
    """Bytes; since the process began on a CPU, since the last reset on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
