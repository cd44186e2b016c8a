"""What the fields of RRConfig may hold: defaults, ranges, presets, as plain data, and the checks of single values."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rr_flex.checks import shown
from rr_flex.registry import BUDGETS, ESTIMATORS
from rr_flex.runtime.tracing import traced

Mandatory = Literal["count", "add"]
Preset = Literal["rr", "best", "fast"]
Level = float | Sequence[float] | Tensor
# What a field that some rule reads is worth where it is read and not given.
DEFAULTS: dict[str, Any] = {
    "variance_weight": 0.5,
    "tau": 0.95,
    "threshold": 0.01,
    "target_density": 0.4,
    "mandatory": "count",
}
# Visible blocks of a row past which budget="scaled_threshold" scales: those of 8,192 tokens, on which the study found
# the presets' thresholds.
LONG_ROW = 64
FIELDS_OF_RULES = (*DEFAULTS, "query_pool", "query_stride", "key_stride")

PER_HEAD = ("tau", "threshold")
RANGES = {  # of numbers: the rule in words, and itself
    "tau": ("(0, 1]", lambda share: 0 < share <= 1),
    "threshold": ("[0, 1)", lambda share: 0 <= share < 1),
    "target_density": ("(0, 1]", lambda share: 0 < share <= 1),
    "variance_weight": ("(0, 1]", lambda share: 0 < share <= 1),
}

# What the study (notebooks/README.md) found on two models and ten held-out texts of 8,192 tokens: `best` diverges least
# from the dense model's predictions in a given time, `fast` takes least time to diverge as the paper's rule does, with
# the blocks of 128 that FLASH takes. Other fields keep defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "rr": {},
    "best": {
        "pool": "both",
        "key_stride": 32,
        "order": 2,
        "variance_weight": 0.125,
        "budget": "scaled_threshold",
        "threshold": 0.01,
    },
    "fast": {
        "key_stride": 16,
        "order": 2,
        "variance_weight": 0.125,
        "budget": "scaled_threshold",
        "threshold": 0.01,
    },
}


def fields_read(pool: str, budget: str, order: int) -> set[str]:
    """The fields that these rules go by, as far as not all rules do."""
    rule = BUDGETS[budget]
    read = {rule.level, *rule.reads, *ESTIMATORS[pool].reads}
    return read if order == 2 else read - {"variance_weight"}


def plain_level(name: str, level: Level) -> Level:
    """One number, a tuple, or a tensor on an accelerator."""
    if isinstance(level, Tensor):
        if level.ndim != 1 or not level.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor [Hq], got {level.dtype} of {tuple(level.shape)}")
        if level.layout != torch.strided or level.device.type == "meta":
            raise TypeError(f"{name} must be a dense tensor with values, got {level.layout} on {level.device}")
        # Nor in a graph, where reading a tensor is not possible.
        if level.device.type != "cpu" or traced():
            return level
        level = level.tolist()
    return tuple(level) if isinstance(level, Sequence) and not isinstance(level, str) else level


def check_int(name: str, value: object, minimum: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if not minimum <= value < 2**31:
        raise ValueError(f"{name} must be at least {minimum} and below 2^31, got {value}")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if value != value:  # NaN, also where a caller's compiler makes a symbol of the number
        raise ValueError(f"{name} must be a number, got nan")
