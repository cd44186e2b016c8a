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

TOKENS = 64  # of a strip and of its key blocks: what every block size is a multiple of


class KeptBlocks(NamedTuple):
    """A selection to be judged."""

    kept: Bool[Tensor, "B Hq nQ nK"]
    block_size: tuple[int, int]  # tokens: (queries, keys), multiples of 64


class OutputErrors(NamedTuple):
    """Sums of squares, so that errors of heads, layers and texts can be put together in any way."""

    difference: Float[Tensor, "n B Hq"]  # Σ (out − dense)² of each selection; with gradients Σ (g · (out − dense))²
    reference: Float[Tensor, "B Hq"]  # Σ dense²
    recall: Float[Tensor, "n B Hq"]  # share of the attention mass in kept blocks
    queries: int  # that were looked at

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
    every: int = 1,
):
    """For each 64 queries, causal: their number and the contributions [B, Hq, nJ, rows, Dv + 1] of the nJ key blocks of
    64 up to them.

    The last column is Σ_j e^(s − max), the others Σ_j e^(s − max) v_j; float32. L must be the same for q, k and v.
    `every`: of so many strips one, at each place of a block as often.
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
        if row % every != row // every % every:
            continue
        start, stop = row * TOKENS, min((row + 1) * TOKENS, L)
        seen = (row + 1) * TOKENS
        strip = q[:, :, start:stop].float().unflatten(1, (Hkv, Hq // Hkv)).flatten(2, 3) * scale  # B Hkv G*rows D
        scores = (strip @ keys[..., :seen]).unflatten(2, (Hq // Hkv, stop - start))
        scores[..., -TOKENS:].masked_fill_(above[: stop - start], -torch.inf)
        weight = (scores - scores.amax(-1, keepdim=True)).exp()  # B Hkv G rows seen
        weight = weight.unflatten(-1, (row + 1, TOKENS)).movedim(-2, 2).flatten(3, 4)  # B Hkv nJ G*rows 64
        parts = weight @ values[:, :, : row + 1]
        yield row, parts.unflatten(3, (Hq // Hkv, stop - start)).movedim(3, 2).flatten(1, 2)  # B Hq nJ rows Dv+1


def output_errors(
    qkv: tuple[Tensor, Tensor, Tensor],
    selections: Sequence[KeptBlocks],
    *,
    scale: float | None = None,
    gradient: Float[Tensor, "B Hq L Dv"] | None = None,
    every: int = 1,
) -> OutputErrors:
    """Squared output errors of many selections against dense causal attention, float32 sums in float64.

    q [B, Hq, L, D], k, v [B, Hkv, L, D]. With a `gradient` g of what is to be kept at the outputs, those of its
    first-order change: Σ over queries of (g · (out − dense))². A row that keeps nothing gives 0, as in the kernel.
    `every`: of so many strips of 64 queries one. Costs one dense attention, and 1/64 of it a selection.
    """
    q, k, v = qkv
    B, Hq = q.shape[:2]
    recall = torch.zeros(len(selections), B, Hq, dtype=torch.float64, device=q.device)
    difference = torch.zeros(len(selections), B, Hq, dtype=torch.float64, device=q.device)
    reference = torch.zeros(B, Hq, dtype=torch.float64, device=q.device)
    by_size: dict[tuple[int, int], list[int]] = {}
    for number, selection in enumerate(selections):
        by_size.setdefault(selection.block_size, []).append(number)
    stacks = {
        size: torch.stack([selections[number].kept for number in numbers], 2) for size, numbers in by_size.items()
    }  # B Hq n nQ nK each
    place = torch.tensor([number for numbers in by_size.values() for number in numbers], device=q.device).argsort()
    queries = 0
    for row, parts in strips(q, k, v, scale, every):
        queries += parts.shape[3]
        nJ = parts.shape[2]
        kept = torch.cat([_kept_in_strip(stack, size, row, nJ) for size, stack in stacks.items()], 2)  # B Hq n nJ
        total = parts.sum(2)
        dense = total[..., :-1] / total[..., -1:]  # B Hq rows Dv
        sums = (kept.float() @ parts.flatten(3)).unflatten(3, parts.shape[3:])  # B Hq n rows Dv+1
        recall += (sums[..., -1] / total[:, :, None, :, -1]).sum(3, dtype=torch.float64).movedim(2, 0)
        out = sums[..., :-1] / sums[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
        apart = out - dense[:, :, None]  # B Hq n rows Dv
        if gradient is not None:
            rows = gradient[:, :, row * TOKENS : row * TOKENS + apart.shape[3]].float()
            apart = (apart * rows[:, :, None]).sum(-1, keepdim=True)
        difference += apart.square().sum((3, 4), dtype=torch.float64).movedim(2, 0)
        reference += dense.square().sum((2, 3), dtype=torch.float64)
    return OutputErrors(difference[place], reference, recall[place] / queries, queries)


def _kept_in_strip(
    kept: Bool[Tensor, "B Hq n nQ nK"], block_size: tuple[int, int], row: int, nJ: int
) -> Bool[Tensor, "B Hq n nJ"]:
    q_block, k_block = block_size
    return kept[:, :, :, row * TOKENS // q_block].repeat_interleave(k_block // TOKENS, -1)[..., :nJ]
