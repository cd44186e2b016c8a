"""The settings of one selection, frozen and checked at construction."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from rr_flex import registry
from rr_flex.fields import (
    DEFAULTS,
    FIELDS_OF_RULES,
    PER_HEAD,
    PRESETS,
    RANGES,
    Level,
    Mandatory,
    Preset,
    check_int,
    check_number,
    fields_read,
    plain_level,
)
from rr_flex.profiles import Profile, load_profile
from rr_flex.registry import BUDGETS, ESTIMATORS


@dataclass(frozen=True, kw_only=True)
class RRConfig:
    """Settings of RRAttention (arXiv 2602.05853). The defaults are the paper's.

    The table of settings in rr_flex/README.md says what each field means. Those that one rule alone reads, marked * in
    the source, are None where the chosen rules do not read them, and an error if given there.
    `tau` and `threshold` may be one number or one a query head: a sequence, or a tensor [Hq]. A tensor on an
    accelerator is not read here, since that would stall the device: an entry out of range or NaN then keeps every
    visible block.
    Raises ValueError or TypeError naming the argument.
    """

    stride: int = 8  # tokens per sampled query and per pooled key, unless one of the next two is given
    query_stride: int | None = None  # tokens per sampled query; None: stride
    key_stride: int | None = None  # tokens per pooled key; None: stride
    pool: str = "keys"  # "queries": a block's queries pooled, every key scored; "both": the two estimates' mean
    query_pool: int | None = None  # * tokens per pooled query, pool="queries" or "both"; None: the query block
    block_size: int | tuple[int, int] = 128  # tokens per side of a block, or (query tokens, key tokens): 64 or 128
    order: int = 1  # 1: mean of the pooled logits; 2: plus their variance, by variance_weight
    # * order 2. None: 1/2, which is right for Gaussian logits and too much where few of a stride's tokens count
    variance_weight: float | None = None
    budget: str = "top_tau"  # rule that turns mass into kept blocks
    tau: Level | None = None  # * top_tau: share of a row's estimated mass to keep, in (0, 1]; None: .95
    # * threshold: a block is kept when its share of its row's mass exceeds this, in [0, 1); None: .01
    # * scaled_threshold: this times 64 / n in a row of n > 64 visible blocks
    threshold: Level | None = None
    # * density: kept / visible blocks of a sequence, mean over heads, in (0, 1]; None: .4. More where the mandatory
    # blocks alone are more: Selection.density says what was reached. Where heads are taken a few at a time (long
    # contexts, see runtime/head_slices.py) each slice has it: heads of two do not trade blocks.
    target_density: float | None = None
    mandatory: Mandatory | None = None  # * top_tau: "count": mandatory mass counts towards tau; "add": joined after
    sink_blocks: int = 1  # key blocks kept at the start of the keys
    local_blocks: int = 1  # key blocks kept up to the diagonal, those it crosses counting as one; 0 keeps none
    dense_last_rows: int = 1  # block rows at the end of the queries that keep every visible block
    # Keys under which nothing is dropped or estimated. None: rr_attention is dense where the card's measured costs say
    # that this is faster (kernels/deciding.py); elsewhere 0.
    min_length: int | None = None

    def __post_init__(self) -> None:
        registry.fill()
        for name, table in (("pool", ESTIMATORS), ("budget", BUDGETS)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}, got {getattr(self, name)!r}")
        if isinstance(self.block_size, Sequence):
            object.__setattr__(self, "block_size", tuple(self.block_size))
        self._check_numbers()
        self._settle_what_rules_read()
        self._check_blocks()
        self._check_levels()

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

    @property
    def level(self) -> Level:
        """The budget's number, of whichever field it goes by."""
        return getattr(self, self.level_field)

    @property
    def level_field(self) -> str:
        """The field that the budget goes by: "tau", "threshold" or "target_density"."""
        return BUDGETS[self.budget].level

    def _settle_what_rules_read(self) -> None:
        """A field that no chosen rule reads must not be given; one that is read and not given has its default."""
        read = fields_read(self.pool, self.budget, self.order)
        for name in FIELDS_OF_RULES:
            if name not in read and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must not be given beside budget={self.budget!r}, pool={self.pool!r}, order={self.order}, "
                    f"which do not read it, got {getattr(self, name)!r}"
                )
            if name in read and name in DEFAULTS and getattr(self, name) is None:
                object.__setattr__(self, name, DEFAULTS[name])
        unread_stride = "stride" not in read or None not in (self.query_stride, self.key_stride)
        if unread_stride and self.stride != 8:
            raise ValueError(f"stride must not be given where nothing reads it, got {self.stride}")
        if "order" not in read and self.order != 1:
            raise ValueError(f"order must be 1 with pool={self.pool!r}, got {self.order}")

    def _check_numbers(self) -> None:
        for name in ("stride", "query_stride", "key_stride", "query_pool", "order"):
            if getattr(self, name) is not None or name in ("stride", "order"):
                check_int(name, getattr(self, name), 1)
        if self.order > 2:
            raise ValueError(f"order must be 1 or 2, got {self.order}")
        for name in ("sink_blocks", "local_blocks", "dense_last_rows", "min_length"):
            if getattr(self, name) is not None or name != "min_length":
                check_int(name, getattr(self, name), 0)

    def _check_blocks(self) -> None:
        sizes = self.block_sizes
        if not isinstance(sizes, tuple) or any(type(size) is not int for size in sizes):
            raise TypeError(f"block_size must be an int or a pair (query, key) of ints, got {self.block_size!r}")
        if len(sizes) != 2 or not set(sizes) <= {64, 128}:
            raise ValueError(f"block_size must be 64, 128 or a pair (query, key) of them, got {self.block_size}")
        for name, stride, size in zip(("query_stride", "key_stride"), self.strides, sizes, strict=True):
            if size % stride:
                named = name if getattr(self, name) is not None else "stride"
                raise ValueError(f"{named} must divide block_size {self.block_size}, got {stride}")
        if sizes[0] % self.tokens_per_pooled_query:
            raise ValueError(f"query_pool must divide block_size {self.block_size}, got {self.query_pool}")

    def _check_levels(self) -> None:
        if self.mandatory not in (None, *get_args(Mandatory)):
            raise ValueError(f"mandatory must be one of {', '.join(get_args(Mandatory))}, got {self.mandatory!r}")
        for name, (rule, allowed) in RANGES.items():
            level = getattr(self, name)
            if level is None:
                continue
            if name in PER_HEAD:
                level = plain_level(name, level)
                object.__setattr__(self, name, level)
            if isinstance(level, Tensor):
                continue
            for share in level if isinstance(level, tuple) else (level,):
                check_number(name, share)
                if not allowed(share):
                    raise ValueError(f"{name} must lie in {rule}, got {share}")

    @classmethod
    def from_preset(cls, preset: Preset, **settings: Any) -> "RRConfig":
        """ "rr": the paper's rule. "best": what the study recommends, nearest to the dense model's predictions in a
        given time. "fast": as near as the paper's rule in less time. `settings` replace single fields."""
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        return cls(**PRESETS[preset]).with_settings(settings)

    @classmethod
    def resolve(cls, config: "RRConfig | None", settings: dict[str, Any]) -> "RRConfig":
        """What a call means by `config` and single `settings`: the settings replace fields of it, of a preset among
        them, or of the defaults. TypeError for a config that is none."""
        if config is not None and not isinstance(config, RRConfig):
            raise TypeError(f"config must be an RRConfig, got {type(config).__name__}")
        if config is None:
            return cls.from_preset(**{"preset": "rr"} | settings)
        if "preset" in settings:
            raise ValueError(f"preset must not be given beside a config, got {settings['preset']!r} and {config}")
        return config.with_settings(settings)

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

        Where a rule is replaced, the fields that only the former one reads fall away. A setting that the resulting
        rules do not read raises ValueError. `preset` among the settings starts from that preset instead; it cannot
        stand beside a configuration of one's own.
        """
        if not settings:
            return self
        if "preset" in settings:
            if not self._is_default():
                raise ValueError(f"preset must not be given beside a config, got {settings['preset']!r} and {self}")
            rest = {name: value for name, value in settings.items() if name != "preset"}
            return RRConfig.from_preset(settings["preset"], **rest)
        known = [field.name for field in fields(self)]
        for name in settings:
            if name not in known:
                raise TypeError(f"settings must be preset or fields of RRConfig ({', '.join(known)}), got {name!r}")
        if {"pool", "budget", "order"}.intersection(settings):
            rules = [settings.get(name, getattr(self, name)) for name in ("pool", "budget", "order")]
            named = isinstance(rules[0], str) and isinstance(rules[1], str)
            if named and rules[0] in ESTIMATORS and rules[1] in BUDGETS:  # else it is an error soon
                read = fields_read(*rules)
                settings = {name: None for name in FIELDS_OF_RULES if name not in read} | settings
        return replace(self, **settings)

    def _is_default(self) -> bool:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        expected = {field.name: DEFAULTS.get(field.name, field.default) for field in fields(self)}
        expected |= dict.fromkeys(("threshold", "target_density", "variance_weight"))
        return not any(isinstance(value, Tensor) for value in own.values()) and own == expected
