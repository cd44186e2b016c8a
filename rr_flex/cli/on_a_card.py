"""What a card would take at a run's density: read off the benchmark's own figures in card_times.json."""

import json
from pathlib import Path

TIMES = json.loads(Path(__file__).with_name("card_times.json").read_text(encoding="utf-8"))
LOWER = (0.3, 0.15)  # densities beside the run's own: what longer texts and `best` come to


def milliseconds(density: float, rows: list[dict]) -> tuple[float, float]:
    """(dense, sparse), the latter from the row of nearest density: selection stays, attention goes with density."""
    row = min(rows, key=lambda row: abs(row["density"] - density))
    attention = (row["total_ms"] - row["selection_ms"]) * density / row["density"]
    return row["fastest_dense_ms"], row["selection_ms"] + attention


def table(density: float, preset: str) -> str:
    """A line a length and kernel that the preset was measured with: at each density the time, and how many times
    faster that is than dense."""
    measured: dict[tuple[int, str], list[dict]] = {}
    for row in TIMES["times"]:
        if row["preset"] == preset:
            measured.setdefault((row["length"], row["backend"]), []).append(row)
    if not measured:
        return f"      preset {preset!r} was not timed on it"
    densities = (density, *(lower for lower in LOWER if lower < density - 0.02))
    heads = (f"density {each:.2f}" for each in densities)
    lines = [f"{'tokens':>9}  {'kernel':<8}{'dense':>9}" + "".join(f"{head:>20}" for head in heads)]
    for (length, backend), rows in sorted(measured.items()):
        times = [milliseconds(each, rows) for each in densities]
        cells = "".join(f"{f'{sparse:.1f} ms ({dense / sparse:.1f} ×)':>20}" for dense, sparse in times)
        lines.append(f"{length:>9,}  {backend:<8}{f'{times[0][0]:.1f} ms':>9}" + cells)
    return "\n".join(lines)
