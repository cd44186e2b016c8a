"""Attention of a rank's queries over the blocks that were chosen for them, compiled as one graph."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from mask_mods.spans import MaskMod
from rr_flex.block_mask import block_mask_of_lists, build_block_mask, list_partial_and_full
from rr_flex.distributed.choose import Chosen, Logits
from rr_flex.kernels.last_rows import first_query, merge_runs, run_mask, run_queries, take_apart, write_last_rows
from rr_flex.kernels.options import attention_options
from rr_flex.kernels.score_mods import score_mod_of
from rr_flex.runtime.compiling import compile_whole


class Seen(NamedTuple):
    """What the queries see of the keys that are here."""

    chosen: Chosen
    mask_mod: MaskMod  # of query and key indices here
    block_size: tuple[int, int]
    rows_apart: int = 0  # last block rows that attend by themselves: dense ones, which one core would be long at
    lse: bool = False  # whether the log-sum-exp is asked for


def attend(
    q: Float[Tensor, "B Hq n D"], k: Float[Tensor, "B Hkv m D"], v: Float[Tensor, "B Hkv m Dv"], seen: Seen, how: Logits
) -> tuple[Float[Tensor, "B Hq n Dv"], Float[Tensor, "B Hq n"] | None]:
    """Attention over the chosen blocks of k and v, whose length is whole blocks, and its log-sum-exp or None.

    Blocks that were not chosen are never read.
    """
    # The CPU's template (torch 2.13) writes code that does not compile where so many sizes are symbols.
    graph = _for_these_lengths if q.device.type == "cpu" else _for_any_length
    out, lse, last_rows = graph(q, k, v, seen, how)
    if last_rows is not None:
        for whole, last in zip((out, lse), last_rows, strict=True):
            if whole is not None:
                write_last_rows(whole, last, seen.rows_apart, seen.block_size[0])
    return out, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen, how: Logits):
    sizes = {"block_size": seen.block_size, "seq_lengths": (q.shape[2], k.shape[2])}
    if not seen.rows_apart:
        chosen = seen.chosen.kept, seen.chosen.whole
        block_mask = build_block_mask(*chosen, seen.mask_mod, look_up=q.device.type == "cpu", **sizes)
        return *_flex(q, k, v, block_mask, how, seen), None
    lists = list_partial_and_full(seen.chosen.kept, seen.chosen.whole)
    lists, runs = take_apart(lists, seen.rows_apart)
    out, lse = _flex(q, k, v, block_mask_of_lists(lists, seen.mask_mod, **sizes), how, seen)
    queries = run_queries(q, seen.rows_apart, seen.block_size[0])
    first = first_query(q.shape[2], seen.rows_apart, seen.block_size[0])
    ends = (torch.full((), end, dtype=torch.int64, device=q.device) for end in (first, q.shape[2] - 1))
    sizes["seq_lengths"] = (queries.shape[2], k.shape[2])
    block_mask = block_mask_of_lists(runs, run_mask(seen.mask_mod, *ends), **sizes)
    return out, lse, merge_runs(*_flex(queries, k, v, block_mask, how, seen._replace(lse=True)))


def _flex(q, k, v, block_mask, how: Logits, seen: Seen):
    out = flex_attention(
        q,
        k,
        v,
        score_mod=score_mod_of(how.softcap),
        block_mask=block_mask,
        scale=how.scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True) if seen.lse else None,
        kernel_options=attention_options(q, seen.block_size),
    )
    return (out[0], out[1].lse) if seen.lse else (out, None)


_for_these_lengths = compile_whole(_attend, dynamic=False)
_for_any_length = compile_whole(_attend)
