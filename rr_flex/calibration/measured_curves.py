"""What each threshold of each head gives on texts: density, error and recall, from one dense prefill a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from rr_flex.calibration.sensitivity import Felt, output_gradients
from rr_flex.config import RRConfig
from rr_flex.evaluation.block_outputs import KeptBlocks, output_errors
from rr_flex.evaluation.plain import plain_selection
from rr_flex.evaluation.sparse_model import attend_densely, hidden_states
from rr_flex.mandatory import mandatory_blocks
from rr_flex.mass import row_share
from rr_flex.selection import select_threshold

THRESHOLDS = tuple(2.0 ** -(1 + step / 2) for step in range(37))  # from 1/2 down to 2^-19, half an octave each
WAITING_ELEMENTS = 1 << 25  # of queries of layers judged at once

Progress = Callable[..., None]


@dataclass(frozen=True)
class Curves:
    """What each threshold gives, mean over texts."""

    layers: list[int]
    density: Float[Tensor, "layers Hq thresholds"]  # kept / visible blocks
    # Squared, over the squared norm of the layer's whole output; by prediction: nats a token, see sensitivity.py.
    error: Float[Tensor, "layers Hq thresholds"]
    recall: Float[Tensor, "layers Hq thresholds"]  # share of the true mass
    # Of each text each layer's blocks' shares of their rows, on the CPU: 1/8,192 as many numbers as pairs, or less.
    shares: list[dict[int, Float[Tensor, "Hq nQ nK"]]] = field(default_factory=list)
    by_prediction: bool = False  # what `error` is


@torch.no_grad()
def measure_curves(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    config: RRConfig,
    progress: Progress,
    *,
    by_prediction: bool = False,
    every: int = 1,
) -> Curves:
    """One dense prefill a text; every threshold of every head judged on its q, k and v: by the error of the layer's
    output or, for a backward more, by what that error does to the model's prediction. `every`: errors
    on one of so many strips of 64 queries; densities are of all."""
    found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    shares: list[dict[int, Tensor]] = []
    waiting: list[tuple[int, Felt]] = []  # layers judged together: fewer, larger operations
    n_layers = model.config.get_text_config().num_hidden_layers

    def judge() -> None:
        if not waiting:
            return
        numbers, layers = zip(*waiting, strict=True)
        waiting.clear()
        *judged, share = _measure_thresholds(layers, config, every)
        for layer, own, *measured in zip(numbers, share, *judged, strict=True):
            found.setdefault(layer, []).append(measured)
            shares[-1][layer] = own
        progress("measuring thresholds", numbers[-1] + 1, n_layers)

    def add(layer: int, felt: Felt) -> None:
        if waiting and (felt.q.shape, felt.scale) != (waiting[0][1].q.shape, waiting[0][1].scale):
            judge()
        waiting.append((layer, felt))
        if len(waiting) * felt.q.numel() >= WAITING_ELEMENTS:
            judge()

    def attend(q, k, v, *, layer, scale, window):
        if window is None:
            add(layer, Felt(q, k, v, scale, None))
        return attend_densely(q, k, v, layer=layer, scale=scale, window=window)

    for ids in texts:
        shares.append({})
        if by_prediction:
            for layer, felt in output_gradients(model, ids).items():
                add(layer, felt)
        else:
            hidden_states(model, ids, attend)
        judge()
    if not found:
        raise ValueError("model must have a layer of full causal attention, got none")
    layers = sorted(found)
    mean = [torch.stack([torch.stack(each).mean(0) for each in zip(*found[layer], strict=True)]) for layer in layers]
    return Curves(layers, *torch.stack(mean, 1), shares, by_prediction)


def _measure_thresholds(layers: Sequence[Felt], config: RRConfig, every: int) -> list[Tensor]:
    """Density, squared error and recall [layers, Hq, thresholds], and shares of rows; layers are the batch."""
    q, k, v = (torch.cat(part) for part in list(zip(*layers, strict=True))[:3])
    scale, gradient = layers[0].scale, None
    if layers[0].gradient is not None:
        gradient = torch.cat([layer.gradient for layer in layers])
    selection = plain_selection(q, k, config=config, scale=scale)
    visible = selection.visible
    mandatory = mandatory_blocks(visible, config, Lq=q.shape[2], q_offset=0)
    kept = [select_threshold(selection.mass, level, visible, mandatory) for level in THRESHOLDS]
    blocks = [KeptBlocks(each, config.block_sizes) for each in kept]
    errors = output_errors((q, k, v), blocks, scale=scale, gradient=gradient, every=every)
    density = torch.stack([each.sum((2, 3)) for each in kept]) / visible.sum((2, 3))
    # Nats a token: half of what the squared change sums to, over the positions.
    unit = errors.reference.sum(-1, keepdim=True) if gradient is None else 2 * errors.queries
    measured = (density.double(), errors.difference / unit, errors.recall)
    return [*(x.permute(1, 2, 0).cpu() for x in measured), row_share(selection.mass).cpu()]
