"""The stages of rr_attention, each compiled by itself, so that each can be timed."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mask_mods import block_visibility, causal
from rr_flex import RRConfig, select_blocks
from rr_flex.block_mask import build_block_mask, list_blocks
from rr_flex.compiling import compile_whole
from rr_flex.mandatory import mandatory_blocks
from rr_flex.selection import select_threshold, select_top_tau

BISECTIONS = 24


class Blocks(NamedTuple):
    """The blocks of a causal map of L × L."""

    visible: Bool[Tensor, "1 1 nQ nK"]
    whole: Bool[Tensor, "1 1 nQ nK"]
    mandatory: Bool[Tensor, "1 1 nQ nK"]


@cache
def estimate_of(config: RRConfig) -> Callable[[Tensor, Tensor], Float[Tensor, "B Hq nQ nK"]]:
    """q, k to block mass. The compiler drops the selection from select_blocks, since nothing of it is returned."""
    return compile_whole(lambda q, k: select_blocks(q, k, config=config).mass)


def estimate(q: Tensor, k: Tensor, config: RRConfig) -> Float[Tensor, "B Hq nQ nK"]:
    # The mass does not depend on the budget; one configuration for all levels is one compilation.
    default = RRConfig()
    return estimate_of(replace(config, budget=default.budget, tau=default.tau, threshold=default.threshold))(q, k)


def causal_blocks(config: RRConfig, L: int, offset: Tensor) -> Blocks:
    visible, whole = block_visibility(
        causal(offset), B=1, H=1, Lq=L, Lk=L, block_size=config.block_sizes, device=offset.device
    )
    return Blocks(visible, whole, mandatory_blocks(visible, config, Lq=L, q_offset=offset))


@compile_whole
def choose(
    mass: Float[Tensor, "B Hq nQ nK"], level: Float[Tensor, " Hq"], offset: Tensor, config: RRConfig, L: int
) -> tuple[Bool[Tensor, "B Hq nQ nK"], Blocks]:
    """Block mass to kept blocks. `level` is tau or threshold; as a tensor it causes no compilation."""
    blocks = causal_blocks(config, L, offset)
    if config.budget == "threshold":
        return select_threshold(mass, level[:, None], blocks.visible, blocks.mandatory), blocks
    count = config.mandatory == "count"
    kept = select_top_tau(mass, level[:, None], blocks.visible, blocks.mandatory, count_mandatory=count)
    return kept, blocks


@compile_whole
def lists(kept: Bool[Tensor, "B Hq nQ nK"], whole: Bool[Tensor, "1 1 nQ nK"]) -> tuple[Tensor, ...]:
    """Kept blocks to the partial and full lists of a BlockMask."""
    return *list_blocks(kept & ~whole), *list_blocks(kept & whole)


def block_mask(kept: Tensor, whole: Tensor, config: RRConfig, L: int, offset: Tensor) -> BlockMask:
    """As rr_attention builds it: right in the compiled kernel only."""
    return build_block_mask(
        kept, whole, causal(offset), block_size=config.block_sizes, seq_lengths=(L, L), look_up=False
    )


attend = compile_whole(flex_attention)


def density(kept: Tensor, visible: Tensor) -> float:
    """Kept blocks over visible ones, all heads together."""
    return (kept.sum() / visible.expand_as(kept).sum()).item()


def config_for_density(mass: Float[Tensor, "B Hq nQ nK"], config: RRConfig, L: int, wanted: float) -> RRConfig:
    """`config` with the tau, or the threshold, at which its density is as near to `wanted` as the blocks allow."""
    offset = torch.zeros((), dtype=torch.int64, device=mass.device)
    rises = config.budget == "top_tau"

    def density_at(level: float) -> float:
        # A few heads at a time, since a map of a million tokens is large.
        return sum(
            density(*kept_and_visible(heads, level)) * heads.shape[1] / mass.shape[1] for heads in mass.split(8, 1)
        )

    def kept_and_visible(heads: Tensor, level: float) -> tuple[Tensor, Tensor]:
        levels = torch.full((heads.shape[1],), level, device=mass.device)
        kept, blocks = choose.__wrapped__(heads, levels, offset, config, L)
        return kept, blocks.visible

    low, high = 0.0, 1.0 if rises else 0.84
    for _ in range(BISECTIONS):
        # Thresholds are small: in their fourth power the steps are even.
        middle = (low + high) / 2
        more = density_at(middle if rises else middle**4) > wanted
        low, high = (low, middle) if more == rises else (middle, high)
    level = (low + high) / 2
    return replace(config, tau=level) if rises else replace(config, threshold=level**4)
