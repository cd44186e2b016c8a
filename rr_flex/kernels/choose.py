"""Which kernel attends on CUDA: the compiler's Triton template, or FlashAttention 4 where it is known to be right."""

import importlib.util
import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from mask_mods import causal
from rr_flex.block_mask import build_block_mask
from rr_flex.kernels.options import attention_options

Backend = Literal["auto", "triton", "flash"]
Kernel = Literal["cpu", "triton", "flash"]

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


def check_backend(backend: Backend, q: Tensor) -> None:
    """ValueError for a backend that is unknown, or named where q's device has no choice."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend != "auto" and q.device.type != "cuda":
        raise ValueError(f"backend must be 'auto' where q is not on a CUDA device, got {backend!r}")


def choose_kernel(
    backend: Backend,
    q: Tensor,
    v: Tensor,
    block_size: tuple[int, int],
    *,
    plain_mask: bool,
    for_backward: bool,
    softcap: bool = False,
) -> Kernel:
    """The kernel for q and v: "auto" takes FLASH where nothing speaks against it, an explicit choice runs or raises.

    `plain_mask`: only causal or no mask. A mask of the caller's own is FLASH's if it is asked for by name.
    RuntimeError where FLASH is asked for and cannot run.
    """
    if q.device.type != "cuda":
        return "cpu"
    if backend == "triton" or (backend == "auto" and not plain_mask):
        return "triton"
    refused = why_not_flash(q, v, block_size, for_backward=for_backward, softcap=softcap)
    if refused is None:
        return "flash"
    if backend == "flash":
        raise RuntimeError(f"backend must be 'auto' or 'triton' here, got 'flash': {refused}")
    return "triton"


def why_not_flash(
    q: Tensor, v: Tensor, block_size: tuple[int, int], *, for_backward: bool, softcap: bool = False
) -> str | None:
    """What speaks against FLASH, or None."""
    if torch.compiler.is_compiling():
        return "inside a caller's torch.compile its mask can't capture what the graph computes"
    if not flash_is_installed():
        return "flash-attn-4 is not installed"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if block_size != (128, 128):
        return f"it takes blocks of 128 × 128 tokens, not {block_size[0]} × {block_size[1]}"
    if for_backward:
        return "gradients are taken with Triton's kernel"
    if softcap:
        return "a soft cap is Triton's, as a score_mod"
    return check_flash(q.device, q.shape[-1], v.shape[-1], q.dtype).refused


@cache  # a search for what is absent takes tens of microseconds
def flash_is_installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def check_flash(device: torch.device, head_dim: int, value_dim: int, dtype: torch.dtype) -> FlashCheck:
    """The self-check for these head dims and dtype: run at first use, remembered afterwards."""
    key = (device.index, head_dim, value_dim, dtype)
    if key not in _checks:
        _checks[key] = _run_check(device, head_dim, value_dim, dtype)
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
    whole = (~diagonal).to(device).expand(1, 1, nQ, nQ)
    mask = build_block_mask(
        kept.to(device), whole, causal(offset), block_size=(128, 128), seq_lengths=(L, L), look_up=False
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own deprecations are no reason against it
            out, aux = torch.compile(flex_attention, fullgraph=True, dynamic=False)(
                q,
                k,
                v,
                block_mask=mask,
                enable_gqa=True,
                return_aux=AuxRequest(lse=True),
                kernel_options=attention_options(q, (128, 128), "flash"),
            )
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


def offset_per_batch(offset: Tensor, B: int) -> Tensor:
    """A 0-dim offset as [B], or [2] for a single batch: FLASH's mask can't load an element that needs no index."""
    return offset.expand(max(B, 2)).contiguous()
