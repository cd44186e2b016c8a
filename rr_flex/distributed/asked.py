"""What a call asks of every rank, as one record, checked on all ranks before any of them waits for another."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mask_mods.spans import MaskMod
from rr_flex.checks import (
    DTYPES,
    check_flag,
    check_numbers,
    check_queries_and_keys,
    check_sinks,
    check_values,
    gradient_wanted,
)
from rr_flex.config import RRConfig
from rr_flex.distributed.shards import HEADS, Account, Shards, fingerprint
from rr_flex.kernels.choose import Backend, check_backend

Fetch = Literal["all", "kept"]
OPTIONAL = {"sinks", "backend", "fetch"}  # options that not every way has


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """The options of `rr_attention`, for the whole sequence and all its heads.

    `mask_mod` is asked by positions: its query i is token i of the sequence, whoever holds it.
    """

    config: RRConfig = field(default_factory=RRConfig)  # tau or threshold by head: of all heads
    mask_mod: MaskMod | None = None
    causal: bool = True
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # logits of this rank's heads; heads and Ulysses only
    backend: Backend = "auto"
    fetch: Fetch = "all"  # context parallel only
    account: Account = field(default_factory=Account)

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Asked":
        """From a call's keywords: fields of this record, and of RRConfig."""
        names = [each.name for each in fields(cls)]
        own = {name: value for name, value in options.items() if name in names and value is not None}
        settings = {name: value for name, value in options.items() if name not in names}
        return cls(config=RRConfig.resolve(own.pop("config", None), settings), **own)

    def config_of(self, shards: Shards, Hq: int) -> RRConfig:
        """The settings for this rank's `Hq` heads: its part of levels by head."""
        level, heads = self.config.level, Hq * shards.ranks(HEADS)
        if not isinstance(level, float | int) and len(level) != heads:
            raise ValueError(f"{self.config.level_field} must be one number or one a head ({heads}), got {len(level)}")
        first = shards.rank(HEADS) * Hq
        return of_heads(self.config, slice(first, first + Hq))


def of_heads(config: RRConfig, heads: slice) -> RRConfig:
    """The settings for some heads: their part of levels by head."""
    level = config.level
    if isinstance(level, float | int):
        return config
    return config.with_settings({config.level_field: level[heads]})


def check_asked(q: Tensor, k: Tensor, v: Tensor, shards: Shards, options: dict[str, Any], takes: set[str]) -> Asked:
    """The record of the call, the same on every rank; an error of one rank is raised on all of them.

    `takes`: which of OPTIONAL's options this way has.
    """
    if not isinstance(shards, Shards):
        raise TypeError(f"shards must be Shards, got {type(shards).__name__}")
    failed, facts = None, dict.fromkeys(("batch", "heads", "key heads", "D", "Dv", "dtype", "layout", "settings"), 0)
    asked = None
    try:
        if refused := sorted(set(options) & (OPTIONAL - takes)):
            raise TypeError(f"options must be those of this way, got {', '.join(refused)}")
        asked = _check(q, k, v, shards, options)
        shapes = (q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3], DTYPES.index(q.dtype))
        asks = (asked.config, asked.causal, asked.scale, asked.softcap, asked.mask_mod is None, asked.fetch)
        facts = dict(zip(facts, (*shapes, fingerprint(shards.layout), fingerprint(asks)), strict=True))
    except (ValueError, TypeError, NotImplementedError) as error:
        failed = error
    shards.agree(facts, failed, torch.device(shards.mesh.device_type))
    return asked


def _check(q: Tensor, k: Tensor, v: Tensor, shards: Shards, options: dict[str, Any]) -> Asked:
    asked = Asked.of(options)
    if not isinstance(asked.account, Account):
        raise TypeError(f"account must be an Account, got {type(asked.account).__name__}")
    if asked.fetch not in get_args(Fetch):
        raise ValueError(f"fetch must be one of {', '.join(get_args(Fetch))}, got {asked.fetch!r}")
    check_queries_and_keys(q, k)
    check_values(q, k, v)
    check_sinks(q, asked.sinks)
    if gradient_wanted(q, k, v):
        raise NotImplementedError("q, k and v must not require grad across ranks, got requires_grad=True")
    check_flag("causal", asked.causal)
    check_backend(asked.backend, q)
    check_numbers(asked.scale, asked.softcap)
    if asked.mask_mod is not None and not callable(asked.mask_mod):
        raise TypeError(f"mask_mod must be a function of (b, h, q_idx, kv_idx), got {asked.mask_mod!r}")
    if shards.layout is not None:
        lengths = shards.layout.queries_on(shards.place), shards.layout.keys_on(shards.place)
        if (q.shape[2], k.shape[2]) != lengths:
            raise ValueError(f"q and k must hold this rank's {lengths} tokens, got {(q.shape[2], k.shape[2])}")
    if asked.config.budget == "density":
        raise NotImplementedError(
            "budget must be 'top_tau' or a threshold across ranks, got 'density', which weighs all heads and rows"
            " against each other; calibrate a threshold for it"
        )
    return asked
