"""Rules compared at equal density on a model's q, k and v: errors and recall by rule, density, text and layer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rr_flex.evaluation.block_outputs import KeptBlocks, output_errors, true_blocks
from rr_flex.evaluation.equal_density import kept_at_densities, kept_coarse_to_fine, visible_and_mandatory
from rr_flex.evaluation.estimators import BAND, Case, Rule
from rr_flex.evaluation.measures import density as density_of

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
    judged: Sequence[int] | None = None,
) -> list[Record]:
    """All rules on all layers (q, k, v) of one text, or on those in `judged`; batch 1, L a multiple of 128.

    A rule that looks at the layer before finds it among `layers`.
    """
    layers = {layer: tuple(x.float() for x in qkv) for layer, qkv in layers.items()}
    judged = list(layers) if judged is None else list(judged)
    sizes = sorted({rule.block_size for rule in rules.values()})
    q = layers[judged[0]][0]
    blocks = {size: visible_and_mandatory(q.shape[2], size, q.device) for size in sizes}
    true = {layer: true_blocks(*layers[layer], sizes) for layer in judged}
    before = {layer + 1: qkv[:2] for layer, qkv in layers.items()}
    cases = {layer: Case(*layers[layer], true[layer], layer, before.get(layer)) for layer in judged}
    chosen: dict[int, list[KeptBlocks]] = {layer: [] for layer in judged}
    labels = []
    for name, rule in rules.items():
        weights = {layer: rule.weigh(cases[layer]) for layer in judged}
        finer = {layer: rule.refine(cases[layer]) for layer in judged} if rule.refine else None
        for scope in scopes:
            for group in [[layer] for layer in judged] if scope == "layer" else [judged]:
                kept = _keep(rule, group, weights, finer, densities, *blocks[rule.block_size])
                for layer, own in zip(group, zip(*(x.chunk(len(group), 1) for x in kept), strict=True), strict=True):
                    chosen[layer] += [KeptBlocks(each, rule.block_size) for each in own]
            labels += [(name, scope, density) for density in densities]
    records = []
    for layer in judged:
        measured = _measure(layers[layer], chosen[layer], [rules[label[0]].correction for label in labels], blocks)
        rows = zip(labels, measured, strict=True)
        records += [Record(*label, text, layer, *(round(x, 6) for x in row)) for label, row in rows]
    return records


def _measure(
    qkv: tuple[Tensor, Tensor, Tensor],
    chosen: Sequence[KeptBlocks],
    corrections: Sequence[int | None],
    blocks: dict[tuple[int, int], tuple[Tensor, Tensor]],
) -> list[list[float]]:
    """Density, error, layer error and recall of each selection; one copy from the device for all of them."""
    found = qkv[0].new_zeros(len(chosen), 4, dtype=torch.float64)
    for correction in dict.fromkeys(corrections):
        own = [number for number, each in enumerate(corrections) if each == correction]
        errors = output_errors(*qkv, [chosen[number] for number in own], correction=correction)
        density = [density_of(chosen[number].kept, blocks[chosen[number].block_size][0]).mean() for number in own]
        measured = (
            torch.stack(density),
            errors.per_head.mean((1, 2)),
            errors.per_layer[:, 0],
            errors.recall.mean((1, 2)),
        )
        found[torch.tensor(own, device=found.device)] = torch.stack([x.double() for x in measured], 1)
    return found.tolist()


def _keep(
    rule: Rule,
    group: Sequence[int],
    weights: dict[int, Tensor],
    finer: dict[int, Tensor] | None,
    densities: Sequence[float],
    visible: Tensor,
    mandatory: Tensor,
) -> list[Tensor]:
    """The kept blocks of a group of layers at each density, their heads side by side."""
    weight = torch.cat([weights[layer] for layer in group], 1)
    if finer is None:
        return kept_at_densities(weight, visible, mandatory, densities=densities, spending=rule.spending)
    fine = torch.cat([finer[layer] for layer in group], 1)
    return kept_coarse_to_fine(weight, fine, visible, mandatory, densities=densities, band=BAND)[0]
