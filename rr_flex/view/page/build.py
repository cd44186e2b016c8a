"""Runs to one HTML page that needs nothing beside itself: style, script and data are inside it."""

import importlib.metadata
import json
import math
from importlib import resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from rr_flex.view.page.any_json import is_number
from rr_flex.view.page.chart import chart_svg, number_text
from rr_flex.view.page.page_parts import Run, Scalar, Table


def make_page(runs: list[Run], *, title: str | None = None) -> str:
    """Tables and charts are plain HTML and SVG; the script only sorts tables and draws the maps."""
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"shown": shown, "cells": cells, "svg": lambda chart: Markup(chart_svg(chart))}
    page.globals["asset"] = lambda name: Markup(asset(name))
    return page.from_string(asset("page.html")).render(
        title=title or (runs[0].title if len(runs) == 1 else f"{len(runs)} runs"),
        runs=runs,
        data=Markup(embedded([{"heads": run.heads, "maps": run.maps} for run in runs])),
        version=installed_version(),
    )


def asset(name: str) -> str:
    return resources.files("rr_flex.view.page").joinpath(name).read_text(encoding="utf-8")


def installed_version() -> str | None:
    try:
        return importlib.metadata.version("rr-flex")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return None


def embedded(data: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def cells(table: Table) -> list[list[tuple[str | None, str]]]:
    """(the number to sort by, what is shown) of each cell; None for what is no number."""
    digits = [decimals([row[column] for row in table.rows]) for column in range(len(table.columns))]
    return [
        [
            (repr(value), number_text(value) if count is None else f"{value:,.{count}f}")
            if is_number(value)
            else (None, shown(value))
            for value, count in zip(row, digits, strict=True)
        ]
        for row in table.rows
    ]


def decimals(column: list[Scalar]) -> int | None:
    """Digits after the point that a column's numbers share; None where they are too unlike each other for that."""
    sizes = [abs(value) for value in column if is_number(value) and value]
    if not sizes or all(size == int(size) for size in sizes):
        return 0
    if min(sizes) < 1e-3 or max(sizes) >= 1e9:
        return None
    return min(4, max(0, 3 - math.floor(math.log10(max(sizes)))))


def shown(value: Scalar) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    return number_text(value) if is_number(value) else str(value)
