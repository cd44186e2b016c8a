"""The stages of rr_attention, each compiled by itself, so that each can be timed."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from benchmarks.cases import Case
from mask_mods import block_visibility, causal
from rr_flex import RRConfig, select_blocks
from rr_flex.block_mask import block_mask_of_lists, build_block_mask, list_partial_and_full
from rr_flex.kernels.choose import check_flash
from rr_flex.kernels.last_rows import first_query, merge_runs, rows_apart, run_queries, take_apart, write_last_rows
from rr_flex.mandatory import mandatory_blocks
from rr_flex.pipeline import select
from rr_flex.runtime.compiling import RECOMPILE_LIMIT
from rr_flex.runtime.head_slices import head_slices
from rr_flex.selection import select_density, select_threshold, select_top_tau

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
    if len(head_slices(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], config)) > 1:
        return select_blocks(q, k, config=without_level(config)).mass  # one graph for all strips
    return estimate_of(without_level(config))(q, k)


def without_level(config: RRConfig) -> RRConfig:
    """One configuration for all of its levels, on which neither the mass nor any compiled code depends."""
    default = RRConfig()
    return replace(config, tau=default.tau, threshold=default.threshold, target_density=default.target_density)


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
    if config.budget == "density":
        return select_density(mass, level[0], blocks.visible, blocks.mandatory), blocks
    if config.budget == "threshold":
        return select_threshold(mass, level[:, None], blocks.visible, blocks.mandatory), blocks
    count = config.mandatory == "count"
    kept = select_top_tau(mass, level[:, None], blocks.visible, blocks.mandatory, count_mandatory=count)
    return kept, blocks


choose_compiled = compile_static(choose)


@compile_static
def lists(kept: Bool[Tensor, "B Hq nQ nK"], whole: Bool[Tensor, "1 1 nQ nK"]) -> tuple[Tensor, ...]:
    """Kept blocks to the partial and full lists of a BlockMask."""
    return list_partial_and_full(kept, whole)


def selection(q: Tensor, k: Tensor, level: Float[Tensor, " Hq"], config: RRConfig) -> tuple[Tensor, ...]:
    """Everything before attention, as one graph: q and k to both lists."""
    return _selection(q, k, level, q.new_zeros((), dtype=torch.int64), without_level(config))


@compile_static
def _selection(q, k, level, offset, config):
    chosen = select(q, k, level, offset, offset, config, None, None, None)
    return list_partial_and_full(chosen.kept, chosen.whole)


def block_mask(kept: Tensor, whole: Tensor, config: RRConfig, L: int) -> BlockMask:
    """As rr_attention builds it: right in the compiled kernel only."""
    return build_block_mask(kept, whole, causal(0), block_size=config.block_sizes, seq_lengths=(L, L), look_up=False)


attend = compile_static(flex_attention)


class Masks(NamedTuple):
    """The BlockMask of all block rows; where the last `apart` of them attend in runs, that of these."""

    all_rows: BlockMask
    runs: BlockMask | None = None
    apart: int = 0


def masks_apart(kept: Tensor, whole: Tensor, config: RRConfig, L: int, kernel: str) -> Masks:
    """As rr_attention attends on CUDA, in step with rr_flex/kernels/graphs.py: long contexts' last rows apart."""
    apart, (q_block, _) = rows_apart(L, L, config, kernel), config.block_sizes
    if not apart:
        return Masks(block_mask(kept, whole, config, L))
    offsets = (torch.full((2,), x, dtype=torch.int64, device=kept.device) for x in (0, first_query(L, apart, q_block)))
    lists = take_apart(list_partial_and_full(kept, whole), apart)
    of_rows, of_runs = (
        block_mask_of_lists(each, causal(offset), block_size=config.block_sizes, seq_lengths=(queries, L))
        for each, offset, queries in zip(lists, offsets, (L, apart * q_block), strict=True)
    )
    return Masks(of_rows, of_runs, apart)


def attend_apart(q: Tensor, k: Tensor, v: Tensor, masks: Masks, options: dict[str, Any]) -> Tensor:
    settings = {"enable_gqa": True, "kernel_options": options}
    out = attend(q, k, v, block_mask=masks.all_rows, **settings)
    if masks.runs is not None:
        q_block = masks.runs.BLOCK_SIZE[0]
        queries = run_queries(q, masks.apart, q_block)
        runs, aux = attend(queries, k, v, block_mask=masks.runs, return_aux=AuxRequest(lse=True), **settings)
        flash = options.get("BACKEND") == "FLASH"
        in_nats = check_flash(q.device, q.shape[-1], v.shape[-1], q.dtype).lse_factor if flash else 1.0
        write_last_rows(out, merge_runs(runs, aux.lse * in_nats)[0], masks.apart, q_block)
    return out


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
