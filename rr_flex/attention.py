"""Queries, keys and values to outputs: selection and block-sparse attention in one compiled graph."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from mask_mods.spans import MaskMod
from rr_flex.backends import Backend, check_backend, check_flash, choose_kernel, offset_per_batch
from rr_flex.block_mask import block_mask_of_lists, list_partial_and_full
from rr_flex.checks import check_call, check_differentiable, check_queries_and_keys, check_sinks, check_values
from rr_flex.compiling import compile_whole
from rr_flex.config import RRConfig
from rr_flex.dense import dense_attention, dense_kernel_serves
from rr_flex.kernel import attention_options, break_even
from rr_flex.last_rows import first_query, merge_runs, rows_apart, run_mask, run_queries, take_apart
from rr_flex.pipeline import DEFAULT, device_arguments, in_strips, is_short, resolve_mask, select
from rr_flex.score_mods import beside_sinks, cap_as_tensor, score_mod_of, with_sink_block

# How often rr_attention ran which way: "dense", or sparse on "cpu", "triton" or "flash". A call inside a caller's
# torch.compile is not counted.
calls: Counter[str] = Counter()


class Wanted(NamedTuple):
    """What one call asks of its graph: settings, compiled in."""

    dense: bool  # every visible block
    lse: bool
    density: bool
    backward: bool
    rows_apart: int  # block rows at the end that attend by themselves


def rr_attention(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    v: Float[Tensor, "B Hkv Lk Dv"],
    *,
    config: RRConfig | None = None,
    mask_mod: MaskMod | None = None,
    causal: bool | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " Hq"] | None = None,
    q_offset: int | Tensor | None = None,
    head_offset: int | Tensor = 0,
    return_lse: bool = False,
    return_density: bool = False,
    backend: Backend = "auto",
    **settings: Any,
) -> Float[Tensor, "B Hq Lq Dv"] | tuple[Tensor, ...]:
    """Attention over the blocks that `select_blocks` keeps; arguments and errors as there.

    Compiled as one graph (two with FLASH); the first call for a shape takes seconds. A query that sees nothing gives 0.
    The selection is held fixed under differentiation.
    `sinks`: a logit a head that joins each query's softmax and brings no value; the selection does not look at it.
    `return_lse` adds the natural log-sum-exp of each query's kept logits (soft-capped, without the sink), float32
    [B, Hq, Lq]; `return_density` adds the Selection's density (1 where it is dense), 0-dim, for which nothing waits.
    Under `config.min_length` keys (None: where the card was measured to gain nothing) it is dense attention.
    `backend` on CUDA: "triton", "flash" (FlashAttention 4, an extra) or "auto": flash where it is installed, passes a
    self-check, there is no soft cap and the mask is only causal or none; inside a caller's torch.compile always triton.
    NotImplementedError on the CPU for `return_lse` or tensors that require grad; RuntimeError for a "flash" that
    cannot run.
    """
    check_queries_and_keys(q, k)
    check_values(q, k, v)
    check_sinks(q, sinks)
    check_differentiable(q, k, v, *(() if sinks is None else (sinks,)))
    options = {"scale": scale, "softcap": softcap, "q_offset": q_offset, "head_offset": head_offset}
    check_call(q, k, config=config, mask_mod=mask_mod, **options)
    if return_lse and q.device.type == "cpu":
        raise NotImplementedError("return_lse must be False on the CPU, whose compiled kernel has none, got True")
    config = (config or DEFAULT).with_settings(settings)
    check_backend(backend, q)
    plain_softmax = softcap is None and sinks is None
    dense = is_short(k, shortest_sparse(q, config, plain_softmax=plain_softmax))
    if dense and plain_softmax and dense_kernel_serves(q, k, mask_mod, q_offset, return_lse):
        count("dense")
        facts = {"plain_mask": True, "for_backward": differentiated(q, k, v)}
        flash = choose_kernel(backend, q, v, (128, 128), **facts) == "flash"
        out = dense_attention(q, k, v, causal=causal is not False, scale=scale, flash=flash)
        return (out, q.new_ones((), dtype=torch.float32)) if return_density else out

    for_backward = differentiated(q, k, v)
    facts = {"plain_mask": mask_mod is None, "for_backward": for_backward, "softcap": softcap is not None}
    kernel = choose_kernel(backend, q, v, config.block_sizes, **facts)
    count("dense" if dense else kernel)
    # The CPU's kernel has no log-sum-exp to correct by: there the sinks are a key.
    sink_keys = sinks if kernel == "cpu" else None
    corrected = sinks is not None and sink_keys is None
    # FLASH can't be asked by other queries what a mask of the caller's own shows.
    at_once = dense or for_backward or (kernel == "flash" and mask_mod is not None)
    apart = 0 if at_once else rows_apart(q.shape[2], k.shape[2], config, kernel)
    wanted = Wanted(dense, return_lse or corrected, return_density, for_backward, apart)
    cap = cap_as_tensor(softcap, q.device)
    level, q_offset, head_offset = device_arguments(q, k, config, q_offset, head_offset)
    attend = _attend if torch.compiler.is_compiling() else _attend_compiled
    if kernel == "flash":
        attend = _attend_in_two_graphs
    parts = []
    for heads, *strip, mask in in_strips(q, (k, v), level, q_offset, head_offset, config, mask_mod):
        strip_sinks = None if sink_keys is None else sink_keys[heads]
        *part, last_rows = attend(*strip, config, mask, causal, scale, cap, strip_sinks, wanted)
        _put(last_rows, first_query(q.shape[2], apart, config.block_sizes[0]), *part)
        parts.append(part)
    out, lse, density = (
        None if x[0] is None else x[0] if len(parts) == 1 else torch.cat(x, dim=1) for x in zip(*parts, strict=True)
    )
    if corrected:
        out = beside_sinks(out, lse, sinks)
    results = (out, *((lse,) if return_lse else ()), *((density.mean(),) if return_density else ()))
    return results if len(results) > 1 else out


def shortest_sparse(q: Tensor, config: RRConfig, *, plain_softmax: bool = True) -> int:
    """Keys from which on attention is sparse: `config.min_length`, or if that is None the card's break-even.

    That was measured against torch's fused dense kernel: without a plain softmax there is none, and it is 0.
    """
    if config.min_length is not None:
        return config.min_length
    return break_even(q) if plain_softmax else 0


def _attend(q, k, v, level, q_offset, head_offset, config, mask_mod, causal, scale, softcap, sinks, wanted):
    """(out [B,Hq,Lq,Dv], lse [B,Hq,Lq] or None, density [B,Hq] or None) of one strip of heads, and (out, lse) of the
    block rows apart, or None."""
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
    mask = run_mask(chosen.mask_mod, torch.full((), first, dtype=torch.int64, device=q.device))
    sizes["seq_lengths"] = (queries.shape[2], k.shape[2])
    runs_mask = block_mask_of_lists(runs, mask, **sizes)
    return out, lse, density, merge_runs(*_flex(queries, k, v, runs_mask, scale, True, options, score_mod))


def _attend_in_two_graphs(
    q, k, v, level, q_offset, head_offset, config, mask_mod, causal, scale, softcap, sinks, wanted
):
    """`_attend` for FLASH, whose kernel reads what its mask captures after the graph has freed it, if anything else in
    that graph uses it too (torch 2.11: its reads are unknown to the scheduler). Without soft cap and sinks."""
    lists, density = _lists_compiled(q, k, level, q_offset, head_offset, config, mask_mod, causal, scale, wanted)
    q_block, options = config.block_sizes[0], attention_options(q, config.block_sizes, "flash")
    in_nats = check_flash(q.device, q.shape[-1], v.shape[-1], q.dtype).lse_factor

    def block_mask(lists, first_query, queries):
        mask = resolve_mask(mask_mod, causal, offset_per_batch(q_offset + first_query, q.shape[0]))
        return block_mask_of_lists(lists, mask, block_size=config.block_sizes, seq_lengths=(queries, k.shape[2]))

    # FLASH can't capture an int that may change; a plain causal mask has none.
    plain = mask_mod is None and causal is not False
    if not wanted.rows_apart:
        flex = _flex_for_any_length if plain else _flex_for_one_length
        out, lse = flex(q, k, v, block_mask(lists, 0, q.shape[2]), scale, wanted.lse, options)
        return out, lse * in_nats if wanted.lse else None, density, None
    rows, (lists, runs) = wanted.rows_apart, take_apart(lists, wanted.rows_apart)
    masks = block_mask(lists, 0, q.shape[2]), block_mask(runs, first_query(q.shape[2], rows, q_block), rows * q_block)
    # Made here: in the graph a single batch would have a stride of 0, and of the output's that FLASH made from it one
    # that it refuses.
    queries = run_queries(q, rows, q_block)
    flex = _flex_apart_for_any_length if plain else _flex_apart_for_one_length
    out, lse, last_rows = flex(q, queries, k, v, *masks, scale, options, in_nats)
    return out, lse if wanted.lse else None, density, last_rows


def _put(last_rows, first, out, lse, density):
    """Writes the block rows that attended by themselves, from query `first` on, into the outputs of all."""
    if last_rows is not None:
        for whole, last in zip((out, lse), last_rows, strict=True):
            if whole is not None:
                whole[:, :, first:] = last[:, :, : whole.shape[2] - first]


def _lists(q, k, level, q_offset, head_offset, config, mask_mod, causal, scale, wanted):
    chosen = select(q, k, level, q_offset, head_offset, config, mask_mod, causal, scale, dense=wanted.dense)
    return list_partial_and_full(chosen.kept, chosen.whole), chosen.density_per_head if wanted.density else None


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


def differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def count(way: str) -> None:
    if not torch.compiler.is_compiling():
        calls[way] += 1
