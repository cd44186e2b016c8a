"""The two tables of rules: how mass is estimated, and how it is spent. Config, pipeline and command line read them.

An entry is made where its function is written, by one of the two decorators. `RRConfig` then takes its name.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimator:
    """How queries and keys become block mass."""

    estimate: Callable[..., Any]  # (q [B,Hq,Lq,D], k [B,Hkv,Lk,D], request) -> mass [B,Hq,nQ,nK], any scale
    reads: tuple[str, ...]  # fields of RRConfig that it goes by; another one beside it is an error


@dataclass(frozen=True)
class Budget:
    """How block mass becomes kept blocks."""

    # (mass [B,Hq,nQ,nK], level [Hq,1], visible, mandatory [b,h,nQ,nK], config) -> kept [B,Hq,nQ,nK]
    select: Callable[..., Any]
    level: str  # the field of RRConfig that holds its number
    reads: tuple[str, ...] = ()  # further fields that it goes by


ESTIMATORS: dict[str, Estimator] = {}
BUDGETS: dict[str, Budget] = {}
OWN = ("rr_flex.estimate", "rr_flex.selection")  # modules whose rules are always there


def fill() -> None:
    """Imports the modules of our own rules, which nothing else may have done before the first RRConfig is made."""
    if "keys" not in ESTIMATORS or "top_tau" not in BUDGETS:
        for name in OWN:
            importlib.import_module(name)


def estimator(name: str, *, reads: tuple[str, ...]) -> Callable:
    """Enters a function as `RRConfig(pool=name)`; it is `Estimator.estimate`."""

    def enter(estimate: Callable) -> Callable:
        ESTIMATORS[name] = Estimator(estimate, reads)
        return estimate

    return enter


def budget(name: str, *, level: str, reads: tuple[str, ...] = ()) -> Callable:
    """Enters a function as `RRConfig(budget=name)`; it is `Budget.select`."""

    def enter(select: Callable) -> Callable:
        BUDGETS[name] = Budget(select, level, reads)
        return select

    return enter
