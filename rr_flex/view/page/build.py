"""Runs to one HTML page that needs nothing beside itself: style, script and data are inside it."""

import importlib.metadata
import json
from importlib import resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from rr_flex.view.page.runs import Run, Scalar, is_number


def make_page(runs: list[Run], *, title: str | None = None) -> str:
    """Tables are plain HTML; the script only sorts tables and draws the maps."""
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"shown": shown, "number": lambda value: repr(value) if is_number(value) else None}
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
    """None in a checkout that is not installed."""
    try:
        return importlib.metadata.version("rr-flex")
    except importlib.metadata.PackageNotFoundError:
        return None


def embedded(data: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def shown(value: Scalar) -> str:
    """Numbers in at most four digits, thousands apart."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    if not is_number(value):
        return str(value)
    whole = value == int(value) or 1000 <= abs(value) < 1e9
    return f"{value:,.0f}" if whole and abs(value) < 1e12 else f"{value:.4g}"
