"""What a rule of the study is, the library's own, oracles, and single estimates that were tried.

Rules that users can have are settings of RRConfig, run through the library itself. The others are written out here,
plainly and not fast, to say what was tried and what an oracle would do.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rr_flex.evaluation.block_outputs import TOKENS, strips
from rr_flex.evaluation.equal_density import Spending
from rr_flex.evaluation.rules import Case, Rule
from rr_flex.geometry import ceil_div
from rr_flex.mass import row_share
from rr_flex.sampling import moments, sample_queries


class TrueBlocks(NamedTuple):
    """Oracles that look further than the mass, exact for every query of a block."""

    mass_squared: Tensor  # [B, Hq, nQ, nK] Σ over queries of (a query's probability of the block)²
    displacement: Tensor  # [B, Hq, nQ, nK] Σ over queries of ‖Σ_j p_j (v_j − out)‖²


def true_blocks(case: Case, size: tuple[int, int]) -> TrueBlocks:
    """Every block's true weight in the output, in one pass over causal attention."""
    (B, Hq, L), (q_block, k_block) = case.q.shape[:3], size
    shape = (B, Hq, ceil_div(L, q_block), ceil_div(L, k_block))
    found = TrueBlocks(*(torch.zeros(shape, device=case.q.device) for _ in range(2)))
    step = k_block // TOKENS
    for row, parts in strips(case.q, case.k, case.v):
        total = parts.sum(2, keepdim=True)
        share = parts / total[..., -1:]  # B Hq nJ rows Dv+1: a block's part of the output, and of the mass
        joined = F.pad(share, (0, 0, 0, 0, 0, -share.shape[2] % step)).unflatten(2, (-1, step)).sum(3)
        probability = joined[..., -1]  # B Hq nK' rows
        moved = joined[..., :-1] - probability[..., None] * total[..., :-1] / total[..., -1:]
        place = (..., row * TOKENS // q_block, slice(0, joined.shape[2]))
        found.mass_squared[place] += probability.square().sum(-1)
        found.displacement[place] += moved.square().sum((-1, -2))
    return found


def true_displacement(size: tuple[int, int]) -> Rule:
    """Oracle: how far the output moves without the block, Σ over queries of ‖Σ_j p_j (v_j − out)‖²."""
    return Rule(lambda case: true_blocks(case, size).displacement, size, "raw")


def true_mass_squared(size: tuple[int, int]) -> Rule:
    """Oracle: Σ over queries of (a query's probability of the block)², its squared error if values were noise."""
    return Rule(lambda case: true_blocks(case, size).mass_squared, size, "raw")


def at_random(size: tuple[int, int]) -> Rule:
    def weigh(case: Case) -> Tensor:
        B, Hq, L = case.q.shape[:3]
        shape = (B, Hq, ceil_div(L, size[0]), ceil_div(L, size[1]))
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(case.q.device)

    return Rule(weigh, size, "raw")


def antidiagonal(size: tuple[int, int], stride: int = 8, spending: Spending = "top_tau") -> Rule:
    """XAttention (arXiv 2503.16428): a stride × stride tile's logit is the mean of its antidiagonal's."""

    def weigh(case: Case) -> Tensor:
        q, k = (x.unflatten(2, (-1, stride)) for x in (case.q, case.k))
        queries, keys = q.flip(3).flatten(3), k.flatten(3)  # B H n stride*D
        last = torch.arange(queries.shape[2], device=q.device) * stride + stride - 1
        return mass_of(scores_of(queries, keys) * case.q.shape[3] ** -0.5 / stride, last, stride, stride, size)

    return Rule(weigh, size, spending, 8.0)


def block_means(size: tuple[int, int]) -> Rule:
    """Mean query by mean key of each block; a block counts by its score over its row's highest (FlashPrefill)."""

    def weigh(case: Case) -> Tensor:
        queries, keys = moments(case.q, size[0])[0], moments(case.k, size[1])[0]
        scores = scores_of(queries, keys) * case.q.shape[3] ** -0.5
        row = torch.arange(scores.shape[2], device=scores.device)[:, None]
        hidden = torch.arange(scores.shape[3], device=scores.device) * size[1] >= (row + 1) * size[0]
        scores = scores.masked_fill(hidden, -math.inf)
        return (scores - scores.amax(-1, keepdim=True)).exp()

    return Rule(weigh, size, "raw", 64 / (size[0] * size[1]) * 0.5)


def exact_keys(size: tuple[int, int], query_stride: int) -> Rule:
    """Sampled queries against every key: what pooling costs is what this does not lose."""

    def weigh(case: Case) -> Tensor:
        return mass_of(*sampled_scores(case, query_stride, case.k), query_stride, 1, size)

    return Rule(weigh, size, "threshold", 64 / query_stride)


def second_order(size: tuple[int, int], bend: str) -> Rule:
    """Order 2 at stride 8 with another second-order term t = ½·variance of a stride's logits.

    "pairs": with the covariance of the two halves of a rotary pair; "bounded": t / √(1 + t/2), which grows as the
    deviation does; "capped": at most 4; "full": the exact variance; "full, bounded".
    """

    def weigh(case: Case) -> Tensor:
        D = case.q.shape[3]
        scale, half = D**-0.5, D // 2
        mean, variance = moments(case.k, 8)
        queries = sample_queries(case.q, 8)
        scores, last = sampled_scores(case, 8, mean)
        if bend.startswith("full"):
            logits = scores_of(queries, case.k) * scale
            term = 0.5 * logits.unflatten(-1, (-1, 8)).var(-1, correction=0)
        else:
            term = scores_of(queries.square(), variance) * (0.5 * scale**2)
        if bend == "pairs":
            apart = case.k.unflatten(2, (-1, 8)) - mean[:, :, :, None]
            pairs = (apart[..., :half] * apart[..., half:]).mean(3)
            term = term + scores_of(queries[..., :half] * queries[..., half:], pairs) * scale**2
        elif bend.endswith("bounded"):
            term = term / (1 + term / 2).sqrt()
        elif bend == "capped":
            term = term.clamp(max=4)
        return mass_of(scores + term, last, 8, 8, size)

    return Rule(weigh, size, "threshold")


def around_mean_query(size: tuple[int, int], order: int) -> Rule:
    """Each stride's log-mean-exp expanded around the head's mean query instead of around 0, at stride 8."""

    def weigh(case: Case) -> Tensor:
        scale, group = case.q.shape[3] ** -0.5, case.q.shape[1] // case.k.shape[1]
        center = case.q.mean(2, keepdim=True)
        keys = case.k.repeat_interleave(group, 1).unflatten(2, (-1, 8))
        logits = (keys * center[:, :, :, None]).sum(-1) * scale  # B Hq nk 8
        share = logits.softmax(-1)
        constant = logits.logsumexp(-1) - (share * logits).sum(-1)
        mean = (share[..., None] * keys).sum(3)
        scores, last = sampled_scores(case, 8, mean)
        scores = scores + constant[:, :, None]
        if order == 2:
            variance = (share[..., None] * (keys - mean[:, :, :, None]).square()).sum(3)
            scores = scores + scores_of((sample_queries(case.q, 8) - center).square(), variance) * (0.5 * scale**2)
        return mass_of(scores, last, 8, 8, size)

    return Rule(weigh, size, "threshold")


def clustered(size: tuple[int, int], side: str, levels: int) -> Rule:
    """Runs that are alike: each 64 keys, or 128 queries, split in two `levels` times along their main direction.

    Keys pool to 64 / 2^levels a run at order 2, queries to 128 / 2^levels.
    """

    def weigh(case: Case) -> Tensor:
        scale = case.q.shape[3] ** -0.5
        if side == "keys":
            run = 64 >> levels
            mean, variance = moments(_alike(case.k, 64, levels), run)
            scores, last = sampled_scores(case, 8, mean)
            scores = scores + scores_of(sample_queries(case.q, 8).square(), variance) * (0.5 * scale**2)
            return mass_of(scores, last, 8, run, size, visible_by=64)
        run = 128 >> levels
        mean, variance = moments(_alike(case.q, 128, levels), run)
        scores = scores_of(mean, case.k) * scale + scores_of(variance, case.k.square()) * (0.5 * scale**2)
        last = torch.arange(mean.shape[2], device=case.q.device) * run // 128 * 128 + 127
        return mass_of(scores, last, run, 1, size)

    return Rule(weigh, size, "threshold", (64 / (8 * (64 >> levels)) if side == "keys" else 64 / (128 >> levels)) * 1.5)


def by_value(rule: Rule) -> Rule:
    """The rule's share of a row times ‖mean value of the block − the row's output‖, both from block means."""

    def weigh(case: Case) -> Tensor:
        share = row_share(rule.weigh(case))
        group = case.q.shape[1] // case.v.shape[1]
        value = moments(case.v, rule.block_size[1])[0].repeat_interleave(group, 1)
        return share * torch.cdist(share @ value, value)

    return Rule(weigh, rule.block_size, "raw", rule.cost)


def spent(rule: Rule, spending: Spending) -> Rule:
    """The same weights under another budget rule."""
    return replace(rule, spending=spending, config=None)


def scores_of(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, Hq, n, E] by [B, Hkv, m, E] -> [B, Hq, n, m]."""
    Hq, n, H = *queries.shape[1:3], keys.shape[1]
    grouped = queries.unflatten(1, (H, Hq // H)).flatten(2, 3)
    return (grouped @ keys.mT).unflatten(2, (Hq // H, n)).flatten(1, 2)


def sampled_scores(case: Case, stride: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the paper's sampled queries with `keys`, and the positions [Hq, nq] of the former."""
    return scores_of(sample_queries(case.q, stride), keys) * case.q.shape[3] ** -0.5, sampled_positions(case, stride)


def sampled_positions(case: Case, stride: int) -> Tensor:
    """Where the paper's sampled queries stand, [Hq, nq]."""
    Hq, L = case.q.shape[1:3]
    head = torch.arange(Hq, device=case.q.device)[:, None]
    return (torch.arange(0, L, stride, device=case.q.device) + head % stride).clamp(max=L - 1)


def mass_of(scores: Tensor, position: Tensor, q_run: int, k_run: int, size: tuple[int, int], visible_by: int = 1):
    """Softmax over the runs of keys that begin at or before a query's position, summed over blocks; L divides."""
    first = torch.arange(scores.shape[3], device=scores.device) * k_run // visible_by * visible_by
    share = scores.masked_fill_(first > position[..., None], -math.inf).softmax(-1)
    tiles = F.pad(share, (0, -scores.shape[3] % (size[1] // k_run))).unflatten(-1, (-1, size[1] // k_run)).sum(-1)
    return tiles.unflatten(-2, (-1, size[0] // q_run)).sum(-2)


def _alike(x: Tensor, block: int, levels: int) -> Tensor:
    """The tokens of each block in an order in which runs of block / 2^levels are alike."""
    x = x.unflatten(2, (-1, block))
    for level in range(levels):
        halves = x.unflatten(3, (2**level, -1))
        apart = halves - halves.mean(4, keepdim=True)
        direction = torch.ones_like(apart[..., 0, :])
        for _ in range(4):  # power iteration
            direction = (apart.mT @ (apart @ direction[..., None]))[..., 0]
            direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=1e-20)
        order = (apart @ direction[..., None]).argsort(4)
        x = halves.gather(4, order.expand_as(halves)).flatten(3, 4)
    return x.flatten(2, 3)
