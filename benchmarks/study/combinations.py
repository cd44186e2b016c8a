"""Rules that put several estimates together: hedges, priors, a coarse and a fine one, weights by the output."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.study.estimators import mass_of, sampled_positions, scores_of
from rr_flex.config import RRConfig
from rr_flex.evaluation.equal_density import Spending, cuts_at, value_of
from rr_flex.evaluation.plain import plain_selection
from rr_flex.evaluation.rules import Case, Rule, cost_of
from rr_flex.mass import row_share
from rr_flex.sampling import moments, pooled_features, sample_queries, with_square

Share = Float[Tensor, "B Hq nQ nK"]
BAND = 4.0  # about a threshold: from a quarter of it to four times it


def share_by(config: RRConfig, q: Tensor, k: Tensor) -> Share:
    """A block's share of its row, by the library's estimate."""
    return row_share(plain_selection(q, k, config=config).mass)


def hedged(how: str, config: RRConfig, share_of_keys: float = 0.5) -> Rule:
    """The two estimates of pool="both" put together otherwise than by their mean.

    "mean": weighted; "geometric": normalised; "larger" of the two.
    """
    by_keys = config.with_settings({"pool": "keys"})
    by_queries = config.with_settings({"pool": "queries", "order": 1})

    def weigh(case: Case) -> Share:
        keys, queries = (share_by(each, case.q, case.k) for each in (by_keys, by_queries))
        if how == "mean":
            return share_of_keys * keys + (1 - share_of_keys) * queries
        return row_share((keys * queries).sqrt()) if how == "geometric" else torch.maximum(keys, queries)

    return Rule(weigh, config.block_sizes, config.budget, cost_of(config))


def mean_of_squares(config: RRConfig, spending: Spending = "raw") -> Rule:
    """What a block costs if its values are noise, Σ over queries of (a query's probability of it)²: the mean of the
    root mean squares over the block's sampled queries (keys pooled) and over its pooled queries.

    Keys are pooled at order 2; queries by `query_pool`, 64 or 128.
    """
    size, (q_stride, _) = config.block_sizes, config.strides
    pool = config.tokens_per_pooled_query
    by_queries = config.with_settings({"pool": "queries", "order": 1, "block_size": (pool, size[1])})

    def weigh(case: Case) -> Share:
        sides = (_probabilities(case, config.strides, size[1]), q_stride), (share_by(by_queries, case.q, case.k), pool)
        roots = [share.square().unflatten(2, (-1, size[0] // step)).mean(3).sqrt() for share, step in sides]
        return (roots[0] + roots[1]) / 2

    return Rule(weigh, size, spending, cost_of(config))


def by_sampled_output(config: RRConfig) -> Rule:
    """The rule's share of a row times how far the block's mean value lies from the *sampled queries'* outputs.

    That distance is the mean of ‖v̄_J − o_i‖ over a block's sampled queries i, weighted by their probability of J; o_i
    is the output of i over keys pooled at order 2 and values pooled likewise.
    """
    size = config.block_sizes

    def weigh(case: Case) -> Share:
        group = case.q.shape[1] // case.v.shape[1]
        value = moments(case.v, size[1])[0].repeat_interleave(group, 1)  # B Hq nK Dv
        share = _probabilities(case, config.strides, size[1])  # B Hq nq nK
        away = torch.cdist(share @ value, value)
        rows = (2, (-1, size[0] // config.strides[0]))
        weighted, total = ((x.unflatten(*rows)).sum(3) for x in (share * away, share))
        return share_by(config, case.q, case.k) * weighted / total.clamp(min=torch.finfo(total.dtype).tiny)

    return Rule(weigh, size, "raw", cost_of(config))


def weighed_by_disagreement(config: RRConfig, power: float = 1.0) -> Rule:
    """The two estimates of pool="both", the keys' weighing d^power and the queries' the rest.

    d in [0, 1] is how far a block's sampled queries are from one another: the mean total variation distance of their
    probabilities of the key blocks (keys pooled at order 2) from the block's mean. A pooled query speaks for all of
    them where it is 0.
    """
    by_queries = config.with_settings({"pool": "queries", "order": 1})
    size = config.block_sizes

    def weigh(case: Case) -> Share:
        each = _probabilities(case, config.strides, size[1]).unflatten(2, (-1, size[0] // config.strides[0]))
        keys = each.mean(3)
        apart = (each - keys[:, :, :, None]).abs().sum(-1).mean(3) / 2
        weight = apart.pow(power)[..., None]
        return weight * keys + (1 - weight) * share_by(by_queries, case.q, case.k)

    return Rule(weigh, size, config.budget, cost_of(config))


def with_row_before(config: RRConfig, weight: float) -> Rule:
    """The share in the block row before, which is all that a previous chunk can tell, as a prior with this weight."""

    def weigh(case: Case) -> Share:
        share = share_by(config, case.q, case.k)
        prior = torch.cat([share[:, :, :1], share[:, :, :-1]], 2)
        return (1 - weight) * share + weight * prior

    return Rule(weigh, config.block_sizes, config.budget, cost_of(config))


def coarse_to_fine(coarse: RRConfig, fine: RRConfig) -> Rule:
    """One estimate decides the clear cases, the other those near its threshold; blocks are the coarse one's.

    The cost is the coarse estimate's alone: the fine one's counts for the share of blocks that it is asked for.
    """

    def weigh(case: Case) -> Share:
        return share_by(coarse, case.q, case.k)

    def keep(cases, visible: Tensor, mandatory: Tensor, *, densities: Sequence[float], together: bool) -> list[Tensor]:
        both = (torch.cat([share_by(each, case.q, case.k) for case in cases]) for each in (coarse, fine))
        return kept_coarse_to_fine(*both, visible, mandatory, densities=densities, together=together)[0]

    return Rule(weigh, coarse.block_sizes, "threshold", cost_of(coarse), keep=keep)


def kept_coarse_to_fine(
    coarse: Float[Tensor, "B H nQ nK"],
    fine: Float[Tensor, "B H nQ nK"],
    visible: Bool[Tensor, "#B #H nQ nK"],
    mandatory: Bool[Tensor, "#B #H nQ nK"],
    *,
    densities: Sequence[float],
    band: float = BAND,
    together: bool = False,
) -> tuple[list[Bool[Tensor, "B H nQ nK"]], list[float]]:
    """One threshold, with a coarse estimate where it is clear and a fine one near the coarse one's threshold t.

    A block whose coarse share of its row is at least t · band is kept, one of at most t / band is not, and of those
    between, as many as the density leaves, by their fine share. Beside each selection: the share of visible blocks that
    lie between.
    """
    visible, mandatory = visible.expand_as(coarse), mandatory.expand_as(coarse)
    free = visible & ~mandatory
    coarse, fine = (value_of(each, visible, mandatory, "threshold") for each in (coarse, fine))
    found, refined = [], []
    axes = 0 if together else 1
    for density, cut in zip(densities, cuts_at(coarse, visible, mandatory, densities, axes), strict=True):
        near = free & (coarse > cut / band) & (coarse < cut * band)
        value = torch.where(near, fine, torch.where(coarse < cut, -1.0, 2.0))  # shares lie in [0, 1]
        found.append(mandatory | (free & (value >= cuts_at(value, visible, mandatory, [density], axes)[0])))
        refined.append((near.sum() / visible.sum()).item())
    return found, refined


def calibrated(config: RRConfig, thresholds: dict[int, list[float]]) -> Rule:
    """A block by its share over its layer's and head's threshold, which one factor moves to the density asked for."""

    def weigh(case: Case) -> Share:
        level = torch.tensor([thresholds[layer] for layer in case.layers], device=case.q.device)
        return share_by(config, case.q, case.k) / level[..., None, None]

    return Rule(weigh, config.block_sizes, "raw", cost_of(config))


def _probabilities(case: Case, strides: tuple[int, int], k_block: int) -> Float[Tensor, "B Hq nq nK"]:
    """Each sampled query's probability of each key block, keys pooled at order 2."""
    scale = case.q.shape[3] ** -0.5
    queries = with_square(sample_queries(case.q, strides[0]), 0.5 * scale)
    keys = pooled_features(case.k, strides[1], 2)
    scores, position = scores_of(queries, keys) * scale, sampled_positions(case, strides[0])
    return mass_of(scores, position, *strides, (strides[0], k_block))
