"""The compiler's own kernel, Triton on a GPU and C++ on a CPU: selection and attention in one graph."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from rr_flex.block_mask import build_block_mask
from rr_flex.geometry import as_tensors
from rr_flex.kernels.last_rows import first_query, merge_pieces, piece_mask, piece_queries, take_apart, write_last_rows
from rr_flex.kernels.options import attention_options
from rr_flex.kernels.score_mods import score_mod_of, with_sink_block
from rr_flex.pipeline import select
from rr_flex.request import Request
from rr_flex.result import Selection
from rr_flex.runtime.compiling import compile_whole
from rr_flex.runtime.fence import fence
from rr_flex.runtime.tracing import traced


class Attended(NamedTuple):
    """What a kernel gives for one slice of heads."""

    out: Float[Tensor, "B Hq Lq Dv"]
    lse: Float[Tensor, "B Hq Lq"] | None  # natural
    density: Float[Tensor, "B Hq"] | None


def attend(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Attended:
    """One slice of heads, in one graph."""
    if not traced():
        return with_last_rows(*_attend_compiled(q, k, v, request), request, q.shape[2])
    if q.device.type == "cpu":
        whole, _ = _attend(fence(q), fence(k), fence(v), request)
        return whole._replace(out=fence(whole.out))
    return with_last_rows(*_attend(q, k, v, request), request, q.shape[2])


def _attend(q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Attended, tuple[Tensor, Tensor] | None]:
    """Attended, and apart from it (out, lse) of the block rows that attend by themselves."""
    with torch.no_grad():
        chosen = select(q, k, request)
        density = chosen.density_per_head if "density" in request.returns else None
        sinks = None if q.device.type != "cpu" else request.sinks
        kept, pieces = take_apart(chosen.kept, request.rows_apart) if request.rows_apart else (chosen.kept, None)
    options = attention_options(q, request.config.block_sizes, whole_tiles=request.whole_tiles)
    score_mod = score_mod_of(request.softcap, sinks)
    settings = {"scale": request.scale, "kernel_options": options, "score_mod": score_mod}
    last_rows = None
    if pieces is not None:
        queries, mask = of_pieces(q, chosen, pieces, request)
        last_rows = merge_pieces(*flex(queries, k, v, mask, settings, lse=True))
        if request.rows_apart == chosen.kept.shape[2]:
            return Attended(*last_rows, density), None
    with torch.no_grad():
        if sinks is not None:
            # The CPU's kernel has no log-sum-exp to correct by: there the sinks are a key.
            k, v, block_mask = with_sink_block(k, v, chosen)
        else:
            sizes = {"block_size": chosen.block_size, "seq_lengths": chosen.seq_lengths}
            about = sizes | {"for_backward": request.backward}
            block_mask = build_block_mask(kept, chosen.whole, chosen.mask_mod, **about)
    out, lse = flex(q, k, v, block_mask, settings, lse=pieces is not None or "lse" in request.returns)
    return Attended(out, lse, density), last_rows


def flex(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, settings: dict, *, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, log-sum-exp or None) of flex_attention with grouped heads."""
    out = flex_attention(
        q, k, v, block_mask=block_mask, enable_gqa=True, return_aux=AuxRequest(lse=True) if lse else None, **settings
    )
    return (out[0], out[1].lse) if lse else (out, None)


def of_pieces(q: Tensor, chosen: Selection, pieces: Tensor, request: Request) -> tuple[Tensor, BlockMask]:
    """Queries and BlockMask of the last rows' pieces."""
    Lq, rows, q_block = q.shape[2], request.rows_apart, chosen.block_size[0]
    first, last = as_tensors((first_query(Lq, rows, q_block), Lq - 1), q.device)
    B, H, nQ, nK = chosen.kept.shape
    per_piece = pieces.shape[1] // H
    whole = chosen.whole.expand(B, H, nQ, nK)[:, :, nQ - rows :].repeat_interleave(per_piece, 1)
    queries = piece_queries(q, rows, q_block)
    mask = build_block_mask(
        pieces,
        whole,
        piece_mask(chosen.mask_mod, first, last),
        block_size=chosen.block_size,
        seq_lengths=(queries.shape[2], chosen.seq_lengths[1]),
    )
    return queries, mask


def with_last_rows(whole: Attended, last_rows: tuple[Tensor, Tensor] | None, request: Request, Lq: int) -> Attended:
    """What was asked for of Lq queries, with the block rows that attended by themselves written into it."""
    lse = whole.lse if "lse" in request.returns else None
    if last_rows is None and request.rows_apart:
        # All rows were in pieces. Cut here: in the graph that would make a constant of Lq, which no mask may capture.
        return whole._replace(out=whole.out[:, :, :Lq], lse=None if lse is None else lse[:, :, :Lq])
    if last_rows is not None:
        for all_rows, last in zip((whole.out, lse), last_rows, strict=True):
            if all_rows is not None:
                write_last_rows(all_rows, last, request.rows_apart, request.config.block_sizes[0])
    return whole._replace(lse=lse)


_attend_compiled = compile_whole(_attend)
