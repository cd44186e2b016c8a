"""Queries, keys and values to outputs: how one call is answered, dense or sparse, and by which kernel."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
from rr_flex.estimate import valid_keys_of
from rr_flex.kernels.break_even import Decision
from rr_flex.kernels.choose import KERNELS, Backend, check_backend, choose_kernel, laid_out
from rr_flex.kernels.deciding import decide_call, work_of
from rr_flex.kernels.dense import dense_attention, keys_of_dense_call, which_flash
from rr_flex.kernels.flex import Attended
from rr_flex.kernels.score_mods import beside_sinks
from rr_flex.pipeline import with_mass_of_strips
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

    One difference: without a mask of the caller's, block rows lie on absolute positions, also where `q_offset` (an int)
    is no multiple of the block; those of a BlockMask begin with its first query.

    Compiled as one graph (two with FLASH); the first call for a shape takes seconds. A query that sees nothing gives 0.
    The selection is held fixed under differentiation.
    `sinks`: a logit a head that joins each query's softmax and brings no value; the selection does not look at it.
    `return_lse` adds the natural log-sum-exp of each query's kept logits (soft-capped, without the sink), float32
    [B, Hq, Lq]; `return_density` adds the Selection's density (1 where it is dense, 0 for a head that sees nothing; the
    mean of heads), 0-dim, for which nothing waits.
    Under `config.min_length` keys it is dense attention; if that is None, where the card's measured costs say that
    dense attention is faster (kernels/deciding.py).
    `backend` on CUDA: "triton", "flash" (FlashAttention 4, an extra) or "auto": flash where it is installed, passes a
    self-check, there is no soft cap and the mask is only causal or none; inside a caller's torch.compile always triton.
    NotImplementedError on the CPU for `return_lse` or tensors that require grad; RuntimeError for a "flash" that
    cannot run.
    """
    for name, flag in (("return_lse", return_lse), ("return_density", return_density)):
        check_flag(name, flag)
    returns = (*(("lse",) if return_lse else ()), *(("density",) if return_density else ()))
    options = {"mask_mod": mask_mod, "causal": causal, "scale": scale, "softcap": softcap}
    options |= {"q_offset": q_offset, "head_offset": head_offset}
    asked = Asked(RRConfig.resolve(config, settings), sinks, state, returns, backend)
    found = answer(q, k, v, asked, **options)
    results = (found.out, *((found.lse,) if return_lse else ()), *((found.density,) if return_density else ()))
    return results if len(results) > 1 else found.out


@dataclass(frozen=True)
class Asked:
    """What a call asks for beside its tensors and what `make_request` takes."""

    config: RRConfig
    sinks: Float[Tensor, " Hq"] | None = None
    state: PrefillState | None = None
    returns: tuple[str, ...] = ()  # "lse", "density"
    backend: Backend = "auto"
    # Whether the caller has a dense kernel for masks: where that is the faster way there is no output here.
    own_dense: bool = False
    ranks: int = 1  # that share the heads: whether sparse pays is decided for all of them, as one process would


class Answer(NamedTuple):
    """What `rr_attention` gives, and why it was dense or sparse."""

    out: Float[Tensor, "B Hq Lq Dv"] | None
    lse: Float[Tensor, "B Hq Lq"] | None
    density: Float[Tensor, ""] | None
    decision: Decision


def answer(q: Tensor, k: Tensor, v: Tensor, asked: Asked, **options: Any) -> Answer:
    """`rr_attention` for those who want to know how it was decided; `options`: those of `make_request`, by name."""
    check_queries_and_keys(q, k)
    check_values(q, k, v)
    check_sinks(q, asked.sinks)
    check_differentiable(q, k, v, asked.sinks)
    check_backend(asked.backend, q)
    check_state(asked.state, q, k)
    if "lse" in asked.returns and q.device.type == "cpu":
        raise NotImplementedError("return_lse must be False on the CPU, whose compiled kernel has none, got True")
    backward = gradient_wanted(q, k, v)
    if not backward:
        q, k, v = q.detach(), k.detach(), v.detach()  # flex looks at requires_grad alone
    request = make_request(q, k, asked.config, options)
    request = replace(request, sinks=asked.sinks, backward=backward, returns=asked.returns)
    name = choose_kernel(asked.backend, q, v, request)
    first = options.get("q_offset")  # position of query 0, where the host knows it
    first = k.shape[2] - q.shape[2] if first is None else None if isinstance(first, Tensor) else first
    plain = request.own_mask is None and request.plain_softmax and "lse" not in asked.returns
    keys = keys_of_dense_call(q, k, first, causal=request.causal) if plain else None
    work = work_of(q, k, first, causal=request.causal, pooled=asked.state.tokens if asked.state else 0)
    if asked.ranks > 1:
        work = replace(work, heads=asked.ranks * work.heads, kv_heads=asked.ranks * work.kv_heads)
    elsewhere = keys is None and asked.own_dense and request.plain_softmax
    decision = decide_call(name, q, work, asked.config, fused=keys is not None or elsewhere)
    if elsewhere and not decision.sparse:
        return Answer(None, None, None, decision)
    if not decision.sparse:
        request = replace(request, estimate="none")
        # A chunk's dense kernels are none of a caller's graph.
        if keys is not None and not (traced() and keys > q.shape[2]):
            count("dense")
            flash = which_flash(q, keys, asked.backend, backward=backward)
            options = {"causal": request.causal, "scale": request.scale, "flash": flash}
            out = dense_attention(q, k[:, :, :keys], v[:, :, :keys], **options)
            density = q.new_ones((), dtype=torch.float32) if "density" in asked.returns else None
            return Answer(out, None, density, decision)
    elif asked.state is not None:
        request = asked.state.pool(q, k, request)
    count(name if decision.sparse else "dense")
    out, lse, density = attend_on_the_grid(name, (q, k, v), request, first)
    return Answer(out, lse, None if density is None else density.mean(), decision)


def attend_on_the_grid(name: str, qkv: tuple[Tensor, Tensor, Tensor], request: Request, first: int | None) -> Attended:
    """`attend` with block rows on absolute positions, wherever a prompt is cut: whole ones are chosen as in one shot.

    `first`: position of query 0, where the host knows it. In the row that is cut there its own queries stand in for
    those that an earlier call had.
    """
    q, k, v = qkv
    row = request.config.block_sizes[0]
    before = 0 if first is None or request.dense or request.own_mask is not None else first % row
    if not before:
        return attend(name, qkv, request)
    own = min(q.shape[2], row - before)
    q = torch.cat([q[:, :, torch.arange(before, device=q.device) % own], q], 2)
    out, lse, density = attend(name, (q, k, v), request.placed_at(first - before))
    return Attended(out[:, :, before:], None if lse is None else lse[:, :, before:], density)


def attend(name: str, qkv: tuple[Tensor, Tensor, Tensor], request: Request) -> Attended:
    """A request answered by the kernel of this name, a slice of heads at a time."""
    q, k, v = qkv
    sinks = request.sinks
    corrected = sinks is not None and q.device.type != "cpu"
    if corrected and "lse" not in request.returns:
        request = replace(request, returns=(*request.returns, "lse"))
    request = laid_out(name, q, k, request)
    valid = valid_keys_of(request, q, k)
    if valid is not None:
        v = torch.where(valid[..., None], v, 0)  # padding weighs 0, and 0 · NaN is NaN
    parts = []
    for _, own, own_qkv in in_head_slices(request, q, k, v):
        ready = with_mass_of_strips(*own_qkv[:2], own)
        if ready is not own:
            count("mass in strips")
        parts.append(KERNELS[name].attend(*own_qkv, ready))
    out, lse, density = (
        None if x[0] is None else x[0] if len(parts) == 1 else torch.cat(x, dim=1) for x in zip(*parts, strict=True)
    )
    return Attended(beside_sinks(out, lse, sinks) if corrected else out, lse, density)


def count(way: str) -> None:
    if not traced():
        calls[way] += 1
