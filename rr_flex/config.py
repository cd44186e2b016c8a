"""The settings of one selection, frozen and checked at construction."""

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
    # Keys under which nothing is dropped or estimated. None: in rr_attention the card's measured break-even with dense
    # attention, elsewhere 0.
    min_length: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tau, Tensor):
            _check_tau_tensor(self.tau)
            # Nor in a graph, where reading a tensor is not possible.
            if self.tau.device.type == "cpu" and not torch.compiler.is_compiling():
                object.__setattr__(self, "tau", self.tau.tolist())
        if isinstance(self.tau, Sequence):
            object.__setattr__(self, "tau", tuple(self.tau))
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
        if not isinstance(sizes, tuple) or any(type(size) is not int for size in sizes):
            raise TypeError(f"block_size must be an int or a pair (query, key) of ints, got {self.block_size!r}")
        if len(sizes) != 2 or not set(sizes) <= {64, 128}:
            raise ValueError(f"block_size must be 64, 128 or a pair (query, key) of them, got {self.block_size}")
        for name in ("stride", "query_stride", "key_stride"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        for name, stride, size in zip(("query_stride", "key_stride"), self.strides, sizes, strict=True):
            if size % stride:
                named = name if getattr(self, name) is not None else "stride"
                raise ValueError(f"{named} must divide block_size {self.block_size}, got {stride}")

    def _check_rules(self) -> None:
        _check_int("order", self.order, 1)
        if self.order > 2:
            raise ValueError(f"order must be 1 or 2, got {self.order}")
        for name, choices in (("budget", get_args(Budget)), ("mandatory", get_args(Mandatory))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("sink_blocks", "local_blocks", "dense_last_rows"):
            _check_int(name, getattr(self, name), 0)
        if self.min_length is not None:
            _check_int("min_length", self.min_length, 0)
        _check_number("threshold", self.threshold)
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {self.threshold}")
        if isinstance(self.tau, Tensor):
            return
        for share in self.tau if isinstance(self.tau, tuple) else (self.tau,):
            _check_number("tau", share)
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


def _check_int(name: str, value: object, minimum: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _check_tau_tensor(tau: Tensor) -> None:
    if tau.ndim != 1 or not tau.is_floating_point():
        raise ValueError(f"tau must be a floating-point tensor [Hq], got {tau.dtype} of shape {tuple(tau.shape)}")
