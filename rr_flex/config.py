"""The settings of one selection, frozen and checked at construction."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rr_flex.profiles import Profile, load_profile

Budget = Literal["top_tau", "threshold", "density"]
LEVELS = {"top_tau": "tau", "threshold": "threshold", "density": "target_density"}  # field of a budget's number
Mandatory = Literal["count", "add"]
Pool = Literal["keys", "queries", "both"]
Phase = Literal["head", "skew", "first", "middle", "last"]
Preset = Literal["rr", "best", "fast"]


@dataclass(frozen=True, kw_only=True)
class RRConfig:
    """Settings of RRAttention (arXiv 2602.05853). The defaults are the paper's.

    `tau` and `threshold` may be one number or one a query head: a sequence, or a tensor [Hq]. A tensor on an
    accelerator is not read here, since that would stall the device: an entry out of range or NaN then keeps every
    visible block.
    Raises ValueError or TypeError naming the argument.
    """

    stride: int = 8  # tokens per sampled query and per pooled key, unless one of the next two is given
    query_stride: int | None = None  # tokens per sampled query; None: stride
    key_stride: int | None = None  # tokens per pooled key; None: stride
    phase: Phase = "head"  # token sampled in stride i by head h: h, h + 5i (mod stride), the first, middle or last
    pool: Pool = "keys"  # "queries": a stride's queries pooled, every key scored; "both": the two estimates' mean
    query_pool: int | None = None  # tokens per pooled query with pool="queries" or "both"; None: the query block
    block_size: int | tuple[int, int] = 128  # tokens per side of a block, or (query tokens, key tokens): 64 or 128
    order: int = 1  # 1: mean of the pooled logits; 2: plus their variance, by variance_weight
    variance_weight: float = 0.5  # order 2 only: ½ is right for Gaussian logits, too much where few of a stride's count
    budget: Budget = "top_tau"  # rule that turns mass into kept blocks
    tau: float | Sequence[float] | Tensor = 0.95  # top_tau: share of a row's estimated mass to keep, in (0, 1]
    # threshold: a block is kept when its share of its row's mass exceeds this, in [0, 1)
    threshold: float | Sequence[float] | Tensor = 0.01
    # density: kept / visible blocks of a sequence, mean over heads, in (0, 1]. Where heads are taken in strips (long
    # contexts, see head_slices.py) each strip has it: heads of two strips do not trade blocks.
    target_density: float = 0.4
    mandatory: Mandatory = "count"  # "count": mandatory mass counts towards tau; "add": joined after plain top-p
    sink_blocks: int = 1  # key blocks kept at the start of the keys
    local_blocks: int = 1  # key blocks kept up to the diagonal, those it crosses counting as one; 0 keeps none
    dense_last_rows: int = 1  # block rows at the end of the queries that keep every visible block
    # Keys under which nothing is dropped or estimated. None: in rr_attention the card's measured break-even with dense
    # attention, elsewhere 0.
    min_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("tau", "threshold"):
            level = getattr(self, name)
            if isinstance(level, Tensor):
                _check_level_tensor(name, level)
                # Nor in a graph, where reading a tensor is not possible.
                if level.device.type == "cpu" and not torch.compiler.is_compiling():
                    level = level.tolist()
            if isinstance(level, Sequence) and not isinstance(level, str):
                level = tuple(level)
            object.__setattr__(self, name, level)
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

    @property
    def tokens_per_pooled_query(self) -> int:
        """Queries that pool="queries" and "both" pool into one."""
        return self.block_sizes[0] if self.query_pool is None else self.query_pool

    def _check_blocks(self) -> None:
        sizes = self.block_sizes
        if not isinstance(sizes, tuple) or any(type(size) is not int for size in sizes):
            raise TypeError(f"block_size must be an int or a pair (query, key) of ints, got {self.block_size!r}")
        if len(sizes) != 2 or not set(sizes) <= {64, 128}:
            raise ValueError(f"block_size must be 64, 128 or a pair (query, key) of them, got {self.block_size}")
        for name in ("stride", "query_stride", "key_stride", "query_pool"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        for name, stride, size in zip(("query_stride", "key_stride"), self.strides, sizes, strict=True):
            if size % stride:
                named = name if getattr(self, name) is not None else "stride"
                raise ValueError(f"{named} must divide block_size {self.block_size}, got {stride}")
        if sizes[0] % self.tokens_per_pooled_query:
            raise ValueError(f"query_pool must divide block_size {self.block_size}, got {self.query_pool}")

    def _check_rules(self) -> None:
        _check_int("order", self.order, 1)
        if self.order > 2:
            raise ValueError(f"order must be 1 or 2, got {self.order}")
        _check_number("variance_weight", self.variance_weight)
        if not 0 < self.variance_weight <= 1:
            raise ValueError(f"variance_weight must lie in (0, 1], got {self.variance_weight}")
        for name, kind in (("budget", Budget), ("mandatory", Mandatory), ("pool", Pool), ("phase", Phase)):
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("sink_blocks", "local_blocks", "dense_last_rows"):
            _check_int(name, getattr(self, name), 0)
        if self.min_length is not None:
            _check_int("min_length", self.min_length, 0)
        _check_number("target_density", self.target_density)
        if not 0 < self.target_density <= 1:
            raise ValueError(f"target_density must lie in (0, 1], got {self.target_density}")
        for name, rule, allowed in (
            ("threshold", "[0, 1)", lambda share: 0 <= share < 1),
            ("tau", "(0, 1]", lambda share: 0 < share <= 1),
        ):
            level = getattr(self, name)
            if isinstance(level, Tensor):
                continue
            for share in level if isinstance(level, tuple) else (level,):
                _check_number(name, share)
                if not allowed(share):
                    raise ValueError(f"{name} must lie in {rule}, got {share}")

    @classmethod
    def from_preset(cls, preset: Preset, **settings: Any) -> "RRConfig":
        """ "rr": the paper's rule. "best": what the study recommends, more accurate for no more multiplications.
        "fast": three quarters of them, a little less accurate. `settings` replace single fields."""
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        return cls(**(PRESETS[preset] | settings))

    @classmethod
    def from_profile(cls, source: str | Path | Profile, model: Any = None) -> dict[int, "RRConfig"]:
        """Layer -> RRConfig of a calibrated profile: one in memory, a .json file, or a shipped one's name.

        With a transformers `model`, ValueError if the profile is another model's.
        """
        profile = source if isinstance(source, Profile) else load_profile(source)
        layers = profile.settings_by_layer(model)
        return {layer: cls(**settings) for layer, settings in layers.items()}

    def with_settings(self, settings: dict[str, Any]) -> "RRConfig":
        """This configuration with some settings replaced; an unknown name raises TypeError.

        `preset` among them starts from that preset instead.
        """
        if not settings:
            return self
        if "preset" in settings:
            rest = {name: value for name, value in settings.items() if name != "preset"}
            return RRConfig.from_preset(settings["preset"]).with_settings(rest)
        known = [field.name for field in fields(self)]
        for name in settings:
            if name not in known:
                raise TypeError(f"settings must be preset or fields of RRConfig ({', '.join(known)}), got {name!r}")
        return replace(self, **settings)

    def level_per_head(self, Hq: int, device: torch.device) -> Tensor:
        """The budget's number, of the field that it goes by, as a float32 tensor [Hq] on `device`; reads no tensor."""
        name = LEVELS[self.budget]
        level = getattr(self, name)
        if isinstance(level, float | int):
            return torch.full((Hq,), level, dtype=torch.float32, device=device)
        level = torch.as_tensor(level, dtype=torch.float32, device=device)
        if level.shape != (Hq,):
            raise ValueError(f"{name} must be one number or one a query head ({Hq}), got shape {tuple(level.shape)}")
        if name == "threshold":
            return torch.where((level >= 0) & (level < 1), level, -1.0)
        return torch.where((level > 0) & (level <= 1), level, 1.0)


# What the study (README, "Accuracy") found: on every held-out text of 8,192 tokens and at every density `best` has less
# output error than the paper's rule, and predictions that diverge less from the dense model's, as at 4,096 and 2,048;
# `fast` the former only. Other fields keep defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "rr": {},
    "best": {
        "pool": "both",
        "stride": 8,
        "key_stride": 32,
        "order": 2,
        "variance_weight": 0.125,
        "block_size": (128, 64),
        "budget": "threshold",
        "threshold": 0.005,
    },
    "fast": {
        "pool": "both",
        "stride": 8,
        "key_stride": 32,
        "order": 1,
        "block_size": (128, 64),
        "budget": "threshold",
        "threshold": 0.005,
    },
}


def _check_int(name: str, value: object, minimum: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _check_level_tensor(name: str, level: Tensor) -> None:
    if level.ndim != 1 or not level.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor [Hq], got {level.dtype} of {tuple(level.shape)}")
