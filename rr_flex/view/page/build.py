"""Runs to one HTML page that needs nothing beside itself: style, script and data are inside it."""

import html
import json
import math
from importlib import resources
from typing import Any

from rr_flex.view.page.chart import chart_svg, number_text
from rr_flex.view.page.documents import Run, Scalar, Table


def report_page(runs: list[Run], *, title: str | None = None) -> str:
    """Tables and charts are plain HTML and SVG; the script only sorts tables and draws the maps."""
    title = title or (runs[0].title if len(runs) == 1 else f"{len(runs)} runs")
    parts = {
        "TITLE": html.escape(title),
        "STYLE": asset("page.css"),
        "BODY": "\n".join(run_html(run, number) for number, run in enumerate(runs)),
        "DATA": embedded([{"heads": run.heads, "maps": run.maps} for run in runs]),
        "SCRIPT": asset("page.js"),
    }
    page = asset("page.html")
    # One pass over the template: what is put in is not looked at again.
    pieces = page.split("%%")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def asset(name: str) -> str:
    return resources.files("rr_flex.view.page").joinpath(name).read_text(encoding="utf-8")


def embedded(data: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def run_html(run: Run, number: int) -> str:
    facts = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in run.facts.items())
    results = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in run.results.items())
    parts = [
        f'<section class="run" data-run="{number}"><h2>{text(run.title)}</h2>',
        f'<dl class="results">{results}</dl>' if results else "",
        f"<details><summary>How it was run</summary><dl class='facts'>{facts}</dl></details>" if facts else "",
        maps_html(number, run) if run.maps else "",
        f'<div class="grid-of-heads" id="heads{number}"></div>' if run.heads else "",
        *(chart_svg(chart) for chart in run.charts),
        *(table_html(table) for table in run.tables),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


LONG = 100  # rows; a longer table is folded

VIEWS = {"true": "true mass", "estimated": "estimated mass", "difference": "estimate − truth", "kept": "kept blocks"}


def maps_html(number: int, run: Run) -> str:
    layers = options({each["layer"]: each["layer"] for each in run.maps["layers"]})
    heads = options({head: head for head in range(len(run.maps["layers"][0]["heads"]))})
    views = options(VIEWS)
    return f"""<div class="maps" id="maps{number}">
<h3>Block maps</h3>
<div class="pickers">
<label>layer <select class="layer">{layers}</select></label>
<label>head <select class="head">{heads}</select></label>
<label>view <select class="view">{views}</select></label>
</div>
<div class="map-and-readout">
<figure><canvas tabindex="0" role="img" aria-label="Block map; arrow keys move from cell to cell"></canvas>
<div class="legend"></div></figure>
<div class="readout" aria-live="polite"><p>Point at a block, tap it, or move with the arrow keys.</p></div>
</div>
</div>"""


def options(choices: dict[Scalar, Scalar]) -> str:
    return "".join(
        f'<option value="{html.escape(str(value))}">{html.escape(str(label))}</option>'
        for value, label in choices.items()
    )


def table_html(table: Table) -> str:
    head = "".join(f'<th scope="col"><button type="button">{text(name)}</button></th>' for name in table.columns)
    digits = [decimals([row[column] for row in table.rows]) for column in range(len(table.columns))]
    cells = [[cell_html(value, count) for value, count in zip(row, digits, strict=True)] for row in table.rows]
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    shown = (
        f'<div class="table"><table><caption>{text(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    if len(table.rows) <= LONG:
        return shown
    return f"<details><summary>{text(table.caption)}: {len(table.rows):,} rows</summary>{shown}</details>"


def cell_html(value: Scalar, digits: int | None) -> str:
    if is_number(value):
        shown = number_text(value) if digits is None else f"{value:,.{digits}f}"
        return f'<td class="number" data-value="{value!r}">{shown}</td>'
    return f"<td>{text(value)}</td>"


def decimals(column: list[Scalar]) -> int | None:
    """Digits after the point that a column's numbers share; None where they are too unlike each other for that."""
    sizes = [abs(value) for value in column if is_number(value) and value]
    if not sizes or all(size == int(size) for size in sizes):
        return 0
    if min(sizes) < 1e-3 or max(sizes) >= 1e9:
        return None
    return min(4, max(0, 3 - math.floor(math.log10(max(sizes)))))


def is_number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def text(value: Scalar) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    return number_text(value) if is_number(value) else html.escape(str(value))
