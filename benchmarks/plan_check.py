"""`python -m benchmarks.plan_check ROWS.jsonl ...`: measured rows beside what `rr-flex plan` predicts for them."""

import argparse
import json
import re
from pathlib import Path

from rr_flex.cli import flags
from rr_flex.distributed import cost
from rr_flex.distributed.plot import draw


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_check", description=__doc__)
    parser.add_argument(
        "files", type=flags.old_file, nargs="+", help="rows of benchmarks.parallel or of `python -m benchmarks run`"
    )
    parser.add_argument("--rates", type=flags.old_file, default=cost.RATES, help="another machine's")
    parser.add_argument("--plot", type=flags.picture, help="measured beside predicted, as a picture")
    options = parser.parse_args(arguments)
    rows = check_rows(options.files, cost.Rates.read(options.rates))
    print(table(rows))
    if options.plot:
        draw(rows).savefig(options.plot, dpi=130)
    return 0


def check_rows(paths: list[Path], rates: cost.Rates) -> list[dict]:
    """Those that the model has a word on, with it."""
    rows = []
    for row in (json.loads(line) for path in paths for line in path.read_text().splitlines()):
        found = of_one_card(row) or of_several(row)
        if found is None:
            continue
        shape = {name: row[name] for name in ("heads", "kv_heads", "head_dim")}
        rule = {name: found[name] for name in ("strides", "order") if name in found}
        prompt = cost.Prompt(tokens=row["length"], density=row.get("density", 1.0), **shape, **rule)
        predicted = predict(found["way"].removesuffix(", triton"), prompt, found["ranks"], rates)
        if predicted is None:
            continue
        predicted_ms = 1000 * predicted.seconds
        about = {name: row.get(name) for name in ("length", "density", "card")} | found
        about |= {"predicted_ms": predicted_ms, "off": predicted_ms / found["ms"] - 1}
        if row.get("held_bytes"):
            # What the benchmark holds besides is not the call's; q, k and v are.
            of_inputs = (prompt.q_bytes + prompt.kv_bytes) / found["ranks"]
            bytes_of_call = row["peak_bytes"] - row["held_bytes"] + of_inputs
            about |= {"memory": bytes_of_call, "predicted_memory": predicted.memory}
        rows.append(about)
    return rows


def predict(way: str, prompt: cost.Prompt, ranks: int, rates: cost.Rates) -> cost.Cost | None:
    """Of a way by its name in benchmarks/parallel_ways.py."""
    if mesh := re.fullmatch(r"(\d+) heads × (\d+) sequence", way):
        return cost.plane(prompt, tuple(map(int, mesh.groups())), "all", rates)
    way = "dense ulysses" if way == "one card, dense" else way
    return cost.cost(way, prompt, ranks, rates) if way in cost.WAYS else None


def of_several(row: dict) -> dict | None:
    """A way's time in a row of benchmarks/parallel.py."""
    if "ms" not in row or "way" not in row:
        return None
    ranks = 1 if row["way"].startswith("one card") else row["ranks"]
    return {"way": row["way"], "ranks": ranks, "ms": row["ms"]}


def of_one_card(row: dict) -> dict | None:
    """The whole call's time in a row of `python -m benchmarks run` whose rule and kernel the rates are of."""
    settings = row.get("settings", {})
    rates_know = row.get("method") == "rr" and row.get("backend") == "flash" and "pool" not in settings
    if not rates_know or row.get("total_ms") is None:
        return None
    stride = settings.get("stride", 8)
    strides = settings.get("query_stride", stride), settings.get("key_stride", stride)
    return {"way": "one card", "ranks": 1, "ms": row["total_ms"], "strides": strides, "order": settings.get("order", 1)}


def table(rows: list[dict]) -> str:
    lines = [
        f"{'GPUs':>5}  {'way':<20}{'tokens':>9}{'density':>9}{'measured':>12}{'predicted':>12}{'off':>7}{'memory':>21}"
    ]
    for row in rows:
        density = "dense" if row["density"] is None else f"{row['density']:.3f}"
        where = f"{row['ranks']:>5}  {row['way']:<20}{row['length']:>9}{density:>9}"
        line = f"{where}{row['ms']:>9.1f} ms{row['predicted_ms']:>9.1f} ms{row['off']:>+7.0%}"
        if "memory" in row:
            line += f"{row['memory'] / 2**30:>8.1f} /{row['predicted_memory'] / 2**30:>6.1f} GiB"
        lines.append(line)
    mean = sum(abs(row["off"]) for row in rows) / max(1, len(rows))
    return "\n".join([*lines, f"mean of |off| over {len(rows)} rows: {mean:.0%}; memory is measured / predicted"])


if __name__ == "__main__":
    raise SystemExit(main())
