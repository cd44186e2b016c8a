"""What a page is made of: tables, charts, and what one run says."""

from dataclasses import dataclass, field
from typing import Any

Scalar = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Table:
    caption: str
    columns: list[str]
    rows: list[list[Scalar]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    caption: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    title: str
    facts: dict[str, Scalar]  # what was run, on what
    results: dict[str, str] = field(default_factory=dict)  # the few numbers to see first
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    heads: dict[str, dict[int, list[float]]] = field(default_factory=dict)  # measure -> layer -> a value a head
    maps: dict[str, Any] | None = None  # as rr_flex.view.page.block_maps_json writes them
