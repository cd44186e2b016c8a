"""Estimates whose features are rounded to FP8 or INT8 with a scale a row: accuracy, not speed."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods import causal
from rr_flex.config import RRConfig
from rr_flex.evaluation.rules import Case, Rule, cost_of
from rr_flex.mass import Samples, block_mass, row_share
from rr_flex.sampling import pooled_features, sample_queries, with_square

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
        facts = {"mask_mod": causal(), "seq_lengths": (L, L), "block_size": config.block_sizes, "scale": scale}
        queries = sample_queries(case.q, config.strides[0])
        keys = pooled_features(case.k, config.strides[1], config.order)
        if config.order == 2:
            queries = with_square(queries, config.variance_weight * scale)
        pairs = [(queries, keys, config.strides, "one")]
        pooled = config.tokens_per_pooled_query
        pairs.append((pooled_features(case.q, pooled, 1), case.k, (pooled, 1), "all"))
        shares = [
            row_share(
                block_mass(
                    Samples(*(round_rows(x, precision) for x in (a, b)), strides=strides, stands_for=which, **facts)
                )
            )
            for a, b, strides, which in pairs
        ]
        return sum(shares) / 2

    return Rule(weigh, config.block_sizes, config.budget, cost_of(config))


LOW_PRECISION = {
    f"{name}, {precision.upper()}": in_low_precision(
        RRConfig.from_preset("best", block_size=(128, 64), order=order), precision
    )
    for name, order in (("order 1", 1), ("best", 2))
    for precision in ("fp8", "int8")
}
