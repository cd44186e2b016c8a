"""Attention of a rank's queries over the blocks that were chosen for them, by the kernels of `rr_attention`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mask_mods.spans import MaskMod
from rr_flex.block_mask import Lists, build_block_mask, list_partial_and_full
from rr_flex.distributed.choosing import Chosen
from rr_flex.kernels import flash
from rr_flex.kernels.choose import KERNELS
from rr_flex.kernels.flex import Attended, flex, of_pieces, with_last_rows
from rr_flex.kernels.last_rows import first_query, merge_pieces, piece_queries, take_apart
from rr_flex.kernels.options import attention_options
from rr_flex.kernels.score_mods import score_mod_of
from rr_flex.request import Request
from rr_flex.runtime.compiling import compile_whole


def kernel_for(q: Tensor, v: Tensor, request: Request, backend: str, *, plain_mask: bool) -> str:
    """The name of the kernel, as `rr_attention` chooses: FLASH for a plain causal mask or none, where nothing speaks
    against it. RuntimeError for a named one that cannot run."""
    reason = "a mask of the caller's is the other kernels' here" if not plain_mask else flash.why_not(q, v, request)
    if backend == "flash" and reason is not None:
        raise RuntimeError(f"backend must be 'auto' or another kernel here, got 'flash': {reason}")
    if backend != "triton" and reason is None:
        return "flash"
    return next(name for name in ("triton", "cpu") if KERNELS[name].why_not(q, v, request) is None)


def attend(
    q: Float[Tensor, "B Hq n D"],
    k: Float[Tensor, "B Hkv m D"],
    v: Float[Tensor, "B Hkv m Dv"],
    chosen: Chosen,
    request: Request,
) -> Attended:
    """Attention over the chosen blocks of k and v, whose length is whole blocks; others are never read."""
    # The CPU's template (torch 2.13) writes code that does not compile where so many sizes are symbols.
    graph = _for_these_lengths if q.device.type == "cpu" else _for_any_length
    return with_last_rows(*graph(q, k, v, chosen, request), request)


def _attend(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, request: Request):
    kept, pieces = chosen.kept, None
    if request.rows_apart:
        kept, pieces = take_apart(kept, request.rows_apart)
    sizes = {"block_size": chosen.block_size, "seq_lengths": chosen.seq_lengths}
    block_mask = build_block_mask(kept, chosen.whole, chosen.mask_mod, **sizes)
    options = attention_options(q, chosen.block_size)
    settings = {"scale": request.scale, "kernel_options": options, "score_mod": score_mod_of(request.softcap)}
    out, lse = flex(q, k, v, block_mask, settings, lse=pieces is not None or "lse" in request.returns)
    if pieces is None:
        return Attended(out, lse, None), None
    queries, mask = of_pieces(q, chosen, pieces, request)
    return Attended(out, lse, None), merge_pieces(*flex(queries, k, v, mask, settings, lse=True))


def attend_with_flash(
    qkv: tuple[Tensor, Tensor, Tensor], last_key: Int[Tensor, " n"], chosen: Chosen, request: Request
) -> Attended:
    """`attend` by FlashAttention 4; `last_key`: the last one that each query sees, of a mask that is no other's."""
    q, k, v = qkv
    settings = {"scale": request.scale, "kernel_options": attention_options(q, chosen.block_size, "flash")}
    in_nats = flash.check_flash(q.device, q.shape[-1], v.shape[-1], q.dtype).lse_factor
    lists, of_last = _lists_compiled(chosen, request.rows_apart)
    shown = visible_to(last_key)
    if not request.rows_apart:
        return Attended(flash.FLEX["one"](q, k, v, lists, shown, settings, False)[0], None, None)
    rows, q_block = request.rows_apart, chosen.block_size[0]
    first = first_query(q.shape[2], rows, q_block)
    pieces = piece_queries(q, rows, q_block), of_last, visible_to(last_key[first:])
    out, lse, last = flash.FLEX_APART["one"]((q, lists, shown), pieces, k, v, settings, in_nats)
    return with_last_rows(Attended(out, lse, None), last, request)


def visible_to(last_key: Int[Tensor, " n"]) -> MaskMod:
    """Shows query i the keys up to last_key[i]; queries past the end of a tile are asked for too."""
    last = F.pad(last_key, (0, 2 * flash.BLOCK[0])).to(torch.int32)

    def shown(b, h, q_idx, kv_idx):
        return kv_idx <= last[q_idx]

    return shown


def _lists(chosen: Chosen, rows_apart: int) -> tuple[Lists, Lists | None]:
    """The lists of all block rows, or of all but the last ones and of these in pieces."""
    kept, whole = chosen.kept, chosen.whole
    if not rows_apart:
        return list_partial_and_full(kept, whole), None
    B, H, nQ, nK = kept.shape
    rest, pieces = take_apart(kept, rows_apart)
    last = whole.expand(B, H, nQ, nK)[:, :, nQ - rows_apart :].repeat_interleave(pieces.shape[1] // H, 1)
    return list_partial_and_full(rest, whole), list_partial_and_full(pieces, last)


_for_these_lengths = compile_whole(_attend, dynamic=False)
_for_any_length = compile_whole(_attend)
_lists_compiled = compile_whole(_lists)
