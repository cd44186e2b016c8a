"""FlashAttention 4 through FlexAttention (backend FLASH): when it can run, whether it is right, and how it attends."""

import importlib.util
import math
import warnings
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from mask_mods import causal
from mask_mods.spans import MaskMod, per_sequence
from rr_flex.block_mask import Lists, list_partial_and_full
from rr_flex.kernels.flex import Attended, flex, with_last_rows
from rr_flex.kernels.last_rows import first_query, merge_pieces, piece_queries, take_apart
from rr_flex.kernels.options import attention_options
from rr_flex.pipeline import select
from rr_flex.request import Request
from rr_flex.runtime.compiling import compile_whole
from rr_flex.runtime.tracing import eager_may_run, traced

BLOCK = (128, 128)
CHECK_LENGTH = 712  # tokens of the self-check: five blocks and a part of one
CHECK_ERROR = 1e-2  # relative, of the output in half precision; a dropped or extra block gives above 0.1
CHECK_LSE_ERROR = 1e-2  # absolute, in nats
# flash-attn-4's log-sum-exp comes in nats, or from torch 2.11's template in nats · ln 2.
LSE_FACTORS = (1.0, 1 / math.log(2))


@dataclass(frozen=True)
class FlashCheck:
    """What a small problem through FlexAttention's FLASH backend showed."""

    refused: str | None  # why it can't be used; None: its output is right
    lse_factor: float = 1.0  # that turns its log-sum-exp into nats


_checks: dict[tuple, FlashCheck] = {}


def why_not(q: Tensor, v: Tensor, request: Request) -> str | None:
    """What speaks against FLASH, or None."""
    if q.device.type != "cuda":
        return f"it runs on CUDA, not on {q.device.type}"
    if traced():
        return "inside a caller's torch.compile its mask can't capture what the graph computes"
    if eager_may_run():
        return "torch.compile is off or may run eagerly (TORCH_COMPILE_DISABLE, set_stance)"
    if not flash_is_installed():
        return "flash-attn-4 is not installed"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if request.config.block_sizes != BLOCK:
        q_block, k_block = request.config.block_sizes
        return f"it takes blocks of 128 × 128 tokens, not {q_block} × {k_block}"
    if request.backward:
        return "gradients are taken with Triton's kernel"
    if request.softcap is not None:
        return "a soft cap is Triton's, as a score_mod"
    return check_flash(q.device, q.shape[-1], v.shape[-1], q.dtype).refused


@cache  # a search for what is absent takes tens of microseconds
def flash_is_installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def attend(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Attended:
    """One slice of heads, without soft cap, in two graphs.

    In one its kernel would read what its mask captures after the graph has freed it, if anything else in the graph uses
    that too (torch 2.11: its reads are unknown to the scheduler).
    """
    whole, pieces, density = _chosen_compiled(q, k, request)
    return attend_chosen((q, k, v), whole, pieces, request)._replace(density=density)


def attend_chosen(
    qkv: tuple[Tensor, Tensor, Tensor], whole: tuple | None, pieces: tuple | None, request: Request
) -> Attended:
    """The rest of `attend`, from what `_chosen` gives: (lists, offset) and (queries, lists, offset)."""
    q, k, v = qkv
    options = attention_options(q, request.config.block_sizes, "flash")
    settings = {"scale": request.scale, "kernel_options": options}
    in_nats = check_flash(q.device, q.shape[-1], v.shape[-1], q.dtype).lse_factor
    want_lse = "lse" in request.returns

    def mask_at(offset: Tensor) -> MaskMod:
        mask_mod = request.mask_at(offset)
        return mask_mod if request.own_mask is None else per_sequence(mask_mod, q.shape[0])

    # FLASH can't capture an int that may change; a plain causal mask has none.
    lengths = "any" if request.own_mask is None and request.causal else "one"
    if pieces is None:
        lists, offset = whole
        out, lse = FLEX[lengths]((q, lists, mask_at(offset)), k, v, settings, want_lse)
        return Attended(out, lse * in_nats if want_lse else None, None)
    queries, lists_of_pieces, offset_of_pieces = pieces
    of_pieces = (queries, lists_of_pieces, mask_at(offset_of_pieces))
    if whole is None:
        merged = FLEX_PIECES[lengths](of_pieces, k, v, settings, in_nats)
        return with_last_rows(Attended(*merged, None), None, request, q.shape[2])
    lists, offset = whole
    of_rows = (q, lists, mask_at(offset))
    out, lse, last_rows = FLEX_APART[lengths](of_rows, of_pieces, k, v, settings, in_nats)
    return with_last_rows(Attended(out, lse, None), last_rows, request, q.shape[2])


def _chosen(q: Tensor, k: Tensor, request: Request) -> tuple[tuple | None, tuple | None, Tensor | None]:
    """(lists, offset) of the block rows that attend as they are; (queries, lists, offset) of those in pieces; the
    density if it is wanted. None where there are no such rows.

    Results of a graph, so that the attention's own is given tensors whose strides are settled: of a single batch made
    in it the stride would be 0, and FLASH refuses what it makes of that.
    """
    chosen = select(q, k, request)
    density = chosen.density_per_head if "density" in request.returns else None
    rows, B = request.rows_apart, q.shape[0]
    offset = offset_per_batch(request.q_offset, B)
    if not rows:
        return (list_partial_and_full(chosen.kept, chosen.whole), offset), None, density
    _, H, nQ, nK = chosen.kept.shape
    q_block = request.config.block_sizes[0]
    kept, pieces = take_apart(chosen.kept, rows)
    last = chosen.whole.expand(B, H, nQ, nK)[:, :, nQ - rows :]
    of_pieces = (
        piece_queries(q, rows, q_block),
        list_partial_and_full(pieces, last.repeat_interleave(pieces.shape[1] // H, 1)),
        offset_per_batch(request.q_offset + first_query(q.shape[2], rows, q_block), B),
    )
    whole = None if rows == nQ else (list_partial_and_full(kept, chosen.whole), offset)
    return whole, of_pieces, density


def block_mask_of(lists: Lists, mask_mod: MaskMod, Lq: int, Lk: int) -> BlockMask:
    """The BlockMask of lists that were made elsewhere; right in a compiled kernel only, which is all that FLASH is."""
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(Lq, Lk), compute_q_blocks=False
    )


def _flex(whole, k, v, settings, lse):
    """(out, lse or None) of `whole`: (queries, lists, mask)."""
    q, lists, mask_mod = whole
    return flex(q, k, v, block_mask_of(lists, mask_mod, q.shape[2], k.shape[2]), settings, lse=lse)


def _flex_apart(whole, pieces, k, v, settings, in_nats):
    """out, lse, and (out, lse) of the last block rows; `whole` and `pieces` are (queries, lists, mask)."""
    out, lse = _flex(whole, k, v, settings, True)
    return out, lse * in_nats, _flex_pieces(pieces, k, v, settings, in_nats)


def _flex_pieces(pieces, k, v, settings, in_nats):
    """(out, lse) of block rows in pieces, merged."""
    out, lse = _flex(pieces, k, v, settings, True)
    return merge_pieces(out, lse * in_nats)


_chosen_compiled = compile_whole(_chosen)


def _for_lengths(function):
    """For any lengths, and for the lengths of one call."""
    return {
        "any": compile_whole(function, dynamic=True, specialize_int=False),
        "one": compile_whole(function, dynamic=False),
    }


FLEX, FLEX_APART, FLEX_PIECES = _for_lengths(_flex), _for_lengths(_flex_apart), _for_lengths(_flex_pieces)


def offset_per_batch(offset: Tensor, B: int) -> Tensor:
    """A 0-dim offset as [B], or [2] for a single batch: FLASH's mask can't load an element that needs no index."""
    return offset.expand(max(B, 2)).contiguous()


def check_flash(device: torch.device, head_dim: int, value_dim: int, dtype: torch.dtype) -> FlashCheck:
    """The self-check for these head dims and dtype: run at first use, remembered afterwards.

    Not if memory was what it lacked: that says nothing about the kernel.
    """
    key = (device.index, head_dim, value_dim, dtype)
    if key not in _checks:
        try:
            _checks[key] = _run_check(device, head_dim, value_dim, dtype)
        except torch.OutOfMemoryError as error:
            return FlashCheck(f"its self-check ran out of memory, and is run again: {str(error)[:200]}")
    return _checks[key]


@torch.no_grad()
def _run_check(device: torch.device, head_dim: int, value_dim: int, dtype: torch.dtype) -> FlashCheck:
    """Grouped heads, a ragged length, dropped blocks, against float32; the output and the log-sum-exp."""
    L = CHECK_LENGTH
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, head_dim), (2, head_dim), (2, value_dim))
    q, k, v = (torch.randn(1, heads, L, D, generator=generator).to(device, dtype) for heads, D in sizes)
    nQ = -(-L // 128)
    order = torch.arange(nQ)
    diagonal = order[:, None] == order
    kept = (order[:, None] >= order) & (torch.rand(1, 4, nQ, nQ, generator=generator) < 0.4) | diagonal
    shown = kept.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :L, :L].tril().to(device)
    scores = (q.float() @ k.float().repeat_interleave(2, 1).mT) * head_dim**-0.5
    scores = scores.masked_fill(~shown, -torch.inf)
    exact, exact_lse = scores.softmax(-1) @ v.float().repeat_interleave(2, 1), scores.logsumexp(-1)
    offset = offset_per_batch(torch.zeros((), dtype=torch.int64, device=device), 1)
    lists = list_partial_and_full(kept.to(device), (~diagonal).to(device).expand(1, 1, nQ, nQ))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own deprecations are no reason against it
            out, aux = torch.compile(flex_attention, fullgraph=True, dynamic=False)(
                q,
                k,
                v,
                block_mask=block_mask_of(lists, causal(offset), L, L),
                enable_gqa=True,
                return_aux=AuxRequest(lse=True),
                kernel_options={"BACKEND": "FLASH"},
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a beta's compilation may fail in any way
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return FlashCheck(f"its self-check stopped with {type(error).__name__}: {reason}")
    found = ((out - exact).norm() / exact.norm()).item()
    if not found < CHECK_ERROR:
        return FlashCheck(f"its self-check was off by {found:.2g} of the output's norm")
    for factor in LSE_FACTORS:
        if (aux.lse * factor - exact_lse).abs().amax() < CHECK_LSE_ERROR:
            return FlashCheck(None, factor)
    return FlashCheck("its self-check found a log-sum-exp that is neither in nats nor in nats · ln 2")
