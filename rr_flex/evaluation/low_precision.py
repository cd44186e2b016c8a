"""Estimates whose features are rounded to FP8 or INT8 with a scale a row, by torchao: accuracy, not speed."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods import causal
from rr_flex.config import RRConfig
from rr_flex.evaluation.estimators import Case, Rule, cost_of
from rr_flex.mass import block_mass
from rr_flex.pipeline import row_share
from rr_flex.sampling import moments, pooled_query_features, sample_queries, second_order_features

Precision = Literal["fp8", "int8"]


def round_rows(x: Float[Tensor, "... E"], precision: Precision) -> Float[Tensor, "... E"]:
    """x as float8_e4m3fn or int8 with one scale a row, and back."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        _choose_scale_float8,
        _dequantize_affine_float8,
        _quantize_affine_float8,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    rows = x.float().flatten(0, -2)
    block = (1, rows.shape[-1])
    if precision == "fp8":
        scale = _choose_scale_float8(rows, list(block), torch.float8_e4m3fn)
        back = _dequantize_affine_float8(_quantize_affine_float8(rows, scale, torch.float8_e4m3fn), scale)
    else:
        scale, zero = choose_qparams_affine(rows, MappingType.SYMMETRIC, block, torch.int8)
        whole = quantize_affine(rows, block, scale, zero, torch.int8)
        back = dequantize_affine(whole, block, scale, zero, torch.int8)
    return back.view(x.shape).to(x.dtype)


def in_low_precision(config: RRConfig, precision: Precision) -> Rule:
    """A rule with pool="both" whose dot products see rounded features on both sides."""

    def weigh(case: Case) -> Tensor:
        L, scale = case.q.shape[2], case.q.shape[3] ** -0.5
        facts = {"mask_mod": causal(), "Lq": L, "Lk": L, "block_size": config.block_sizes, "scale": scale}
        queries = sample_queries(case.q, config.strides[0])
        mean, variance = moments(case.k, config.strides[1])
        keys = mean
        if config.order == 2:
            queries, keys = second_order_features(queries, mean, variance, scale)
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
