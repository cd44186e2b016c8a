"""What a block contributes to the output, so that any number of selections is judged for the price of one.

Within a strip of queries each key block J gives Σ_j e^s v_j and Σ_j e^s. A selection's output is a ratio of sums over
its kept blocks, hence one small matrix product for all selections together; no selection is attended to on its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from rr_flex.geometry import ceil_div
from rr_flex.sampling import moments

HIGHEST = 60.0  # nats by which a pooled key's logit may exceed the row's highest
TOKENS = 64  # of a strip and of its key blocks: what every block size is a multiple of


class KeptBlocks(NamedTuple):
    """A selection to be judged."""

    kept: Bool[Tensor, "B Hq nQ nK"]
    block_size: tuple[int, int]  # tokens: (queries, keys), multiples of 64


class OutputErrors(NamedTuple):
    """Sums of squares, so that errors of heads, layers and texts can be put together in any way."""

    difference: Float[Tensor, "n B Hq"]  # Σ (out − dense)² of each selection
    reference: Float[Tensor, "B Hq"]  # Σ dense²
    recall: Float[Tensor, "n B Hq"]  # share of the attention mass in kept blocks

    @property
    def per_head(self) -> Float[Tensor, "n B Hq"]:
        """‖out − dense‖ / ‖dense‖ of each head on its own."""
        return (self.difference / self.reference).sqrt()

    @property
    def per_layer(self) -> Float[Tensor, "n B"]:
        """‖out − dense‖ / ‖dense‖ of all heads' outputs as one vector."""
        return (self.difference.sum(-1) / self.reference.sum(-1)).sqrt()


def strips(
    q: Float[Tensor, "B Hq L D"],
    k: Float[Tensor, "B Hkv L D"],
    v: Float[Tensor, "B Hkv L Dv"],
    scale: float | None = None,
):
    """For each 64 queries, causal: contributions [B, Hq, nJ, rows, Dv + 1] of the nJ key blocks of 64 up to them.

    The last column is Σ_j e^(s − max), the others Σ_j e^(s − max) v_j; float32. L must be the same for q, k and v.
    """
    B, Hq, L, D = q.shape
    Hkv = k.shape[1]
    if k.shape[2] != L or v.shape[2] != L:
        raise ValueError(f"q, k and v must be equally long, got {L}, {k.shape[2]} and {v.shape[2]}")
    scale = D**-0.5 if scale is None else scale
    nJ = ceil_div(L, TOKENS)
    padding = (0, 0, 0, nJ * TOKENS - L)
    keys = F.pad(k.float(), padding).mT  # B Hkv D nJ*64
    ones = torch.ones(B, Hkv, L, 1, device=v.device)
    values = F.pad(torch.cat([v.float(), ones], 3), padding).unflatten(2, (nJ, TOKENS))  # B Hkv nJ 64 Dv+1
    above = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=q.device).triu(1)
    for row in range(nJ):
        start, stop = row * TOKENS, min((row + 1) * TOKENS, L)
        seen = (row + 1) * TOKENS
        strip = q[:, :, start:stop].float().unflatten(1, (Hkv, Hq // Hkv)).flatten(2, 3) * scale  # B Hkv G*rows D
        scores = (strip @ keys[..., :seen]).unflatten(2, (Hq // Hkv, stop - start))
        scores[..., -TOKENS:].masked_fill_(above[: stop - start], -torch.inf)
        weight = (scores - scores.amax(-1, keepdim=True)).exp()  # B Hkv G rows seen
        weight = weight.unflatten(-1, (row + 1, TOKENS)).movedim(-2, 2).flatten(3, 4)  # B Hkv nJ G*rows 64
        parts = weight @ values[:, :, : row + 1]
        yield parts.unflatten(3, (Hq // Hkv, stop - start)).movedim(3, 2).flatten(1, 2)  # B Hq nJ rows Dv+1


def pooled_strips(q: Tensor, k: Tensor, v: Tensor, order: int, scale: float | None = None):
    """`strips` of the keys' and values' means over each 64 tokens, in the same scale and with the same weights."""
    Hq, L, D = q.shape[1:]
    Hkv = k.shape[1]
    scale = D**-0.5 if scale is None else scale
    mean, variance = moments(k, TOKENS)
    value = moments(torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], 3), TOKENS)[0] * TOKENS
    group = Hq // Hkv
    mean, variance, value, keys = (x.repeat_interleave(group, 1) for x in (mean, variance, value, k.float()))
    above = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=q.device).triu(1)
    for row, start in enumerate(range(0, L, TOKENS)):
        strip = q[:, :, start : start + TOKENS].float() * scale  # B Hq rows D
        scores = strip @ keys[:, :, : start + TOKENS].mT
        scores[..., start:].masked_fill_(above[: strip.shape[2], : scores.shape[3] - start], -torch.inf)
        pooled = strip @ mean[:, :, : row + 1].mT
        if order == 2:
            pooled = pooled + 0.5 * strip.square() @ variance[:, :, : row + 1].mT
        # Half a variance may lie far above every true logit: what float32 can't hold would be NaN.
        weight = (pooled - scores.amax(-1, keepdim=True)).clamp(max=HIGHEST).exp().mT[..., None]  # B Hq nJ rows 1
        yield weight * value[:, :, : row + 1, None]


def output_errors(
    q: Float[Tensor, "B Hq L D"],
    k: Float[Tensor, "B Hkv L D"],
    v: Float[Tensor, "B Hkv L Dv"],
    selections: Sequence[KeptBlocks],
    *,
    scale: float | None = None,
    correction: int | None = None,
) -> OutputErrors:
    """Squared output errors of many selections against dense causal attention, float32 sums in float64.

    `correction`: pruned blocks come back as one pooled key and value for each 64 tokens, weight 64; 1: the mean key,
    2: with half the variance of its logits. Blocks that the diagonal crosses must be kept then.
    A row that keeps nothing gives 0, as in the kernel. Costs one dense attention, and 1/64 of it a selection.
    """
    B, Hq, L = q.shape[:3]
    recall = torch.zeros(len(selections), B, Hq, dtype=torch.float64, device=q.device)
    difference = torch.zeros(len(selections), B, Hq, dtype=torch.float64, device=q.device)
    reference = torch.zeros(B, Hq, dtype=torch.float64, device=q.device)
    pooled = None if correction is None else pooled_strips(q, k, v, correction, scale)
    by_size: dict[tuple[int, int], list[int]] = {}
    for number, selection in enumerate(selections):
        by_size.setdefault(selection.block_size, []).append(number)
    stacks = {
        size: torch.stack([selections[number].kept for number in numbers], 2) for size, numbers in by_size.items()
    }  # B Hq n nQ nK each
    place = torch.tensor([number for numbers in by_size.values() for number in numbers], device=q.device).argsort()
    for row, parts in enumerate(strips(q, k, v, scale)):
        nJ = parts.shape[2]
        kept = torch.cat([_kept_in_strip(stack, size, row, nJ) for size, stack in stacks.items()], 2)  # B Hq n nJ
        total = parts.sum(2)
        dense = total[..., :-1] / total[..., -1:]  # B Hq rows Dv
        sums = (kept.float() @ parts.flatten(3)).unflatten(3, parts.shape[3:])  # B Hq n rows Dv+1
        recall += (sums[..., -1] / total[:, :, None, :, -1]).sum(3, dtype=torch.float64).movedim(2, 0) / L
        if pooled is not None:
            sums = sums + ((~kept).float() @ next(pooled).flatten(3)).unflatten(3, parts.shape[3:])
        out = sums[..., :-1] / sums[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
        difference += (out - dense[:, :, None]).square().sum((3, 4), dtype=torch.float64).movedim(2, 0)
        reference += dense.square().sum((2, 3), dtype=torch.float64)
    return OutputErrors(difference[place], reference, recall[place])


def _kept_in_strip(
    kept: Bool[Tensor, "B Hq n nQ nK"], block_size: tuple[int, int], row: int, nJ: int
) -> Bool[Tensor, "B Hq n nJ"]:
    q_block, k_block = block_size
    return kept[:, :, :, row * TOKENS // q_block].repeat_interleave(k_block // TOKENS, -1)[..., :nJ]


class TrueBlocks(NamedTuple):
    """Oracles, exact for every query of a block."""

    mass: Float[Tensor, "B Hq nQ nK"]  # Σ probabilities
    mass_squared: Float[Tensor, "B Hq nQ nK"]  # Σ over queries of (a query's probability of the block)²
    displacement: Float[Tensor, "B Hq nQ nK"]  # Σ over queries of ‖Σ_j p_j (v_j − out)‖²


def true_blocks(
    q: Float[Tensor, "B Hq L D"],
    k: Float[Tensor, "B Hkv L D"],
    v: Float[Tensor, "B Hkv L Dv"],
    block_sizes: Sequence[tuple[int, int]],
    *,
    scale: float | None = None,
) -> dict[tuple[int, int], TrueBlocks]:
    """Every block's true weight in the output, at several block sizes in one pass over causal attention."""
    B, Hq, L = q.shape[:3]
    found = {
        size: TrueBlocks(*(q.new_zeros(B, Hq, ceil_div(L, size[0]), ceil_div(L, size[1])).float() for _ in range(3)))
        for size in block_sizes
    }
    for row, parts in enumerate(strips(q, k, v, scale)):
        total = parts.sum(2, keepdim=True)
        share = parts / total[..., -1:]  # B Hq nJ rows Dv+1: a block's part of the output, and of the mass
        out = total[..., :-1] / total[..., -1:]
        for (q_block, k_block), blocks in found.items():
            step = k_block // TOKENS
            joined = F.pad(share, (0, 0, 0, 0, 0, -share.shape[2] % step)).unflatten(2, (-1, step)).sum(3)
            probability = joined[..., -1]  # B Hq nK' rows
            moved = joined[..., :-1] - probability[..., None] * out
            place = (..., row * TOKENS // q_block, slice(0, joined.shape[2]))
            blocks.mass[place] += probability.sum(-1)
            blocks.mass_squared[place] += probability.square().sum(-1)
            blocks.displacement[place] += moved.square().sum((-1, -2))
    return found
