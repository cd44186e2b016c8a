"""The budget's number, one a query head, on the device: kept between calls, since an upload stalls."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from rr_flex.config import RRConfig
from rr_flex.runtime.tracing import traced


def level_per_head(config: RRConfig, Hq: int, device: torch.device) -> Float[Tensor, " Hq"]:
    """The number of the field that the budget goes by, as float32 on `device`; reads no tensor on an accelerator.

    Nothing is uploaded while a CUDA graph is captured, where that is an error. An entry out of range keeps every
    visible block. ValueError for another count of numbers than Hq.
    """
    name, level = config.level_field, config.level
    if isinstance(level, Tensor) or traced():
        return _level_tensor(level, Hq, device, name)
    try:
        return _kept_level(level, Hq, device, name)
    except _Capturing:
        return _filled(level, Hq, device, name)


class _Capturing(Exception):
    """A level that no call has had before is asked for while a CUDA graph is captured."""


@lru_cache(maxsize=4096)
def _kept_level(level: float | tuple[float, ...], Hq: int, device: torch.device, name: str) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise _Capturing  # what is made now has its values at each replay, and those of this graph alone
    with torch.inference_mode(False):  # an inference tensor could not enter a call that is differentiated
        kept = _level_tensor(level, Hq, device, name)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other threads read it from streams of their own
    return kept


def _filled(level: float | tuple[float, ...], Hq: int, device: torch.device, name: str) -> Tensor:
    """By the device alone."""
    if isinstance(level, float | int):
        return _level_tensor(level, Hq, device, name)
    return _level_tensor(torch.stack([torch.full((), share, device=device) for share in level]), Hq, device, name)


def _level_tensor(level: object, Hq: int, device: torch.device, name: str) -> Tensor:
    if isinstance(level, float | int):
        return torch.full((Hq,), level, dtype=torch.float32, device=device)
    level = torch.as_tensor(level, dtype=torch.float32, device=device)
    if level.shape != (Hq,):
        raise ValueError(f"{name} must be one number or one a query head ({Hq}), got shape {tuple(level.shape)}")
    if name == "threshold":
        return torch.where((level >= 0) & (level < 1), level, -1.0)
    return torch.where((level > 0) & (level <= 1), level, 1.0)
