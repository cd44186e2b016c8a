"""What a mask's arguments must be, and whether a mask fits the call that it is given to.

Shapes, dtypes and devices are always looked at. Values of tensors are read on a CPU only and never inside a graph: an
accelerator would have to wait for them.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LARGEST = 2**30  # of offsets and counts, in tokens: sums of two stay below 2³¹, in which kernels count
READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}


def check_mask_mod(mask_mod: Callable, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
    """Raise unless `mask_mod` can serve a call of B sequences, Hq query heads, Lq queries and Lk keys on `device`.

    A mask with a `check` of its own, as all of mask_mods have, is asked. Any other function is called once with the
    first index of each axis, and on a CPU with the last ones, and with both of all axes, too. TypeError or ValueError
    name the argument; what the function itself raises comes out as it is. Inside a graph functions are not called.
    """
    rule = "mask_mod must be a function of (b, h, q_idx, kv_idx)"
    if isinstance(mask_mod, Tensor):
        raise TypeError(f"{rule}, got a tensor: {show(mask_mod)}")
    if not callable(mask_mod):
        raise TypeError(f"{rule}, got {type(mask_mod).__name__}")
    if hasattr(mask_mod, "check"):
        mask_mod.check(B=B, Hq=Hq, Lq=Lq, Lk=Lk, device=device)
    elif not recorded():
        check_arity("mask_mod", mask_mod, ("b", "h", "q_idx", "kv_idx"))
        ask(mask_mod, (B, Hq, Lq, Lk), device, lambda shown: _check_answer(shown, device))
        check_elementwise("mask_mod", mask_mod, (B, Hq, Lq, Lk), device)


def check_arity(name: str, function: Callable, arguments: tuple[str, ...]) -> None:
    """TypeError unless `function` takes these arguments by position."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions of C have none: the call will tell
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        listed = ", ".join(arguments)
        raise TypeError(f"{name} must be a function of ({listed}), got one of {signature}") from None


def ask(function: Callable, sizes: tuple[int, ...], device: torch.device | str, check_answer: Callable) -> None:
    """Call `function` with the first index of axes of these sizes, on a CPU also with the last, and check each answer.

    An index past the end of what it looks up would stop an accelerator for good, so there only the first is tried.
    """
    with torch.no_grad():
        with _NothingRead():
            answer = function(*torch.zeros(len(sizes), dtype=torch.int64, device=device).unbind())
        check_answer(answer)
        if torch.device(device).type != "cpu":
            return
        last = [torch.full((), size - 1, dtype=torch.int64, device=device) for size in sizes]
        try:
            answer = function(*last)
        except IndexError as error:
            indices = ", ".join(str(size - 1) for size in sizes)
            raise ValueError(f"mask_mod must take every index up to ({indices}), got an IndexError: {error}") from error
        check_answer(answer)


class _NothingRead(TorchFunctionMode):
    """TypeError where a mask asks for a tensor's value: its kernel is compiled before there are any."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in READS:
            how = "if, and, or, not" if function is Tensor.__bool__ else function.__name__.strip("_")
            raise TypeError(f"mask_mod must not read a tensor's value (&, |, ~, torch.where do not), got {how}")
        return function(*args, **(kwargs or {}))


def _check_answer(shown: object, device: torch.device | str) -> None:
    rule = "mask_mod must return a bool tensor of its indices' shape"
    if not isinstance(shown, Tensor):
        remedy = "; combine comparisons of the indices with &, | and ~" if isinstance(shown, bool) else ""
        raise TypeError(f"{rule}, got {type(shown).__name__}{remedy}")
    if shown.dtype != torch.bool:
        raise TypeError(f"{rule}, got dtype {shown.dtype}")
    if shown.ndim:
        raise ValueError(f"{rule}, got shape {list(shown.shape)} for 0-dim indices")
    check_device("mask_mod's answer", shown, device)


def check_elementwise(name: str, mask_mod: Callable, sizes: tuple[int, ...], device: torch.device | str) -> None:
    """ValueError, on a CPU, for a mask that takes single indices alone: blocks are judged by broadcast ones."""
    if torch.device(device).type != "cpu":
        return
    rule = f"{name} must be elementwise in indices that broadcast, as t[b, q_idx] is and t[b][q_idx] is not"
    axes = len(sizes)
    ends = (torch.tensor([0, size - 1], device=device) for size in sizes)
    indices = [end.reshape([-1 if n == axis else 1 for n in range(axes)]) for axis, end in enumerate(ends)]
    try:
        with torch.no_grad():
            shown = mask_mod(*indices)
            last = mask_mod(*(index.flatten()[-1] for index in indices))
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"{rule}, got a {type(error).__name__}: {error}") from error
    if shown.ndim > axes or any(size not in (1, 2) for size in shown.shape):
        raise ValueError(f"{rule}, got shape {list(shown.shape)} for {axes} axes of 2 indices")
    if shown.expand([2] * axes)[(-1,) * axes] != last:
        raise ValueError(f"{rule}, got another answer for the last indices than by themselves")


def check_device(name: str, value: object, device: torch.device | str) -> None:
    """ValueError for a tensor on another device; "cuda" is any of its cards."""
    device = torch.device(device)
    if not isinstance(value, Tensor) or value.device == device:
        return
    if value.device.type != device.type or device.index is not None:
        raise ValueError(f"{name} must be on the call's device {device}, got {value.device}")


def check_per_call(name: str, value: object, B: int, device: torch.device | str) -> None:
    """ValueError for a tensor that is neither 0-dim nor [B], or is on another device."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] != B:
        raise ValueError(f"{name} must hold one value for each of the call's {B} sequences, got {value.shape[0]}")
    check_device(name, value, device)


def check_range(name: str, value: object, lowest: int, highest: int) -> None:
    """ValueError unless a value, or each of a tensor that can be read, lies in lowest … highest."""
    if isinstance(value, Tensor):
        if not can_be_read(value):
            return
        outside = value[(value < lowest) | (value > highest)]
        if not outside.numel():
            return
        value = outside.flatten()[0].item()
    elif value is None or lowest <= value <= highest:
        return
    raise ValueError(f"{name} must be from {lowest} to {highest}, got {value}")


def can_be_read(value: Tensor) -> bool:
    """Whether looking at the values waits for nothing: on a CPU, outside a graph, and real."""
    return not recorded() and value.device.type == "cpu" and type(value) is Tensor


def recorded() -> bool:
    """Whether this thread's code becomes part of a graph: under dynamo, or while it is exported.

    `is_exporting` is true in every thread while one exports; only in that one is a new tensor none with values.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_exporting() and type(torch.empty(0)) is not Tensor


def check_count(name: str, value: int, minimum: int) -> None:
    """Raise unless `value` is an int from `minimum` to LARGEST."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {show(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value > LARGEST:
        raise ValueError(f"{name} must be at most 2**30, got {value}")


def check_flag(name: str, value: bool) -> None:
    """TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {show(value)}")


def check_integers(name: str, value: Tensor, dims: tuple[int, ...], shape: str) -> None:
    """Raise unless `value` is an integer tensor of one of the given numbers of dims; its values are never read."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape {shape}, got {show(value)}")
    if value.dtype not in (torch.int32, torch.int64):  # in a narrower one sums of tokens would wrap
        raise TypeError(f"{name} must be an integer tensor (int32, int64) of shape {shape}, got dtype {value.dtype}")
    if value.ndim not in dims or value.numel() == 0:
        raise ValueError(f"{name} must be an integer tensor of shape {shape}, got shape {list(value.shape)}")
    if value.layout != torch.strided or value.device.type == "meta":
        raise ValueError(f"{name} must be a dense tensor with values, got {value.layout} on {value.device}")


def check_per_batch(name: str, value: object) -> None:
    """Raise unless `value` is an int within ± LARGEST, or an integer tensor of shape [] or [B]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Tensor)):
        raise TypeError(f"{name} must be an int or an integer tensor of shape [] or [B], got {show(value)}")
    if isinstance(value, Tensor):
        check_integers(name, value, (0, 1), "[] or [B]")
    elif not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} must be within ± 2**30, got {value}")


def show(value: object) -> str:
    """repr, but a tensor by dtype and shape: printing a mask must not wait for a GPU."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)
