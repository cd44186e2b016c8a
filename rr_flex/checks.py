"""Arguments of the public calls, checked before any compute. On an accelerator nothing here reads a tensor's values."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rr_flex.runtime.private import dispatch_mode, is_inside_functorch
from rr_flex.runtime.tracing import traced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AXES = ("batch", "heads", "tokens", "D")
FARTHEST = 2**31 - 1  # position, or number of a head: kernels count in int32
SINGLE = torch.finfo(torch.float32)


def as_autocast_says(function: Callable) -> Callable:
    """Under torch.autocast: tensors in its dtype, as scaled_dot_product_attention takes them, the rest without it."""

    @wraps(function)
    def call(*tensors: Any, **options: Any) -> Any:
        given = [*tensors, *(options.get(name) for name in ("q", "k", "v"))]
        kind = next((x.device.type for x in given if isinstance(x, Tensor)), "")
        if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
            return function(*tensors, **options)
        dtype = torch.get_autocast_dtype(kind)
        tensors = [x.to(dtype) if isinstance(x, Tensor) and x.dtype in DTYPES else x for x in tensors]
        for name in {"q", "k", "v"}.intersection(options):
            options[name] = options[name].to(dtype) if isinstance(options[name], Tensor) else options[name]
        with torch.autocast(kind, enabled=False):
            return function(*tensors, **options)

    return call


def check_context() -> None:
    """NotImplementedError under a mode that sees every operation: FlexAttention fails there, and keeps on failing."""
    if not traced() and (mode := dispatch_mode()) is not None:
        raise NotImplementedError(
            f"rr_flex must be called outside of modes that see every operation, whose kernels are one operation to "
            f"them, got {type(mode).__name__}"
        )


def check_queries_and_keys(q: Tensor, k: Tensor) -> None:
    """q [B,Hq,Lq,D] and k [B,Hkv,Lk,D]: ranks, dtypes, devices, head counts, no empty axis. ValueError or TypeError."""
    check_context()
    for name, x in (("q", q), ("k", k)):
        check_plain(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 axes [B, heads, tokens, D], got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
        for axis, size in zip(AXES, x.shape, strict=True):
            if size == 0:
                raise ValueError(f"{name} must have at least 1 of {axis}, got shape {tuple(x.shape)}")
    if q.device.type == "meta" and not traced():
        raise TypeError("q must have values, got a tensor on the meta device")
    _check_beside("k", k, q)
    B, Hq, _, D = q.shape
    if k.shape[0] != B:
        raise ValueError(f"k must have q's batch size {B}, got {k.shape[0]}")
    if k.shape[3] != D:
        raise ValueError(f"k must have q's head dim {D}, got {k.shape[3]}")
    if Hq >= 256 and Hq > 4 * q.shape[2] and not traced():
        warnings.warn(
            f"q must be [B, heads, tokens, D], got {Hq} heads of {q.shape[2]} tokens: are heads and tokens exchanged?",
            stacklevel=4,
        )
    if Hq % k.shape[1]:
        raise ValueError(f"q must have a multiple of k's {k.shape[1]} heads, got {Hq}")


def check_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    """v [B,Hkv,Lk,Dv] beside q and k that passed `check_queries_and_keys`."""
    check_plain("v", v)
    if v.ndim != 4:
        raise ValueError(f"v must have 4 axes [B, heads, tokens, D], got shape {tuple(v.shape)}")
    _check_beside("v", v, q)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's batch, heads and tokens {tuple(k.shape[:3])}, got {tuple(v.shape[:3])}")
    for name, x in (("q", q), ("v", v)):
        if not 16 <= x.shape[3] <= 256:
            raise ValueError(f"{name} must have a head dim of 16 to 256, got {x.shape[3]}")


def check_sinks(q: Tensor, sinks: object) -> None:
    """A floating-point tensor [Hq] on q's device without NaN, or None. TypeError or ValueError."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        raise TypeError(f"sinks must be a floating-point tensor [Hq], got {shown(sinks)}")
    check_plain("sinks", sinks)
    if tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks must hold one logit a query head ({q.shape[1]}), got shape {tuple(sinks.shape)}")
    if sinks.device != q.device:
        raise ValueError(f"sinks must be on q's device {q.device}, got {sinks.device}")
    if readable(sinks) and not bool((sinks < torch.inf).all()):
        raise ValueError(f"sinks must be numbers below infinity, got {sinks[~(sinks < torch.inf)][0].item()}")


def check_numbers(scale: object, softcap: object) -> None:
    """Positive and finite in float32, or None."""
    for name, factor in (("scale", scale), ("softcap", softcap)):
        if factor is None:
            continue
        if isinstance(factor, bool) or not isinstance(factor, float | int):
            raise TypeError(f"{name} must be a number, got {shown(factor)}")
        if not SINGLE.tiny <= factor <= SINGLE.max:
            raise ValueError(f"{name} must be positive and finite in float32, got {factor}")


def check_flag(name: str, value: object) -> None:
    if type(value) is not bool:
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_offset(name: str, value: object, lowest: int, highest: int) -> None:
    """An int in range, or a 0-dim integer tensor; one on an accelerator is not read."""
    if isinstance(value, Tensor):
        check_plain(name, value)
        if value.ndim or value.dtype not in (torch.int32, torch.int64):
            got = f"{value.dtype} {tuple(value.shape)}"
            raise TypeError(f"{name} must be an int or a 0-dim integer tensor (int32, int64), got {got}")
        if value.device.type == "meta" and not traced():
            raise TypeError(f"{name} must have values, got a tensor on the meta device")
        if not readable(value):
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int or a 0-dim integer tensor, got {shown(value)}")
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must be an int from {lowest} to {highest}, got {value}")


def gradient_wanted(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_differentiable(*tensors: Tensor | None) -> None:
    """NotImplementedError where a gradient is asked for and FlexAttention has none (the CPU)."""
    if gradient_wanted(*(x for x in tensors if x is not None and x.device.type == "cpu")):
        raise NotImplementedError(
            "q, k, v and sinks must not require grad on the CPU, where flex_attention has no backward, got"
            " requires_grad=True; call under torch.no_grad() or pass x.detach()"
        )


def check_plain(name: str, x: Any) -> None:
    """A dense tensor with values of its own: TypeError for others, which FlexAttention takes for something else."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(x)}")
    if traced():
        return
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}{', nested' if x.is_nested else ''}")
    if type(x) not in (Tensor, torch.nn.Parameter):
        local = "; pass its .to_local()" if hasattr(x, "to_local") else ""
        raise TypeError(f"{name} must be a plain tensor, got {type(x).__name__}{local}")
    if x.is_neg():  # of a complex tensor's conjugate: kernels would read the values without the sign
        raise TypeError(f"{name} must be a plain tensor, got a view that negates another; pass its .resolve_neg()")
    if is_inside_functorch(x):
        raise TypeError(f"{name} must be a plain tensor, got one inside torch.func or vmap; batch axes go into B")
    if forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(f"{name} must be a plain tensor, got a dual one: there is no forward-mode derivative here")


def readable(x: Tensor) -> bool:
    """Whether x's values can be looked at without waiting for a device and outside a graph."""
    return x.device.type == "cpu" and not traced()


def _check_beside(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def shown(value: object) -> str:
    """A short word for what was given: no tensor is dumped whole."""
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} {tuple(value.shape)}"
    return repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
