"""Rules compared at equal density on a model's q, k and v: errors and recall by rule, density, text and layer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rr_flex.evaluation.block_outputs import TOKENS, KeptBlocks, output_errors
from rr_flex.evaluation.equal_density import kept_at_densities, visible_and_mandatory
from rr_flex.evaluation.measures import density as density_of
from rr_flex.evaluation.rules import Case, Rule

DENSITIES = (0.2, 0.25, 0.3, 0.4, 0.5)
GROUP_ELEMENTS = {"cpu": 1 << 27, "cuda": 1 << 30}  # of one tensor; few small operations keep a GPU waiting


class Record(NamedTuple):
    """One rule at one density on one layer of one text."""

    rule: str
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
    judged: Sequence[int] | None = None,
) -> list[Record]:
    """All rules on all layers (q, k, v) of one text, or on those in `judged`; batch 1, L a multiple of 128."""
    judged = list(layers) if judged is None else list(judged)
    Hq, L, D = layers[judged[0]][0].shape[1:]
    device = layers[judged[0]][0].device
    sizes = sorted({rule.block_size for rule in rules.values()})
    blocks = {size: visible_and_mandatory(L, size, device) for size in sizes}
    cases = [Case(*_stack(layers, group), group) for group in _groups(judged, Hq * L * L // 8, device)]
    chosen: list[KeptBlocks] = []  # of all judged layers at once
    labels = []
    for name, rule in rules.items():
        visible, mandatory = blocks[rule.block_size]
        weight = torch.cat([rule.weigh(case) for case in cases])
        found = kept_at_densities(weight, visible, mandatory, densities=densities, spending=rule.spending)
        chosen += [KeptBlocks(kept, rule.block_size) for kept in found]
        labels += [(name, density) for density in densities]
    measured = torch.zeros(len(judged), len(chosen), 4, dtype=torch.float64, device="cpu")
    for group in _groups(range(len(judged)), Hq * len(chosen) * TOKENS * (D + 1), device):
        own = [KeptBlocks(each.kept[group[0] : group[-1] + 1], each.block_size) for each in chosen]
        qkv = _stack(layers, [judged[number] for number in group])
        measured[group] = _measure(qkv, own, blocks).cpu()
    return [
        Record(*label, text, layer, *(round(x, 6) for x in row))
        for layer, rows in zip(judged, measured.tolist(), strict=True)
        for label, row in zip(labels, rows, strict=True)
    ]


def _groups(numbers: Sequence[int], elements: int, device: torch.device) -> list[list[int]]:
    """Layers to be taken at once, so that what an operation makes, `elements` a layer, fits in memory."""
    size = max(1, GROUP_ELEMENTS[device.type] // elements)
    return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def _stack(layers: dict[int, tuple[Tensor, ...]], group: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.cat([layers[layer][part].float() for layer in group]) for part in range(3))


def _measure(
    qkv: tuple[Tensor, Tensor, Tensor],
    chosen: Sequence[KeptBlocks],
    blocks: dict[tuple[int, int], tuple[Tensor, Tensor]],
) -> Float[Tensor, "layers n 4"]:
    """Density, error, layer error and recall of each selection in each layer."""
    errors = output_errors(qkv, chosen)
    density = torch.stack([density_of(each.kept, blocks[each.block_size][0]).mean(1) for each in chosen])
    measured = density, errors.per_head.mean(2), errors.per_layer, errors.recall.mean(2)
    return torch.stack([x.double().T for x in measured], 2)
