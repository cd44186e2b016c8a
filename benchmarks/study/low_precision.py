"""Estimates whose features are rounded to FP8 or INT8 with a scale a row: accuracy, not speed."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods import causal
from rr_flex.config import RRConfig
from rr_flex.evaluation.rules import Case, Rule, cost_of
from rr_flex.mass import block_mass
from rr_flex.pipeline import row_share
from rr_flex.sampling import moments, pooled_query_features, sample_queries, second_order_features

Precision = Literal["fp8", "int8"]


def round_rows(x: Float[Tensor, "... E"], precision: Precision) -> Float[Tensor, "... E"]:
    """x as float8_e4m3fn or int8 with one scale a row (its largest number is the format's), and back.

    What torchao's `quantize_affine` and `_quantize_affine_float8` with blocks of a row compute.
    """
    dtype = torch.float8_e4m3fn if precision == "fp8" else torch.int8
    # Symmetric int8 in torchao divides by half the range of -128..127.
    largest = torch.finfo(dtype).max if precision == "fp8" else 127.5
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps) / largest
    # torchao divides by the one and multiplies with the inverse of the other.
    whole = (x.float() / scale).to(dtype) if precision == "fp8" else (x.float() * (1 / scale)).round().clamp(-128, 127)
    return (whole.float() * scale).to(x.dtype)


def in_low_precision(config: RRConfig, precision: Precision) -> Rule:
    """A rule with pool="both" whose dot products see rounded features on both sides."""

    def weigh(case: Case) -> Tensor:
        L, scale = case.q.shape[2], case.q.shape[3] ** -0.5
        facts = {"mask_mod": causal(), "Lq": L, "Lk": L, "block_size": config.block_sizes, "scale": scale}
        queries = sample_queries(case.q, config.strides[0])
        mean, variance = moments(case.k, config.strides[1])
        keys = mean
        if config.order == 2:
            queries, keys = second_order_features(queries, mean, variance, scale, config.variance_weight)
        pairs = [(queries, keys, config.strides, "head")]
        pooled = config.tokens_per_pooled_query
        pairs.append((*pooled_query_features(case.q, case.k, pooled, 1, scale), (pooled, 1), "pooled"))
        shares = [
            row_share(block_mass(*(round_rows(x, precision) for x in (a, b)), strides=strides, phase=phase, **facts))
            for a, b, strides, phase in pairs
        ]
        return sum(shares) / 2

    return Rule(weigh, config.block_sizes, config.budget, cost_of(config))


LOW_PRECISION = {
    f"{preset}, {precision.upper()}": in_low_precision(RRConfig.from_preset(preset), precision)
    for preset in ("fast", "best")
    for precision in ("fp8", "int8")
}
