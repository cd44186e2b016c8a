"""Arguments of the public calls, checked before any compute. Nothing here reads a tensor's values."""

import math

import torch
from torch import Tensor

from rr_flex.config import RRConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_queries_and_keys(q: Tensor, k: Tensor) -> None:
    """q [B,Hq,Lq,D] and k [B,Hkv,Lk,D]: ranks, dtypes, devices, head counts, no empty axis. ValueError or TypeError."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 axes [B, heads, tokens, D], got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
        for axis, size in zip(("batch", "heads", "tokens", "D"), x.shape, strict=True):
            if size == 0:
                raise ValueError(f"{name} must have at least 1 of {axis}, got shape {tuple(x.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"k must have q's dtype {q.dtype}, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"k must be on q's device {q.device}, got {k.device}")
    B, Hq, _, D = q.shape
    if k.shape[0] != B:
        raise ValueError(f"k must have q's batch size {B}, got {k.shape[0]}")
    if k.shape[3] != D:
        raise ValueError(f"k must have q's head dim {D}, got {k.shape[3]}")
    if Hq % k.shape[1]:
        raise ValueError(f"q must have a multiple of k's {k.shape[1]} heads, got {Hq}")


def check_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    """v [B,Hkv,Lk,Dv] beside q and k that passed `check_queries_and_keys`."""
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a tensor, got {type(v).__name__}")
    if v.ndim != 4:
        raise ValueError(f"v must have 4 axes [B, heads, tokens, D], got shape {tuple(v.shape)}")
    if v.dtype != q.dtype:
        raise TypeError(f"v must have q's dtype {q.dtype}, got {v.dtype}")
    if v.device != q.device:
        raise ValueError(f"v must be on q's device {q.device}, got {v.device}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's batch, heads and tokens {tuple(k.shape[:3])}, got {tuple(v.shape[:3])}")
    for name, x in (("q", q), ("v", v)):
        if not 16 <= x.shape[3] <= 256:
            raise ValueError(f"{name} must have a head dim of 16 to 256, got {x.shape[3]}")


def check_call(q: Tensor, k: Tensor, *, config, mask_mod, scale, softcap, q_offset, head_offset) -> None:
    """The options of one call. ValueError or TypeError naming the argument."""
    Lq, Lk = q.shape[2], k.shape[2]
    if config is not None and not isinstance(config, RRConfig):
        raise TypeError(f"config must be an RRConfig, got {type(config).__name__}")
    if mask_mod is not None and not callable(mask_mod):
        raise TypeError(f"mask_mod must be a function of (b, h, q_idx, kv_idx), got {mask_mod!r}")
    for name, factor in (("scale", scale), ("softcap", softcap)):
        if factor is None:
            continue
        if isinstance(factor, bool) or not isinstance(factor, float | int):
            raise TypeError(f"{name} must be a number, got {factor!r}")
        if not 0 < factor < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {factor}")
    _check_offset("q_offset", q_offset, min(0, Lk - Lq), Lk)
    _check_offset("head_offset", head_offset, 0, 2**31 - 1)


def check_sinks(q: Tensor, sinks: object) -> None:
    """A floating-point tensor [Hq] on q's device, or None. TypeError or ValueError."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        raise TypeError(
            f"sinks must be a floating-point tensor [Hq], got {getattr(sinks, 'dtype', type(sinks).__name__)}"
        )
    if tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks must hold one logit a query head ({q.shape[1]}), got shape {tuple(sinks.shape)}")
    if sinks.device != q.device:
        raise ValueError(f"sinks must be on q's device {q.device}, got {sinks.device}")


def check_differentiable(*tensors: Tensor) -> None:
    """NotImplementedError where a gradient is asked for and FlexAttention has none (the CPU)."""
    if torch.is_grad_enabled() and any(x.requires_grad and x.device.type == "cpu" for x in tensors):
        raise NotImplementedError(
            "q, k, v and sinks must not require grad on the CPU, where flex_attention has no backward, got"
            " requires_grad=True; call under torch.no_grad() or pass x.detach()"
        )


def _check_offset(name: str, value: object, lowest: int, highest: int) -> None:
    """An int in range, or a 0-dim integer tensor, whose value is not read."""
    if value is None:
        return
    if isinstance(value, Tensor):
        if value.ndim or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be an int or a 0-dim integer tensor, got {value.dtype} {tuple(value.shape)}")
        return
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int or a 0-dim integer tensor, got {value!r}")
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must be an int from {lowest} to {highest}, got {value}")
