"""Queries, keys and values to outputs: selection and block-sparse attention in one compiled graph."""

from collections import Counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from mask_mods.spans import MaskMod
from rr_flex.backends import Backend, check_backend, check_flash, choose_kernel, offset_per_batch
from rr_flex.block_mask import block_mask_of_lists, list_partial_and_full
from rr_flex.checks import check_call, check_differentiable, check_queries_and_keys, check_values
from rr_flex.compiling import compile_whole
from rr_flex.config import RRConfig
from rr_flex.dense import dense_attention, dense_kernel_serves
from rr_flex.kernel import attention_options, break_even
from rr_flex.pipeline import device_arguments, in_strips, resolve_mask, select

# How often rr_attention ran which way: "dense", or sparse on "cpu", "triton" or "flash". A call inside a caller's
# torch.compile is not counted.
calls: Counter[str] = Counter()


def rr_attention(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    v: Float[Tensor, "B Hkv Lk Dv"],
    *,
    config: RRConfig | None = None,
    mask_mod: MaskMod | None = None,
    causal: bool | None = None,
    scale: float | None = None,
    q_offset: int | Tensor | None = None,
    head_offset: int | Tensor = 0,
    return_lse: bool = False,
    return_density: bool = False,
    backend: Backend = "auto",
    **settings: Any,
) -> Float[Tensor, "B Hq Lq Dv"] | tuple[Tensor, ...]:
    """Attention over the blocks that `select_blocks` keeps; arguments and errors as there.

    Compiled as one graph (two with FLASH); the first call for a shape takes seconds. A query that sees nothing gives 0.
    The selection is held fixed under differentiation. `return_lse` adds the natural log-sum-exp of each query's kept
    logits, float32 [B, Hq, Lq]; `return_density` adds the Selection's density (1 where it is dense), 0-dim, for which
    nothing waits.
    Under `config.min_length` keys (None: where the card was measured to gain nothing) it is dense attention.
    `backend` on CUDA: "triton", "flash" (FlashAttention 4, an extra) or "auto": flash where it is installed, passes a
    self-check and the mask is only causal or none; inside a caller's torch.compile always triton.
    NotImplementedError on the CPU for `return_lse` or tensors that require grad; RuntimeError for a "flash" that
    cannot run.
    """
    check_queries_and_keys(q, k)
    check_values(q, k, v)
    check_differentiable(q, k, v)
    check_call(q, k, config=config, mask_mod=mask_mod, scale=scale, q_offset=q_offset, head_offset=head_offset)
    if return_lse and q.device.type == "cpu":
        raise NotImplementedError("return_lse must be False on the CPU, whose compiled kernel has none, got True")
    config = (config or RRConfig()).with_settings(settings)
    check_backend(backend, q)
    min_length = break_even(q) if config.min_length is None else config.min_length
    dense = k.shape[2] < min_length
    if dense and dense_kernel_serves(q, k, mask_mod, q_offset, return_lse):
        count("dense")
        out = dense_attention(q, k, v, causal=causal is not False, scale=scale)
        return (out, q.new_ones((), dtype=torch.float32)) if return_density else out

    for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    kernel = choose_kernel(backend, q, v, config.block_sizes, plain_mask=mask_mod is None, for_backward=for_backward)
    count("dense" if dense else kernel)
    config = config.with_settings({"min_length": min_length if dense else 0})
    level, q_offset, head_offset = device_arguments(q, k, config, q_offset, head_offset)
    attend = _attend if torch.compiler.is_compiling() else _attend_compiled
    if kernel == "flash":
        attend = _attend_in_two_graphs
    parts = [
        attend(*strip, config, mask, causal, scale, return_lse, return_density, for_backward)
        for *strip, mask in in_strips(q, (k, v), level, q_offset, head_offset, config, mask_mod)
    ]
    out, lse, density = (
        None if x[0] is None else x[0] if len(parts) == 1 else torch.cat(x, dim=1) for x in zip(*parts, strict=True)
    )
    if return_lse and kernel == "flash":
        lse = lse * check_flash(q.device, q.shape[-1], v.shape[-1], q.dtype).lse_factor
    wanted = (out, *((lse,) if return_lse else ()), *((density.mean(),) if return_density else ()))
    return wanted if len(wanted) > 1 else out


def _attend(
    q, k, v, level, q_offset, head_offset, config, mask_mod, causal, scale, return_lse, return_density, for_backward
):
    """(out [B,Hq,Lq,Dv], lse [B,Hq,Lq] or None, density [B,Hq] or None) of one strip of heads."""
    with torch.no_grad():
        chosen = select(q, k, level, q_offset, head_offset, config, mask_mod, causal, scale)
        block_mask = chosen.build_block_mask(look_up=False, for_backward=for_backward)
        density = chosen.density_per_head if return_density else None
    return *_flex(q, k, v, block_mask, scale, return_lse, attention_options(q, config.block_sizes)), density


def _attend_in_two_graphs(
    q, k, v, level, q_offset, head_offset, config, mask_mod, causal, scale, return_lse, return_density, for_backward
):
    """`_attend` for FLASH, whose kernel reads what its mask captures after the graph has freed it, if anything else in
    that graph uses it too (torch 2.11: its reads are unknown to the scheduler)."""
    lists, density = _lists_compiled(
        q, k, level, q_offset, head_offset, config, mask_mod, causal, scale, return_density
    )
    mask = resolve_mask(mask_mod, causal, offset_per_batch(q_offset, q.shape[0]))
    sizes = {"block_size": config.block_sizes, "seq_lengths": (q.shape[2], k.shape[2])}
    options = attention_options(q, config.block_sizes, "flash")
    # FLASH can't capture an int that may change; a plain causal mask has none.
    flex = _flex_for_any_length if mask_mod is None and causal is not False else _flex_for_one_length
    return *flex(q, k, v, block_mask_of_lists(lists, mask, **sizes), scale, return_lse, options), density


def _lists(q, k, level, q_offset, head_offset, config, mask_mod, causal, scale, return_density):
    chosen = select(q, k, level, q_offset, head_offset, config, mask_mod, causal, scale)
    return list_partial_and_full(chosen.kept, chosen.whole), chosen.density_per_head if return_density else None


def _flex(q, k, v, block_mask, scale, return_lse, options):
    """(out, lse or None)."""
    aux = AuxRequest(lse=True) if return_lse else None
    out = flex_attention(
        q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True, return_aux=aux, kernel_options=options
    )
    return (out[0], out[1].lse) if return_lse else (out, None)


_attend_compiled = compile_whole(_attend)
_lists_compiled = compile_whole(_lists)
_flex_for_any_length = compile_whole(_flex, dynamic=True, specialize_int=False)
_flex_for_one_length = compile_whole(_flex, dynamic=False)


def count(way: str) -> None:
    if not torch.compiler.is_compiling():
        calls[way] += 1
