"""Dense or sparse: the one place that decides, whoever asks. By `min_length` if it is given, else by what the card's
measured costs predict for the work of the call (break_even.py)."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from rr_flex.config import RRConfig
from rr_flex.fields import LONG_ROW, Level
from rr_flex.kernels.break_even import Costs, Decision, Work, break_even_density, decide
from rr_flex.kernels.options import costs_of, tuned
from rr_flex.runtime.tracing import traced

# What rules keep beside mandatory blocks, where they do not say it. τ: measured on structured inputs of 131,072 tokens.
# With the mandatory blocks of short texts added it is .04 less than what SmolLM2 keeps of the demo's 2,048 tokens.
KEPT_AT_TAU = ((0.0, 0.0), (0.8, 0.16), (0.9, 0.27), (0.95, 0.39), (1.0, 1.0))
KEPT = 0.4  # any other rule, and levels that only the device knows
# A scaled threshold's in ever longer rows: of `best` and `fast` .08 to .09 of 131,072 keys, .10 to .14 of 32,768 on the
# same inputs, and .21 to .25 of these on Gemma 3 270M.
KEPT_OF_LONGEST = 0.08
IN_A_GRAPH = "in a caller's graph"  # a Decision's reason there
LONGEST = 1 << 20  # tokens of a prompt, up to which the break-even is sought


def work_of(q: Tensor, k: Tensor, first: int | None, *, causal: bool, pooled: int = 0) -> Work:
    """The work of a call whose query 0 stands at key `first` (None: only the device knows; taken to be at the end of
    the keys), and of whose keys a state has `pooled` ones."""
    (B, Hq, Lq, _), (Hkv, Lk) = q.shape, k.shape[1:3]
    first = (Lk - Lq if first is None else first) if causal else None
    left = max(0, Lk - pooled)
    return Work(batch=B, heads=Hq, kv_heads=Hkv, queries=Lq, keys=Lk, first_position=first, pooled_keys=left)


def decide_call(
    kernel: str, q: Tensor, work: Work, config: RRConfig, *, fused: bool, host: float | None = None
) -> Decision:
    """Whether a call of this work on q's device, head dim and dtype is sparse, by the kernel of that name.

    `fused`: whether a dense kernel serves the call; else dense attention is the sparse kernel over all visible blocks.
    `host`: milliseconds that a sparse call takes of the host; None: what was measured.
    """
    return decider(kernel, q, config, fused=fused, host=host)(work)


def decider(
    kernel: str, q: Tensor, config: RRConfig, *, fused: bool, host: float | None = None
) -> Callable[[Work], Decision]:
    """`decide_call` for many calls that differ in their work alone."""
    if config.min_length is not None:
        return partial(_by_length, shortest=config.min_length, whose="min_length")
    costs = costs_of(q, kernel)
    if costs is not None:
        costs = costs if host is None else replace(costs, host=host)
        return partial(_in_a_graph if traced() else _by_costs, costs=costs, fused=fused, keeps=keeps(config))
    shortest = tuned(q.device, q.shape[-1], q.dtype).get("min_length", 0) if fused else 0
    return partial(_by_length, shortest=shortest, whose="on this card sparse from")


def shortest_sparse(kernel: str, q: Tensor, kv_heads: int, config: RRConfig) -> int:
    """Tokens of a prompt from which on it is sparse where it comes at once, alone: to 128, and over LONGEST if none is.

    For those whose way must not depend on how a prompt is cut, and for reports. q [1, Hq, 1, D].
    """
    if config.min_length is not None:
        return config.min_length

    def sparse(tokens: int) -> bool:
        work = Work(batch=1, heads=q.shape[1], kv_heads=kv_heads, queries=tokens, keys=tokens, first_position=0)
        return decide_call(kernel, q, work, config, fused=True).sparse

    lengths = range(128, LONGEST + 129, 128)
    return 0 if sparse(1) else lengths[min(bisect_left(lengths, True, key=sparse), len(lengths) - 1)]


class Keeps(NamedTuple):
    """What a configuration is expected to keep."""

    block_sizes: tuple[int, int]  # tokens: (queries, keys)
    a_row: int  # mandatory blocks of a block row
    last_rows: int  # that keep every visible block
    share: float  # of all visible blocks, or beside the mandatory ones
    of_all: bool
    most: float  # blocks of a row that are no mandatory ones, however many are visible
    long_row: float  # visible blocks past which the threshold falls: `most` grows, `share` falls with them


def keeps(config: RRConfig) -> Keeps:
    by_density = config.budget == "density"
    share = config.target_density if by_density else _kept_at(config.tau) if config.budget == "top_tau" else KEPT
    mandatory = config.sink_blocks + config.local_blocks
    long_row = LONG_ROW if config.budget == "scaled_threshold" else math.inf
    most = _most_over(config.threshold)
    return Keeps(config.block_sizes, mandatory, config.dense_last_rows, share, by_density, most, long_row)


def expected_density(work: Work, keeps: Keeps) -> float:
    """Kept over visible blocks: the mandatory ones, and of the rest as much as the budget says or, where it does not,
    as was measured."""
    q_block, k_block = keeps.block_sizes
    visible, rows = work.pairs / (q_block * k_block), -(-work.queries // q_block)
    if not visible > 0:
        return 1.0
    fixed = min(1.0, (rows * keeps.a_row + keeps.last_rows * work.keys / k_block) / visible)
    if keeps.of_all:
        return max(fixed, keeps.share)
    share = keeps.share
    if keeps.long_row < math.inf:
        share = KEPT_OF_LONGEST + (share - KEPT_OF_LONGEST) * min(1.0, keeps.long_row * rows / visible)
    # In a graph rows are a symbol, of which no expression may be infinite (torch 2.15).
    if keeps.most < math.inf:
        share = min(share, keeps.most * max(rows / visible, 1 / keeps.long_row))
    return fixed + (1 - fixed) * share


def _most_over(threshold: Level | None) -> float:
    """Blocks of a row whose share can exceed a threshold; the mean over heads."""
    if threshold is None or isinstance(threshold, Tensor):
        return math.inf
    levels = threshold if isinstance(threshold, tuple) else (threshold,)
    return sum(1 / level if level else math.inf for level in levels) / len(levels)


def _kept_at(tau: Level) -> float:
    if isinstance(tau, Tensor):
        return KEPT
    tau = sum(tau) / len(tau) if isinstance(tau, tuple) else tau
    (low, kept), (high, more) = next(pair for pair in pairwise(KEPT_AT_TAU) if tau <= pair[1][0])
    return kept + (more - kept) * (tau - low) / (high - low)


def _by_length(work: Work, shortest: int, whose: str) -> Decision:
    reason = IN_A_GRAPH if traced() else f"{work.keys:,} keys, {whose} {shortest:,}"
    return Decision(work.keys >= shortest, reason)


@lru_cache(maxsize=1 << 12)  # the next layer asks the same
def _by_costs(work: Work, costs: Costs, fused: bool, keeps: Keeps) -> Decision:
    return decide(work, costs if fused else _without_dense_kernel(costs), expected_density(work, keeps))


def _in_a_graph(work: Work, costs: Costs, fused: bool, keeps: Keeps) -> Decision:
    """The same where sizes may be symbols: a guard of the graph, and no words."""
    most = break_even_density(work, costs if fused else _without_dense_kernel(costs))
    return Decision(expected_density(work, keeps) < most, IN_A_GRAPH)


def _without_dense_kernel(costs: Costs) -> Costs:
    """Dense attention is the sparse kernel over all visible blocks, in a graph that estimates nothing."""
    return replace(costs, dense_host=costs.host, dense_block=costs.kept_block)
