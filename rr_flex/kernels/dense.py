"""Dense attention for lengths at which sparse attention does not pay, through the fastest kernel that is installed."""

import warnings
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mask_mods.spans import Index, MaskMod
from rr_flex.runtime.tracing import traced

CHECK_LENGTH = 300  # tokens of the check of FlashAttention 4: two blocks and a part of one
CHECK_ERROR = 1e-2  # relative, in half precision
# Tokens below which FlashAttention 4 takes longer to launch than torch's kernel to run: at 2,048 .14 ms against .09,
# at 4,096 .22 against .26 (H200, 32 heads of 128).
SHORTEST_FLASH = 4096
# In order of speed on the cards that were measured; torch takes the first that can run.
PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dense_kernel_serves(q: Tensor, k: Tensor, mask_mod: MaskMod | None, q_offset: Index | None, lse: bool) -> bool:
    """Whether `dense_attention` computes what was asked for: queries and keys of one length, no mask of the caller's.

    Everything else is dense through flex_attention over all visible blocks.
    """
    in_step = q_offset is None or (not isinstance(q_offset, Tensor) and q_offset == 0)
    return mask_mod is None and in_step and q.shape[2] == k.shape[2] and not lse


def dense_attention(
    q: Float[Tensor, "B Hq L D"],
    k: Float[Tensor, "B Hkv L D"],
    v: Float[Tensor, "B Hkv L Dv"],
    *,
    causal: bool,
    scale: float | None,
    flash: Literal["no", "if right", "must"] = "no",
) -> Float[Tensor, "B Hq L Dv"]:
    """torch's scaled_dot_product_attention, causal or over all pairs, or FlashAttention 4.

    The latter where its dense kernel, another than the block-sparse one, is right on a small problem too; RuntimeError
    where it must and is not.
    """
    if flash != "no":
        if _flash_is_right(q, v):
            return _flash_attention(q, k, v, causal, scale)
        if flash == "must":
            raise RuntimeError(
                "backend must be 'auto' or 'triton' for a short call here, got 'flash': FlashAttention 4's dense "
                "kernel failed its check on a small problem"
            )
    settings = {"is_causal": causal, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if q.device.type != "cuda" or traced():
        return F.scaled_dot_product_attention(q, k, v, **settings)
    with sdpa_kernel(PRIORITY, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **settings)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    from flash_attn.cute.interface import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # it has B L H D


_right: dict[tuple, bool] = {}


def _flash_is_right(q: Tensor, v: Tensor) -> bool:
    """Whether FlashAttention 4 agrees with float32 for q's and v's head dims and dtype: run once, remembered."""
    key = (q.device, q.shape[-1], v.shape[-1], q.dtype)
    if key not in _right:
        generator = torch.Generator().manual_seed(0)
        sizes = ((4, q.shape[-1]), (2, q.shape[-1]), (2, v.shape[-1]))
        small = [
            torch.randn(2, heads, CHECK_LENGTH, D, generator=generator).to(q.device, q.dtype) for heads, D in sizes
        ]
        exact = F.scaled_dot_product_attention(*(x.float() for x in small), is_causal=True, enable_gqa=True)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # its own deprecations are no reason against it
                error = (_flash_attention(*small, True, None) - exact).norm() / exact.norm()
            _right[key] = error.item() < CHECK_ERROR
        except torch.OutOfMemoryError:
            return False  # that says nothing about the kernel: asked again
        except Exception:  # a beta's compilation may fail in any way; torch's kernel is as right
            _right[key] = False
    return _right[key]
