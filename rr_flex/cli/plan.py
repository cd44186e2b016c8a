"""`rr-flex plan`: which way to spread a long prompt's prefill over many GPUs, from measured rates."""

import argparse
import json
import sys
from pathlib import Path

from rr_flex.cli.arguments import (
    DONE,
    add_command,
    add_json,
    picture,
    save_figure,
    share,
    show,
    told,
    whole,
    write_json,
)

EXAMPLES = """
examples:
  rr-flex plan --tokens 4M --heads 64/8 --gpus 8..1024 --density .1
  rr-flex plan --tokens 1M --heads 32/8 --gpus 2,4,8 --plot plan.png
  rr-flex plan --check benchmarks/results/parallel.jsonl benchmarks/results/128k.jsonl
"""
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_to(commands: argparse._SubParsersAction) -> None:
    plan = add_command(
        commands,
        "plan",
        run,
        EXAMPLES,
        help="the fastest way to prefill a long prompt on many GPUs, by a cost model",
        description="Predicts time and memory a rank of each way of rr_flex.distributed, for one attention layer.",
    )
    plan.add_argument("--tokens", type=tokens, default=tokens("1M"), metavar="N", help="such as 512K or 4M [1M]")
    plan.add_argument("--heads", type=heads, default=(32, 8), metavar="Hq/Hkv", help="query and key heads [32/8]")
    plan.add_argument("--head-dim", type=whole(1), default=128, help="[%(default)s]")
    plan.add_argument("--layers", type=whole(1), default=1, help="how many such layers [%(default)s]")
    plan.add_argument(
        "--gpus", type=gpus, default=gpus("1..8"), metavar="A..B", help="doubling, or a list 2,4,8 [1..8]"
    )
    plan.add_argument("--density", type=share, default=0.1, help="share of blocks that attention keeps [%(default)s]")
    plan.add_argument("--rates", type=Path, metavar="JSON", help="measured rates of another machine [the shipped ones]")
    plan.add_argument("--check", type=Path, nargs="+", metavar="JSONL", help="benchmarks' rows beside predictions")
    plan.add_argument("--plot", type=picture, metavar="PNG", help="draws times against GPUs")
    add_json(plan)


def tokens(text: str) -> int:
    unit = UNITS.get(text[-1:].upper())
    return int(float(text[:-1]) * unit) if unit else int(text)


def heads(text: str) -> tuple[int, int]:
    Hq, _, Hkv = text.partition("/")
    pair = int(Hq), int(Hkv or Hq)
    if min(pair) < 1 or pair[0] % pair[1]:
        raise argparse.ArgumentTypeError(f"must be Hq/Hkv with Hq a multiple of Hkv, got {text}")
    return pair


def gpus(text: str) -> list[int]:
    first, dots, last = text.partition("..")
    counts = [int(x) for x in text.split(",")] if not dots else []
    count = int(first) if dots else 0
    while dots and count <= int(last):
        counts.append(count)
        count *= 2
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be A..B or a list of positive numbers, got {text}")
    return counts


def run(arguments: argparse.Namespace) -> int:
    with told():
        from rr_flex.distributed import cost

        rates = cost.Rates.read(arguments.rates or cost.RATES)
        rows = check_rows(arguments.check, rates) if arguments.check else plan_rows(arguments, rates)
    document = {"rates": rates.source, "rows": rows}
    write_json(arguments, document)
    show(arguments, document, (checked_table if arguments.check else planned_table)(rows))
    if not arguments.quiet:
        print(f"rates: {rates.source}", file=sys.stderr)
    if arguments.plot is not None:
        with told("viz"):
            from rr_flex.distributed.plot import draw

            save_figure(arguments.plot, draw(rows))
    return DONE


def plan_rows(arguments: argparse.Namespace, rates) -> list[dict]:
    from rr_flex.distributed import cost

    Hq, Hkv = arguments.heads
    shape = {"tokens": arguments.tokens, "heads": Hq, "kv_heads": Hkv, "head_dim": arguments.head_dim}
    prompt = cost.Prompt(**shape, density=arguments.density)
    rows = []
    for count in arguments.gpus:
        for place, each in enumerate(cost.costs(prompt, count, rates)):
            seconds = each.seconds * arguments.layers
            of_way = {"ranks": count, "way": each.way, "seconds": seconds, "best": place == 0}
            rows.append(of_way | {"memory_bytes": each.memory, "moved_bytes": each.moved})
    return rows


def check_rows(paths: list[Path], rates) -> list[dict]:
    """Measured rows that the model has a word on, with it: of benchmarks/parallel.py, and of one card's suites."""
    from rr_flex.distributed import cost

    rows = []
    for row in (json.loads(line) for path in paths for line in path.read_text().splitlines()):
        found = of_one_card(row) or of_several(row)
        if found is None or found["way"].removesuffix(", triton") not in cost.WAYS:
            continue
        way = found["way"].removesuffix(", triton")
        shape = {name: row[name] for name in ("heads", "kv_heads", "head_dim")}
        rule = {name: found[name] for name in ("strides", "order") if name in found}
        prompt = cost.Prompt(tokens=row["length"], density=row.get("density", 1.0), **shape, **rule)
        each = cost.cost(way, prompt, found["ranks"], rates)
        about = {name: row.get(name) for name in ("length", "density", "card")} | found
        about |= {"predicted_ms": 1000 * each.seconds, "off": 1000 * each.seconds / found["ms"] - 1}
        rows.append(about | {"memory_bytes": each.memory})
    return rows


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


def planned_table(rows: list[dict]) -> str:
    lines = [f"{'GPUs':>5}  {'way':<24}{'time':>12}{'memory a rank':>16}{'moved a rank':>15}"]
    for row in rows:
        mark = "*" if row["best"] else " "
        sizes = f"{row['memory_bytes'] / 2**30:>12.1f} GiB{row['moved_bytes'] / 2**30:>11.2f} GiB"
        lines.append(f"{row['ranks']:>5} {mark}{row['way']:<24}{1000 * row['seconds']:>9.1f} ms{sizes}")
    return "\n".join([*lines, "* fastest of its number of GPUs"])


def checked_table(rows: list[dict]) -> str:
    lines = [f"{'GPUs':>5}  {'way':<20}{'tokens':>9}{'density':>9}{'measured':>12}{'predicted':>12}{'off':>7}"]
    for row in rows:
        density = "dense" if row["density"] is None else f"{row['density']:.3f}"
        where = f"{row['ranks']:>5}  {row['way']:<20}{row['length']:>9}{density:>9}"
        lines.append(f"{where}{row['ms']:>9.1f} ms{row['predicted_ms']:>9.1f} ms{row['off']:>+7.0%}")
    mean = sum(abs(row["off"]) for row in rows) / max(1, len(rows))
    return "\n".join([*lines, f"mean of |off| over {len(rows)} rows: {mean:.0%}"])
