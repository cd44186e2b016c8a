"""The stages of rr_attention, each compiled by itself, so that each can be timed."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.cases import Case
from mask_mods import block_visibility, causal
from rr_flex import RRConfig, select_blocks
from rr_flex.block_mask import list_partial_and_full
from rr_flex.mandatory import mandatory_blocks
from rr_flex.pipeline import select
from rr_flex.registry import BUDGETS
from rr_flex.request import make_request
from rr_flex.runtime.head_slices import head_slices

RECOMPILE_LIMIT = 256  # graphs of one stage: one a shape and setting

BISECTIONS = 16


def compile_static(function: Callable) -> Callable:
    """`function` as one graph for exactly the sizes it meets; without this a second size compiles for all sizes."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    @wraps(function)
    def call(*args, **kwargs):
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return compiled(*args, **kwargs)

    return call


class Blocks(NamedTuple):
    """The blocks of a causal map of L × L."""

    visible: Bool[Tensor, "1 1 nQ nK"]
    whole: Bool[Tensor, "1 1 nQ nK"]
    mandatory: Bool[Tensor, "1 1 nQ nK"]


@cache
def estimate_of(config: RRConfig) -> Callable[[Tensor, Tensor], Float[Tensor, "B Hq nQ nK"]]:
    """q, k to block mass. The compiler drops the selection from select_blocks, since nothing of it is returned."""
    return compile_static(lambda q, k: select_blocks(q, k, config=config).mass)


def estimate(q: Tensor, k: Tensor, config: RRConfig) -> Float[Tensor, "B Hq nQ nK"]:
    heads, lengths = (q.shape[0], q.shape[1], k.shape[1]), (q.shape[2], k.shape[2])
    if len(head_slices(heads, lengths, config, q.device)) > 1:
        return select_blocks(q, k, config=without_level(config)).mass  # one graph for all slices
    return estimate_of(without_level(config))(q, k)


def without_level(config: RRConfig) -> RRConfig:
    """One configuration for all of its levels, on which neither the mass nor any compiled code depends."""
    name = config.level_field
    return replace(config, **{name: getattr(RRConfig(budget=config.budget), name)})


def shape_of(case: Case) -> tuple:
    """What decides the inputs of a case."""
    names = ("workload", "batch", "length", "heads", "kv_heads", "head_dim", "dtype", "seed")
    return tuple(getattr(case, name) for name in names)


def compiled_for(case: Case) -> tuple:
    """What beside the shape decides compiled code."""
    return without_level(case.config), case.backend, case.kernel_options


def causal_blocks(config: RRConfig, L: int, device: torch.device) -> Blocks:
    offset = torch.zeros((), dtype=torch.int64, device=device)
    size = config.block_sizes
    visible, whole = block_visibility(causal(offset), B=1, H=1, Lq=L, Lk=L, block_size=size, device=device)
    return Blocks(visible, whole, mandatory_blocks(visible, config, Lq=L, q_offset=offset))


def choose(
    mass: Float[Tensor, "B Hq nQ nK"], level: Float[Tensor, " Hq"], config: RRConfig, L: int
) -> tuple[Bool[Tensor, "B Hq nQ nK"], Blocks]:
    """Block mass to kept blocks. `level` is tau or the threshold of each head, or the density of all, Hq times."""
    blocks = causal_blocks(config, L, mass.device)
    return BUDGETS[config.budget].select(mass, level[:, None], blocks.visible, blocks.mandatory, config), blocks


choose_compiled = compile_static(choose)


@compile_static
def lists(kept: Bool[Tensor, "B Hq nQ nK"], whole: Bool[Tensor, "1 1 nQ nK"]) -> tuple[Tensor, ...]:
    """Kept blocks to the partial and full lists of a BlockMask."""
    return list_partial_and_full(kept, whole)


def selection(q: Tensor, k: Tensor, config: RRConfig) -> tuple[Tensor, ...]:
    """Everything before attention, as one graph: q and k to both lists."""
    return _selection(q, k, replace(make_request(q, k, config, {}), config=without_level(config)))


@compile_static
def _selection(q, k, request):
    chosen = select(q, k, request)
    return list_partial_and_full(chosen.kept, chosen.whole)


def block_mask(kept: Tensor, whole: Tensor, config: RRConfig, L: int) -> BlockMask:
    """Right in a compiled kernel only, which goes by the lists."""
    return BlockMask.from_kv_blocks(
        *list_partial_and_full(kept, whole),
        BLOCK_SIZE=config.block_sizes,
        mask_mod=causal(0),
        seq_lengths=(L, L),
        compute_q_blocks=False,
    )


_attend = compile_static(flex_attention)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: dict[str, Any]) -> Tensor:
    """Attention alone, all block rows at once: the library takes dense last rows apart, which saves some percent."""
    return _attend(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)


def density(kept: Tensor, visible: Tensor) -> float:
    """Kept blocks over visible ones, all heads together."""
    return (kept.sum() / visible.expand_as(kept).sum()).item()


def config_for_density(mass: Float[Tensor, "B Hq nQ nK"], config: RRConfig, L: int, wanted: float) -> RRConfig:
    """`config` with the tau, or the threshold, at which its density is as near to `wanted` as the blocks allow."""
    if config.budget == "density":
        return replace(config, target_density=wanted)
    rises = config.budget == "top_tau"

    def at(middle: float) -> float:
        # Thresholds are small: in their fourth power the steps are even.
        return middle if rises else middle**4

    low, high = 0.0, 1.0 if rises else 0.84
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        more = density_at(mass, at(middle), config, L) > wanted
        low, high = (low, middle) if more == rises else (middle, high)
    level = at((low + high) / 2)
    return replace(config, tau=level) if rises else replace(config, threshold=level)


def density_at(mass: Float[Tensor, "B Hq nQ nK"], level: float, config: RRConfig, L: int) -> float:
    # A few heads at a time, since a map of a million tokens is large.
    parts = []
    for heads in mass.split(8, dim=1):
        kept, blocks = choose(heads, torch.full((heads.shape[1],), level, device=mass.device), config, L)
        parts.append((density(kept, blocks.visible), heads.shape[1]))
    return sum(share * heads for share, heads in parts) / mass.shape[1]
