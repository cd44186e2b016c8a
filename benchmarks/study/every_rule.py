"""Every rule of the study by name."""

from benchmarks.study.combinations import (
    by_sampled_output,
    coarse_to_fine,
    hedged,
    mean_of_squares,
    weighed_by_disagreement,
    with_row_before,
)
from benchmarks.study.estimators import (
    antidiagonal,
    around_mean_query,
    at_random,
    block_means,
    by_value,
    clustered,
    exact_keys,
    second_order,
    spent,
    true_displacement,
    true_mass_squared,
)
from benchmarks.study.low_precision import LOW_PRECISION
from rr_flex.config import RRConfig
from rr_flex.evaluation.rules import BEST, FAST, PUBLISHED, WIDE, Rule, configured, true_mass

# The names below say `best` for its estimate over blocks of 128×64, with which most of this was measured.
PRESET_BEST = RRConfig.from_preset("best", block_size=WIDE)
ORDER_1 = {"pool": "both", "key_stride": 32, "block_size": WIDE, "budget": "threshold"}


def _order_2(query_stride: int) -> RRConfig:
    return RRConfig(order=2, block_size=WIDE, budget="threshold", query_stride=query_stride)


def _gaussian(**strides: int) -> Rule:
    """`best` with the whole second-order term, as if logits were Gaussian."""
    return configured(preset="best", block_size=WIDE, variance_weight=0.5, **strides)


RULES: dict[str, Rule] = {
    "rr": configured(),
    "rr, threshold": configured(budget="threshold"),
    "rr, threshold a head": spent(configured(), "per_head"),
    "rr 128×64": configured(block_size=WIDE),
    "rr 128×64, threshold": configured(block_size=WIDE, budget="threshold"),
    "order 2": configured(order=2),
    "order 2, threshold": configured(order=2, budget="threshold"),
    "order 2 128×64": configured(order=2, block_size=WIDE),
    "order 2 128×64, threshold": configured(order=2, block_size=WIDE, budget="threshold"),
    "order 2 64×64, threshold": configured(order=2, block_size=64, budget="threshold"),
    "order 2 128×64, threshold, strides 16/8": configured(
        order=2, block_size=WIDE, budget="threshold", query_stride=16
    ),
    "order 2 128×64, threshold, strides 32/8": configured(
        order=2, block_size=WIDE, budget="threshold", query_stride=32
    ),
    "order 2 128×64, threshold, strides 16/16": configured(order=2, block_size=WIDE, budget="threshold", stride=16),
    "order 2 128×64, threshold, strides 16/4": configured(
        order=2, block_size=WIDE, budget="threshold", query_stride=16, key_stride=4
    ),
    "antidiagonal": antidiagonal(PUBLISHED),
    "antidiagonal 128×64, threshold": antidiagonal(WIDE, spending="threshold"),
    "block means, share of the highest": block_means(PUBLISHED),
    "block means 128×64, share of the highest": block_means(WIDE),
    "random": at_random(PUBLISHED),
    "order 2, rotary pairs": second_order(WIDE, "pairs"),
    "order 2, bounded": second_order(WIDE, "bounded"),
    "order 2, capped": second_order(WIDE, "capped"),
    "order 2, full covariance": second_order(WIDE, "full"),
    "order 2, full covariance, bounded": second_order(WIDE, "full, bounded"),
    "order 1 around the mean query": around_mean_query(WIDE, 1),
    "order 2 around the mean query": around_mean_query(WIDE, 2),
    "order 2, keys clustered": clustered(WIDE, "keys", 3),
    "every key, 1 query in 8": exact_keys(WIDE, 8),
    "every key, 1 query in 32": exact_keys(WIDE, 32),
    "every key, 1 query in 64": exact_keys(WIDE, 64),
    "pooled queries": configured(pool="queries", block_size=WIDE, budget="threshold"),
    "pooled queries, order 2": configured(pool="queries", order=2, block_size=WIDE, budget="threshold"),
    "pooled queries (64), order 2": configured(
        pool="queries", order=2, query_pool=64, block_size=WIDE, budget="threshold"
    ),
    "pooled queries, order 2, two clusters": clustered(WIDE, "queries", 1),
    FAST: configured(**ORDER_1),
    BEST: configured(preset="best", block_size=WIDE),
    "both, order 1, 16/16": configured(**ORDER_1 | {"stride": 16, "key_stride": 16}),
    "both, order 1, 8/16": configured(**ORDER_1 | {"key_stride": 16}),
    "both, order 1, 8/8": configured(**ORDER_1 | {"key_stride": 8}),
    "both, order 2, 8/32": _gaussian(),
    "best, variance by a quarter": configured(preset="best", block_size=WIDE, variance_weight=0.25),
    "both, order 2, 16/32": _gaussian(stride=16),
    "both, order 2, 16/16": _gaussian(stride=16, key_stride=16),
    "both, order 2, 16/8": _gaussian(stride=16, key_stride=8),
    "both, order 2, 8/64": _gaussian(key_stride=64),
    "both, order 2, 8/16": _gaussian(key_stride=16),
    "both, order 2, 8/8": _gaussian(key_stride=8),
    "both, order 2, 4/32": _gaussian(stride=4),
    "both, order 2, 4/64": _gaussian(stride=4, key_stride=64),
    "both, order 2, 16/16, queries by 64": _gaussian(stride=16, key_stride=16, query_pool=64),
    "best, queries by 64": configured(preset="best", block_size=WIDE, query_pool=64),
    "best, top-τ": spent(configured(preset="best", block_size=WIDE), "top_tau"),
    "best, threshold a head": spent(configured(preset="best", block_size=WIDE), "per_head"),
    "best 128×128": configured(preset="best"),
    "both, order 1, 8/32 128×128": configured(**ORDER_1 | {"block_size": 128}),
    "best 64×64": configured(preset="best", block_size=64),
    "best by value": by_value(configured(preset="best", block_size=WIDE)),
    "best by sampled outputs": by_sampled_output(PRESET_BEST),
    "best, mean of squares": mean_of_squares(PRESET_BEST),
    "best, mean of squares, share of a row": mean_of_squares(PRESET_BEST, "threshold"),
    "best, mean of squares, queries by 64": mean_of_squares(PRESET_BEST.with_settings({"query_pool": 64})),
    "both, order 2, 8/16, mean of squares": mean_of_squares(PRESET_BEST.with_settings({"key_stride": 16})),
    "both, order 2, 8/8, mean of squares": mean_of_squares(PRESET_BEST.with_settings({"key_stride": 8})),
    "best, geometric mean": hedged("geometric", PRESET_BEST),
    "best, larger of the two": hedged("larger", PRESET_BEST),
    "best, a quarter keys": hedged("mean", PRESET_BEST, 0.25),
    "best, three quarters keys": hedged("mean", PRESET_BEST, 0.75),
    "best, weighed by disagreement": weighed_by_disagreement(PRESET_BEST),
    "best, weighed by disagreement, root": weighed_by_disagreement(PRESET_BEST, 0.5),
    "best, row before as prior, a tenth": with_row_before(PRESET_BEST, 0.1),
    "best, row before as prior, a quarter": with_row_before(PRESET_BEST, 0.25),
    "coarse to fine: order 2, 32/8 then 8/8": coarse_to_fine(_order_2(32), _order_2(8)),
    "coarse to fine: pooled queries then best": coarse_to_fine(
        PRESET_BEST.with_settings({"pool": "queries", "order": 1}), PRESET_BEST
    ),
    "coarse to fine: best then strides 8/8": coarse_to_fine(PRESET_BEST, PRESET_BEST.with_settings({"key_stride": 8})),
    "oracle mass, top-τ": true_mass(PUBLISHED, "top_tau"),
    "oracle mass": true_mass(PUBLISHED),
    "oracle mass 128×64, top-τ": true_mass(WIDE, "top_tau"),
    "oracle mass 128×64": true_mass(WIDE),
    "oracle mass 64×64": true_mass((64, 64)),
    "oracle mass² 128×64": true_mass_squared(WIDE),
    "oracle displacement": true_displacement(PUBLISHED),
    "oracle displacement 128×64": true_displacement(WIDE),
} | LOW_PRECISION
