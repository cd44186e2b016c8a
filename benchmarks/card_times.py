"""What a card takes, for the last lines of `rr-flex demo`: `python -m benchmarks.card_times` writes them from results/.

One layer's attention in bfloat16, 32 query heads and 8 key heads of 128, by length, rule, kernel and density.
"""

import json
from pathlib import Path

from benchmarks.tables import timed
from rr_flex import RRConfig
from rr_flex.fields import PRESETS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = ROOT / "rr_flex" / "cli" / "card_times.json"
CARD, LENGTHS = "NVIDIA H200", (32768, 131072)
SHAPE = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "batch": 1, "card": CARD}
FIELDS = ("density", "selection_ms", "total_ms", "fastest_dense_ms")


def card_times(rows: list[dict]) -> dict:
    """Rows timed in turns with the fastest dense kernel, the paper's rule and the presets', by density."""
    found: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: row.get("date", "")):
        if any(row.get(name) != value for name, value in SHAPE.items()) or row.get("length") not in LENGTHS:
            continue
        preset = preset_of(row)
        if row.get("failed") or preset is None or timed(row) != "in turns":
            continue
        label = {"length": row["length"], "preset": preset, "backend": row["backend"]}
        # The latest run of a case replaces earlier ones.
        found[(*label.values(), round(row["density"], 3))] = label | {name: round(row[name], 4) for name in FIELDS}
    times = [found[key] for key in sorted(found)]
    about = {"card": CARD, "shape": "32 query heads and 8 key heads of 128, bfloat16"}
    return about | {"source": "python -m benchmarks.card_times, from benchmarks/results", "times": times}


def preset_of(row: dict) -> str | None:
    """The preset that a row's settings are, whatever its level; blocks as FLASH needs them count as the preset's, and
    budgets that go by one field as the same."""
    levels = {"tau", "threshold", "target_density", "block_size"}

    def timed_as(settings: dict) -> dict:
        same = {"stride": 8} | {name: value for name, value in settings.items() if name not in levels}
        return same | {"budget": RRConfig(budget=settings.get("budget", "top_tau")).level_field}

    return next((name for name, settings in PRESETS.items() if timed_as(settings) == timed_as(row["settings"])), None)


def rows() -> list[dict]:
    """Of `python -m benchmarks run`, of every file of results."""
    lines = [line for path in sorted(RESULTS.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [row for row in map(json.loads, lines) if "settings" in row]


def main() -> None:
    document = card_times(rows())
    TABLE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{TABLE}: {len(document['times'])} times")


if __name__ == "__main__":
    main()
