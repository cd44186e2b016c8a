"""Dense attention for lengths at which sparse attention does not pay, through the fastest kernel that is installed."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mask_mods.spans import Index, MaskMod

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
    flash: bool = False,
) -> Float[Tensor, "B Hq L Dv"]:
    """torch's scaled_dot_product_attention, or with `flash` FlashAttention 4; causal or over all pairs."""
    if flash:
        from flash_attn.cute.interface import flash_attn_func

        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, softmax_scale=scale)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # it has B L H D
    settings = {"is_causal": causal, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, **settings)
    with sdpa_kernel(PRIORITY, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **settings)
