"""Queries, keys and values to outputs: how one call is answered, dense or sparse, and by which kernel."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods.spans import MaskMod
from rr_flex.checks import (
    as_autocast_says,
    check_differentiable,
    check_flag,
    check_queries_and_keys,
    check_sinks,
    check_values,
    gradient_wanted,
)
from rr_flex.config import RRConfig
from rr_flex.estimate import estimate_mass, in_strips, valid_keys_of
from rr_flex.kernels.choose import KERNELS, Backend, check_backend, choose_kernel, rows_taken_apart
from rr_flex.kernels.dense import SHORTEST_FLASH, dense_attention, dense_kernel_serves
from rr_flex.kernels.flex import Attended
from rr_flex.kernels.options import break_even
from rr_flex.kernels.score_mods import beside_sinks
from rr_flex.pipeline import is_short
from rr_flex.request import Request, in_head_slices, make_request
from rr_flex.runtime.tracing import traced
from rr_flex.state import PrefillState, check_state

# How often rr_attention ran which way: "dense", or sparse on "cpu", "triton" or "flash"; and how often its mass was
# found in strips, the slow form (see estimate.in_strips). A call inside a caller's torch.compile is not counted.
calls: Counter[str] = Counter()


@as_autocast_says
def rr_attention(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    v: Float[Tensor, "B Hkv Lk Dv"],
    *,
    config: RRConfig | None = None,
    mask_mod: MaskMod | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " Hq"] | None = None,
    q_offset: int | Tensor | None = None,
    head_offset: int | Tensor = 0,
    state: PrefillState | None = None,
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
    [B, Hq, Lq]; `return_density` adds the Selection's density (1 where it is dense, 0 for a head that sees nothing; the
    mean of heads), 0-dim, for which nothing waits.
    Under `config.min_length` keys (None: where the card was measured to gain nothing) it is dense attention.
    `backend` on CUDA: "triton", "flash" (FlashAttention 4, an extra) or "auto": flash where it is installed, passes a
    self-check, there is no soft cap and the mask is only causal or none; inside a caller's torch.compile always triton.
    NotImplementedError on the CPU for `return_lse` or tensors that require grad; RuntimeError for a "flash" that
    cannot run.
    """
    check_queries_and_keys(q, k)
    check_values(q, k, v)
    check_sinks(q, sinks)
    check_differentiable(q, k, v, sinks)
    check_backend(backend, q)
    for name, flag in (("return_lse", return_lse), ("return_density", return_density)):
        check_flag(name, flag)
    if return_lse and q.device.type == "cpu":
        raise NotImplementedError("return_lse must be False on the CPU, whose compiled kernel has none, got True")
    backward = gradient_wanted(q, k, v)
    if not backward:
        q, k, v = q.detach(), k.detach(), v.detach()  # flex looks at requires_grad alone
    options = {"mask_mod": mask_mod, "causal": causal, "scale": scale, "softcap": softcap}
    options |= {"q_offset": q_offset, "head_offset": head_offset}
    request = make_request(q, k, RRConfig.resolve(config, settings), options)
    returns = (*(("lse",) if return_lse else ()), *(("density",) if return_density else ()))
    request = replace(request, sinks=sinks, backward=backward, returns=returns)
    check_state(state)
    if is_short(k, shortest_sparse(q, request.config, plain_softmax=request.plain_softmax)):
        request = replace(request, estimate="none")
    elif state is not None:
        request = state.pool(q, k, request)
    name = choose_kernel(backend, q, v, request)
    if request.dense and request.plain_softmax and dense_kernel_serves(q, k, mask_mod, q_offset, return_lse):
        count("dense")
        flash = "must" if backend == "flash" else "no"
        if backend == "auto" and name == "flash" and q.shape[2] >= SHORTEST_FLASH:
            flash = "if right"
        out = dense_attention(q, k, v, causal=request.causal, scale=scale, flash=flash)
        return (out, q.new_ones((), dtype=torch.float32)) if return_density else out
    count("dense" if request.dense else name)
    out, lse, density = attend(name, (q, k, v), request)
    results = (out, *((lse,) if return_lse else ()), *((density.mean(),) if return_density else ()))
    return results if len(results) > 1 else out


def attend(name: str, qkv: tuple[Tensor, Tensor, Tensor], request: Request) -> Attended:
    """A request answered by the kernel of this name, a slice of heads at a time."""
    q, k, v = qkv
    sinks = request.sinks
    corrected = sinks is not None and q.device.type != "cpu"
    if corrected and "lse" not in request.returns:
        request = replace(request, returns=(*request.returns, "lse"))
    request = replace(request, rows_apart=rows_taken_apart(name, q, k, request))
    valid = valid_keys_of(request, q, k)
    if valid is not None:
        v = torch.where(valid[..., None], v, 0)  # padding weighs 0, and 0 · NaN is NaN
    parts = [
        KERNELS[name].attend(*own_qkv, with_mass_of_strips(*own_qkv[:2], own))
        for _, own, own_qkv in in_head_slices(request, q, k, v)
    ]
    out, lse, density = (
        None if x[0] is None else x[0] if len(parts) == 1 else torch.cat(x, dim=1) for x in zip(*parts, strict=True)
    )
    return Attended(beside_sinks(out, lse, sinks) if corrected else out, lse, density)


def with_mass_of_strips(q: Tensor, k: Tensor, request: Request) -> Request:
    """The request with its mass, where that is held in strips: a loop that no graph should unroll. Counted."""
    if request.dense or traced() or not in_strips(q, k, request):
        return request
    count("mass in strips")
    with torch.no_grad():
        return replace(request, mass=estimate_mass(q, k, request))


def shortest_sparse(q: Tensor, config: RRConfig, *, plain_softmax: bool = True) -> int:
    """Keys from which on attention is sparse: `config.min_length`, or if that is None the card's break-even.

    That was measured against torch's fused dense kernel: without a plain softmax there is none, and it is 0.
    """
    if config.min_length is not None:
        return config.min_length
    return break_even(q) if plain_softmax else 0


def count(way: str) -> None:
    if not traced():
        calls[way] += 1
