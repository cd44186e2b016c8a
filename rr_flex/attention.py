"""Queries, keys and values to outputs: how one call is answered, dense or sparse, and by which kernel."""

from collections import Counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods.spans import MaskMod
from rr_flex.checks import check_call, check_differentiable, check_queries_and_keys, check_sinks, check_values
from rr_flex.config import RRConfig
from rr_flex.kernels.choose import Backend, check_backend, choose_kernel
from rr_flex.kernels.dense import SHORTEST_FLASH, dense_attention, dense_kernel_serves
from rr_flex.kernels.graphs import Wanted, attend_with_flash, attend_with_flex
from rr_flex.kernels.last_rows import rows_apart
from rr_flex.kernels.options import break_even
from rr_flex.kernels.score_mods import beside_sinks, cap_as_tensor
from rr_flex.pipeline import DEFAULT, device_arguments, in_head_slices, is_short

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
    for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    plain_softmax = softcap is None and sinks is None
    dense = is_short(k, shortest_sparse(q, config, plain_softmax=plain_softmax))
    if dense and plain_softmax and dense_kernel_serves(q, k, mask_mod, q_offset, return_lse):
        count("dense")
        kernel = choose_kernel(backend, q, v, (128, 128), plain_mask=True, for_backward=for_backward)
        flash = kernel == "flash" and (backend == "flash" or q.shape[2] >= SHORTEST_FLASH)
        out = dense_attention(q, k, v, causal=causal is not False, scale=scale, flash=flash)
        return (out, q.new_ones((), dtype=torch.float32)) if return_density else out

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
    attend = attend_with_flash if kernel == "flash" else attend_with_flex
    parts = [
        attend(*strip, config, mask, causal, scale, cap, None if sink_keys is None else sink_keys[heads], wanted)
        for heads, *strip, mask in in_head_slices(q, (k, v), level, q_offset, head_offset, config, mask_mod)
    ]
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


def count(way: str) -> None:
    if not torch.compiler.is_compiling():
        calls[way] += 1
