"""The compiled graphs of rr_attention: selection and block-sparse attention over one strip of heads."""

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from rr_flex.block_mask import block_mask_of_lists, list_partial_and_full
from rr_flex.kernels.choose import check_flash, offset_per_batch
from rr_flex.kernels.last_rows import first_query, merge_runs, run_mask, run_queries, take_apart, write_last_rows
from rr_flex.kernels.options import attention_options
from rr_flex.kernels.score_mods import score_mod_of, with_sink_block
from rr_flex.pipeline import resolve_mask, select
from rr_flex.runtime.compiling import compile_whole


class Wanted(NamedTuple):
    """What one call asks of its graph: settings, compiled in."""

    dense: bool  # every visible block
    lse: bool
    density: bool
    backward: bool
    rows_apart: int  # block rows at the end that attend by themselves


def attend_with_flex(q, k, v, level, q_offset, head_offset, config, mask_mod, causal, scale, softcap, sinks, wanted):
    """(out [B,Hq,Lq,Dv], lse [B,Hq,Lq] or None, density [B,Hq] or None), in one graph by the compiler's own kernel."""
    graph = _attend if torch.compiler.is_compiling() else _attend_compiled
    arguments = (config, mask_mod, causal, scale, softcap, sinks, wanted)
    *whole, last_rows = graph(q, k, v, level, q_offset, head_offset, *arguments)
    return _with_last_rows(*whole, last_rows, config, wanted)


def _attend(q, k, v, level, q_offset, head_offset, config, mask_mod, causal, scale, softcap, sinks, wanted):
    """The three, and apart from them (out, lse) of the block rows that attend by themselves, or None."""
    sizes = {"block_size": config.block_sizes, "seq_lengths": (q.shape[2], k.shape[2])}
    with torch.no_grad():
        chosen = select(
            q, k, level, q_offset, head_offset, config, mask_mod, causal, scale, softcap, dense=wanted.dense
        )
        density = chosen.density_per_head if wanted.density else None
        if sinks is not None:
            k, v, block_mask = with_sink_block(k, v, chosen.kept, chosen.whole, chosen.mask_mod, **sizes)
        elif wanted.rows_apart:
            lists, runs = take_apart(list_partial_and_full(chosen.kept, chosen.whole), wanted.rows_apart)
            block_mask = block_mask_of_lists(lists, chosen.mask_mod, **sizes)
        else:
            block_mask = chosen.build_block_mask(look_up=False, for_backward=wanted.backward)
    options = attention_options(q, config.block_sizes)
    score_mod = score_mod_of(softcap, sinks)
    out, lse = _flex(q, k, v, block_mask, scale, wanted.lse, options, score_mod)
    if not wanted.rows_apart:
        return out, lse, density, None
    first = first_query(q.shape[2], wanted.rows_apart, config.block_sizes[0])
    queries = run_queries(q, wanted.rows_apart, config.block_sizes[0])
    ends = (torch.full((), end, dtype=torch.int64, device=q.device) for end in (first, q.shape[2] - 1))
    mask = run_mask(chosen.mask_mod, *ends)
    sizes["seq_lengths"] = (queries.shape[2], k.shape[2])
    runs_mask = block_mask_of_lists(runs, mask, **sizes)
    return out, lse, density, merge_runs(*_flex(queries, k, v, runs_mask, scale, True, options, score_mod))


def attend_with_flash(q, k, v, level, q_offset, head_offset, config, mask_mod, causal, scale, softcap, sinks, wanted):
    """`attend_with_flex` by FLASH, without soft cap and sinks, in two graphs.

    In one its kernel would read what its mask captures after the graph has freed it, if anything else in the graph uses
    that too (torch 2.11: its reads are unknown to the scheduler).
    """
    chosen = (config, mask_mod, causal, scale, wanted.dense, wanted.density)
    lists, density = _lists_compiled(q, k, level, q_offset, head_offset, *chosen)
    q_block, options = config.block_sizes[0], attention_options(q, config.block_sizes, "flash")
    in_nats = check_flash(q.device, q.shape[-1], v.shape[-1], q.dtype).lse_factor

    def block_mask(lists, start, queries):
        mask = resolve_mask(mask_mod, causal, offset_per_batch(q_offset + start, q.shape[0]))
        return block_mask_of_lists(lists, mask, block_size=config.block_sizes, seq_lengths=(queries, k.shape[2]))

    # FLASH can't capture an int that may change; a plain causal mask has none.
    plain = mask_mod is None and causal is not False
    if not wanted.rows_apart:
        flex = _flex_for_any_length if plain else _flex_for_one_length
        out, lse = flex(q, k, v, block_mask(lists, 0, q.shape[2]), scale, wanted.lse, options)
        return out, lse * in_nats if wanted.lse else None, density
    rows, (lists, runs) = wanted.rows_apart, take_apart(lists, wanted.rows_apart)
    masks = block_mask(lists, 0, q.shape[2]), block_mask(runs, first_query(q.shape[2], rows, q_block), rows * q_block)
    # Made here: in the graph a single batch would have a stride of 0, and of the output's that FLASH made from it one
    # that it refuses.
    queries = run_queries(q, rows, q_block)
    flex = _flex_apart_for_any_length if plain else _flex_apart_for_one_length
    out, lse, last_rows = flex(q, queries, k, v, *masks, scale, options, in_nats)
    return _with_last_rows(out, lse if wanted.lse else None, density, last_rows, config, wanted)


def _with_last_rows(out, lse, density, last_rows, config, wanted):
    """The three with the block rows that attended by themselves written into them."""
    if last_rows is not None:
        for whole, last in zip((out, lse), last_rows, strict=True):
            if whole is not None:
                write_last_rows(whole, last, wanted.rows_apart, config.block_sizes[0])
    return out, lse, density


def _lists(q, k, level, q_offset, head_offset, config, mask_mod, causal, scale, dense, with_density):
    chosen = select(q, k, level, q_offset, head_offset, config, mask_mod, causal, scale, dense=dense)
    return list_partial_and_full(chosen.kept, chosen.whole), chosen.density_per_head if with_density else None


def _flex(q, k, v, block_mask, scale, return_lse, options, score_mod=None):
    """(out, lse or None)."""
    aux = AuxRequest(lse=True) if return_lse else None
    settings = {"scale": scale, "enable_gqa": True, "return_aux": aux, "kernel_options": options}
    out = flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, **settings)
    return (out[0], out[1].lse) if return_lse else (out, None)


def _flex_apart(q, queries, k, v, block_mask, runs_mask, scale, options, in_nats):
    """out, lse, and (out, lse) of the last block rows, whose runs have queries and a mask of their own; lse times
    `in_nats`."""
    out, lse = _flex(q, k, v, block_mask, scale, True, options)
    of_runs, lse_of_runs = _flex(queries, k, v, runs_mask, scale, True, options)
    return out, lse * in_nats, merge_runs(of_runs, lse_of_runs * in_nats)


_attend_compiled = compile_whole(_attend)
_lists_compiled = compile_whole(_lists)
_flex_for_any_length = compile_whole(_flex, dynamic=True, specialize_int=False)
_flex_for_one_length = compile_whole(_flex, dynamic=False)
_flex_apart_for_any_length = compile_whole(_flex_apart, dynamic=True, specialize_int=False)
_flex_apart_for_one_length = compile_whole(_flex_apart, dynamic=False)
