"""Dense attention for calls in which sparse attention does not pay, through the fastest kernel that is installed."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from rr_flex.runtime.tracing import traced

Flash = Literal["no", "if right", "must"]
CHECK_LENGTH = 300  # tokens of the check of FlashAttention 4: two blocks and a part of one
CHECK_ERROR = 1e-2  # relative, in half precision
# Keys below which FlashAttention 4 takes longer to launch than torch's kernel to run: at 2,048 .14 ms against .09,
# at 4,096 .22 against .26 (H200, 32 heads of 128).
SHORTEST_FLASH = 4096
STRIP = 512  # queries of a chunk that a CPU attends at once
ROW_BYTES = 16  # rows of what torch's kernels read begin at a multiple
# In order of speed on the cards that were measured; torch takes the first that can run.
PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def keys_of_dense_call(q: Tensor, k: Tensor, first: int | None, *, causal: bool) -> int | None:
    """How many of the first keys a call sees whose query 0 stands at key `first` (None: the host does not know).

    None where the dense kernels, whose queries are the last of the keys, can't compute it: it is dense through
    flex_attention then, over all visible blocks.
    """
    if not causal:
        return k.shape[2]
    fits = first is not None and 0 <= first <= k.shape[2] - q.shape[2]
    return first + q.shape[2] if fits else None


def dense_attention(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    v: Float[Tensor, "B Hkv Lk Dv"],
    *,
    causal: bool,
    scale: float | None,
    flash: Flash = "no",
) -> Float[Tensor, "B Hq Lq Dv"]:
    """torch's scaled_dot_product_attention, causal for the last Lq queries or over all pairs, or FlashAttention 4.

    The latter where its dense kernel, another than the block-sparse one, is right on a small problem too; RuntimeError
    where it must and is not.
    """
    if _takes_flash(q, v, flash):
        return _flash_attention(q, k, v, causal, scale)
    if q.device.type == "cuda":
        q, k, v = map(_aligned, (q, k, v))
    settings = {"scale": scale}
    if q.shape[1] != k.shape[1]:  # in a graph for any size a symbol, which the function does not take
        settings["enable_gqa"] = True
    Lq, Lk = q.shape[2], k.shape[2]
    if not causal or Lq == Lk:
        with _priority(q):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **settings)
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(Lq, Lk), **settings)
    # A CPU's kernel skips nothing for a mask: strips read no more than they see.
    parts = [
        F.scaled_dot_product_attention(
            strip, k[:, :, :end], v[:, :, :end], attn_mask=_seen(strip.shape[2], end, q.device), **settings
        )
        for strip, end in _strips(q, Lk)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _aligned(x: Tensor) -> Tensor:
    """x, copied where a row does not begin at a multiple of ROW_BYTES.

    torch 2.11 does not look: there cuDNN's kernel gives wrong numbers, and FlashAttention 2 an error of the device.
    """
    size = x.element_size()
    if x.shape[-1] * size % ROW_BYTES:
        return x  # no copy of it would be aligned, and the kernels that need it do not take such head dims
    # A graph knows neither pointers nor offsets. What computes x there may write the copy itself.
    if not traced() and x.stride(-1) == 1:
        begins = (x.data_ptr(), *(step * size for step in x.stride()[:-1]))
        if not any(at % ROW_BYTES for at in begins):
            return x
    return x.clone(memory_format=torch.contiguous_format)


def _strips(q: Tensor, Lk: int) -> Iterator[tuple[Tensor, int]]:
    """Queries, and the keys up to the last of them."""
    end = Lk - q.shape[2]
    for strip in q.split(STRIP, dim=2):
        end += strip.shape[2]
        yield strip, end


def _seen(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _priority(q: Tensor) -> AbstractContextManager:
    return sdpa_kernel(PRIORITY, set_priority=True) if q.device.type == "cuda" and not traced() else nullcontext()


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    from flash_attn.cute.interface import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # it has B L H D


def which_flash(q: Tensor, keys: int, backend: str, *, backward: bool) -> Flash:
    """Whether FlashAttention 4 is to be asked under a backend ("auto", "triton", "flash")."""
    if backend != "auto":
        return "must" if backend == "flash" else "no"
    return "if right" if keys >= SHORTEST_FLASH and not backward and _may_serve(q) else "no"


def _may_serve(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and not traced()


def _takes_flash(q: Tensor, v: Tensor, flash: Flash, *, packed: bool = False) -> bool:
    if flash == "no":
        return False
    right = _flash_is_right(q, v, packed=packed)
    if flash == "must" and not right:
        raise RuntimeError(
            "backend must be 'auto' or 'triton' for a dense call here, got 'flash': FlashAttention 4's dense kernel "
            "failed its check on a small problem"
        )
    return right


def dense_packed(
    qkv: tuple[Float[Tensor, "1 Hq queries D"], Float[Tensor, "1 Hkv keys D"], Float[Tensor, "1 Hkv keys Dv"]],
    lengths: Sequence[tuple[int, int]],
    *,
    causal: bool,
    scale: float | None,
    flash: Flash,
) -> Float[Tensor, "1 Hq queries Dv"]:
    """`dense_attention` of sequences that are packed end to end, each of (queries, keys): at once where FlashAttention
    4 may be taken and is right, else one after the other."""
    q, k, v = qkv
    if _takes_flash(q, v, flash, packed=True):
        return _flash_packed(q, k, v, lengths, causal, scale)
    queries, keys = zip(*lengths, strict=True)
    sequences = zip(q.split(queries, 2), k.split(keys, 2), v.split(keys, 2), strict=True)
    return torch.cat([dense_attention(*sequence, causal=causal, scale=scale) for sequence in sequences], 2)


def _flash_packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[tuple[int, int]], causal: bool, scale) -> Tensor:
    from flash_attn.cute.interface import flash_attn_varlen_func

    queries, keys = zip(*lengths, strict=True)
    ends = torch.tensor([[0, *accumulate(own)] for own in (queries, keys)], dtype=torch.int32)
    ends = ends.to(q.device, non_blocking=True)  # or the host would wait for all that runs
    sizes = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "max_seqlen_q": max(queries), "max_seqlen_k": max(keys)}
    tensors = (x[0].transpose(0, 1) for x in (q, k, v))  # it takes tokens H D
    out = flash_attn_varlen_func(*tensors, **sizes, causal=causal, softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)[None]


_right: dict[tuple, bool] = {}


def _flash_is_right(q: Tensor, v: Tensor, *, packed: bool = False) -> bool:
    """Whether FlashAttention 4 agrees with float32 for q's and v's head dims and dtype: run once, remembered."""
    key = (q.device, q.shape[-1], v.shape[-1], q.dtype, packed)
    if key not in _right:
        generator = torch.Generator().manual_seed(0)
        sizes = ((4, q.shape[-1]), (2, q.shape[-1]), (2, v.shape[-1]))
        small = [
            torch.randn(1, heads, CHECK_LENGTH, D, generator=generator).to(q.device, q.dtype) for heads, D in sizes
        ]
        exact = F.scaled_dot_product_attention(*(x.float() for x in small), is_causal=True, enable_gqa=True)
        last = CHECK_LENGTH // 2  # a chunk's queries
        chunk = (small[0][:, :, -last:], *small[1:])
        exact = torch.cat([exact, exact[:, :, -last:]], 2)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # its own deprecations are no reason against it
                if packed:
                    both = (torch.cat(pair, 2) for pair in zip(small, chunk, strict=True))
                    out = _flash_packed(*both, [(CHECK_LENGTH, CHECK_LENGTH), (last, CHECK_LENGTH)], True, None)
                else:
                    out = torch.cat([_flash_attention(*tensors, True, None) for tensors in (small, chunk)], 2)
            _right[key] = ((out - exact).norm() / exact.norm()).item() < CHECK_ERROR
        except torch.OutOfMemoryError:
            return False  # that says nothing about the kernel: asked again
        except Exception:  # a beta's compilation may fail in any way; torch's kernel is as right
            _right[key] = False
    return _right[key]
