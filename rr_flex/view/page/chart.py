"""A line chart as SVG, in the colours of the page that it stands in."""

import html
import math

from rr_flex.view.page.page_parts import Chart

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 46
LINES = 7  # colours that page.css names
DASHES = ("", "7 4", "2 3", "9 3 2 3")


def chart_svg(chart: Chart) -> str:
    points = [point for line in chart.lines.values() for point in line]
    x_axis = Axis([x for x, _ in points], chart.log_x, 2, LEFT, WIDTH - RIGHT)
    y_axis = Axis([y for _, y in points], chart.log_y, 10, HEIGHT - BOTTOM, TOP)
    parts = []
    for at, label in x_axis.ticks():
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    for at, label in y_axis.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    names = []
    for number, (name, line) in enumerate(chart.lines.items()):
        colour, dash = f"line{number % LINES}", DASHES[number // LINES % len(DASHES)]
        dash = dash or (DASHES[1] if name.startswith("dense") else "")
        placed = [(x_axis.place(x), y_axis.place(y)) for x, y in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="{colour}" points="{path}" fill="none" stroke-dasharray="{dash}"/>')
        for (x, y), (at, value) in zip(placed, sorted(line), strict=True):
            about = html.escape(f"{name}: {number_text(at)} {chart.x}, {number_text(value)} {chart.y}")
            parts.append(f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{about}</title></circle>')
        names.append(f'<li><span class="key {colour}"></span>{html.escape(name)}</li>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(chart.x)}</text>')
    parts.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{html.escape(chart.y)}</text>'
    )
    caption = html.escape(chart.caption)
    return (
        f'<figure class="chart"><figcaption>{caption}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{caption}">{"".join(parts)}</svg>'
        f'<ul class="keys">{"".join(names)}</ul></figure>'
    )


class Axis:
    """Values to places between `start` and `stop`; logarithmic only where every value is positive."""

    def __init__(self, values: list[float], log: bool, base: int, start: float, stop: float) -> None:
        self.base = base if log and min(values) > 0 else 0
        self.start, self.stop = start, stop
        low, high = self.scaled(min(values)), self.scaled(max(values))
        margin = 0.05 * (high - low) or 0.5
        self.low, self.high = low - margin, high + margin

    def scaled(self, value: float) -> float:
        return math.log(value, self.base) if self.base else value

    def place(self, value: float) -> float:
        return self.start + (self.scaled(value) - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        span = self.high - self.low
        if self.base and span >= 1:
            step = math.ceil(span / 6)
            values = [self.base**power for power in range(math.ceil(self.low), math.floor(self.high) + 1, step)]
        else:
            low, high = (self.base**edge if self.base else edge for edge in (self.low, self.high))
            rough = (high - low) / 5
            unit = 10 ** math.floor(math.log10(rough))
            step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
            values = [step * count for count in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return [(self.place(value), number_text(value)) for value in values if value > 0 or not self.base]


def number_text(value: float) -> str:
    """At most four digits; thousands apart."""
    if value and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
