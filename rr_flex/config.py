"""The settings of one selection, frozen and checked at construction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Budget = Literal["top_tau", "threshold"]
Mandatory = Literal["count", "add"]


@dataclass(frozen=True, kw_only=True)
class RRConfig:
    """Settings of RRAttention (arXiv 2602.05853). The defaults are the paper's.

    `tau` may be one share or one a query head: a sequence, or a tensor [Hq]. A tensor on an accelerator is not read
    here, since that would stall the device: an entry outside (0, 1] or NaN then means 1, every visible block.
    Raises ValueError or TypeError naming the argument.
    """

    stride: int = 8  # tokens per sampled query and per pooled key, unless one of the next two is given
    query_stride: int | None = None  # tokens per sampled query; None: stride
    key_stride: int | None = None  # tokens per pooled key; None: stride
    block_size: int | tuple[int, int] = 128  # tokens per side of a block, or (query tokens, key tokens): 64 or 128
    order: int = 1  # 1: mean of a stride's logits; 2: plus half their variance
    budget: Budget = "top_tau"  # rule that turns mass into kept blocks
    tau: float | Sequence[float] | Tensor = 0.95  # top_tau: share of a row's estimated mass to keep, in (0, 1]
    threshold: float = 0.01  # threshold: a block is kept when its share of its row's mass exceeds this, in [0, 1)
    mandatory: Mandatory = "count"  # "count": mandatory mass counts towards tau; "add": joined after plain top-p
    sink_blocks: int = 1  # key blocks kept at the start of the keys
    local_blocks: int = 1  # key blocks kept up to the diagonal, those it crosses counting as one; 0 keeps none
    dense_last_rows: int = 1  # block rows at the end of the queries that keep every visible block

    def __post_init__(self) -> None:
        if isinstance(self.tau, Tensor):
            _check_tau_tensor(self.tau)
            if self.tau.device.type == "cpu":
                object.__setattr__(self, "tau", self.tau.tolist())
        if isinstance(self.tau, Sequence):
            object.__setattr__(self, "tau", tuple(float(share) for share in self.tau))
        if isinstance(self.block_size, Sequence):
            object.__setattr__(self, "block_size", tuple(self.block_size))
        self._check_blocks()
        self._check_rules()

    @property
    def block_sizes(self) -> tuple[int, int]:
        """Tokens per block: (queries, keys)."""
        return (self.block_size, self.block_size) if isinstance(self.block_size, int) else self.block_size

    @property
    def strides(self) -> tuple[int, int]:
        """Tokens per stride: (queries, keys)."""
        return (
            self.stride if self.query_stride is None else self.query_stride,
            self.stride if self.key_stride is None else self.key_stride,
        )

    def _check_blocks(self) -> None:
        sizes = self.block_sizes
        if len(sizes) != 2 or any(type(size) is not int or size not in (64, 128) for size in sizes):
            raise ValueError(f"block_size must be 64, 128 or a pair (query, key) of them, got {self.block_size}")
        for name in ("stride", "query_stride", "key_stride"):
            stride = getattr(self, name)
            if stride is not None and (type(stride) is not int or stride < 1):
                raise ValueError(f"{name} must be a positive int, got {stride!r}")
        for name, stride, size in zip(("query_stride", "key_stride"), self.strides, sizes, strict=True):
            if size % stride:
                named = name if getattr(self, name) is not None else "stride"
                raise ValueError(f"{named} must divide block_size {self.block_size}, got {stride}")

    def _check_rules(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order!r}")
        for name, choices in (("budget", get_args(Budget)), ("mandatory", get_args(Mandatory))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("sink_blocks", "local_blocks", "dense_last_rows"):
            count = getattr(self, name)
            if type(count) is not int or count < 0:
                raise ValueError(f"{name} must be an int of at least 0, got {count!r}")
        if not 0 <= _number("threshold", self.threshold) < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {self.threshold}")
        if isinstance(self.tau, Tensor):
            return
        shares = self.tau if isinstance(self.tau, tuple) else (_number("tau", self.tau),)
        for share in shares:
            if not 0 < share <= 1:
                raise ValueError(f"tau must lie in (0, 1], got {share}")

    def with_settings(self, settings: dict[str, Any]) -> "RRConfig":
        """This configuration with some settings replaced; an unknown name raises TypeError."""
        if not settings:
            return self
        known = [field.name for field in fields(self)]
        for name in settings:
            if name not in known:
                raise TypeError(f"settings must be fields of RRConfig ({', '.join(known)}), got {name!r}")
        return replace(self, **settings)

    def level_per_head(self, Hq: int, device: torch.device) -> Tensor:
        """The budget's number, `tau` or `threshold`, as a float32 tensor [Hq] on `device`; reads no tensor back."""
        if self.budget == "threshold":
            return torch.full((Hq,), self.threshold, dtype=torch.float32, device=device)
        if isinstance(self.tau, float | int):
            return torch.full((Hq,), self.tau, dtype=torch.float32, device=device)
        tau = torch.as_tensor(self.tau, dtype=torch.float32, device=device)
        if tau.shape != (Hq,):
            raise ValueError(f"tau must be one number or one a query head ({Hq}), got shape {tuple(tau.shape)}")
        return torch.where((tau > 0) & (tau <= 1), tau, 1.0)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return math.nan if math.isnan(value) else float(value)


def _check_tau_tensor(tau: Tensor) -> None:
    if tau.ndim != 1 or not tau.is_floating_point():
        raise ValueError(f"tau must be a floating-point tensor [Hq], got {tau.dtype} of shape {tuple(tau.shape)}")
