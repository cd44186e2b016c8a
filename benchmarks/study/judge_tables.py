"""What judged rules do, as notebooks/README.md's table and picture: `python -m benchmarks.study.judge_tables`.

Rows are of `benchmarks.study.judge`, in results/judge.jsonl. A rule is read off at a mean density of .30: each text
between its two levels, divergences on a logarithmic scale. Times are put together from the rows of `python -m
benchmarks run 128k`: the estimate, and the attention over that share of blocks by the kernel for such blocks.
"""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.tables import load, markdown_table, replace_between

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "notebooks" / "README.md"
BEGIN, END = "<!-- judged: begin -->", "<!-- judged: end -->"
DENSITY, TOKENS, CARD = 0.3, 131072, "NVIDIA H200"
DRAWS = 1000  # of a bootstrap over texts
BEFORE = "best 128×64"  # what `best` was until this study: on Triton it is what the others are measured by
KERNELS = {"128×128": ("flash", "triton"), "128×64": ("triton",), "64×64": ("triton",)}
KEYS_16_8 = "rr query_stride=16 key_stride=8{} order=2 budget=threshold"
BOTH = "rr key_stride=32 pool=both{} budget=threshold"
BEST_SETTINGS = " order=2 variance_weight=0.125"
# Rule -> blocks, label of the rows whose estimate scores as many pairs, and how many times as many it scores itself.
TIMED = {
    "rr": ("128×128", "rr", 1),
    "best": ("128×128", BOTH.format(BEST_SETTINGS), 1),
    "fast": ("128×128", KEYS_16_8.format(""), 1),
    BEFORE: ("128×64", BOTH.format(" block_size=128x64" + BEST_SETTINGS), 1),
    "best 64×64": ("64×64", BOTH.format(" block_size=128x64" + BEST_SETTINGS), 1),
    "both, order 1, 8/32, 128×64": ("128×64", BOTH.format(" block_size=128x64"), 1),
    "keys 8/16, 128×64": ("128×64", KEYS_16_8.format(" block_size=128x64"), 1),
    "keys 8/16, 64×64": ("64×64", KEYS_16_8.format(" block_size=64"), 1),
    "keys 8/8, 128×64": ("128×64", KEYS_16_8.format(" block_size=128x64"), 2),
    "keys 16/16, 128×64": ("128×64", KEYS_16_8.format(" block_size=128x64"), 0.5),
}
SAME_TIME = {"best, own budget": "best", "best 128×64, own budget": BEFORE, "best 128×64, own budget by output": BEFORE}
SAME_TIME |= {"keys 8/16, 128×64, own budget": "keys 8/16, 128×64", "best 128×64, top-τ": BEFORE}
SAME_TIME |= {f"{rule} and the block before{own}": rule for rule in ("best", BEFORE) for own in ("", ", own budget")}
TIMED |= {rule: TIMED[other] for rule, other in SAME_TIME.items()}
PICTURED = ("rr", "both, order 1, 8/32, 128×64", BEFORE, "keys 8/16, 128×64", "fast", "best")
PICTURED += tuple(f"{rule} and the block before, own budget" for rule in (BEFORE, "best"))
FARTHEST = 0.06  # of density outside of what was measured that a divergence is read off at


class Judged(NamedTuple):
    """A rule on one model at a mean density, by text."""

    kl: dict[str, float]
    agreement: float
    perplexity: float  # over the dense model's, mean over texts

    @property
    def mean(self) -> float:
        return sum(self.kl.values()) / len(self.kl)


def read(path: Path = RESULTS / "judge.jsonl") -> dict[str, dict[str, list[dict]]]:
    """Rows by model and rule."""
    found: dict[str, dict[str, list[dict]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["model"], {}).setdefault(row["rule"], []).append(row)
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def levels_of(rows: Sequence[dict]) -> list[tuple[float, dict[str, dict]]]:
    """(mean density, row by text) of each level, ascending."""
    levels: dict[float, dict[str, dict]] = {}
    for row in rows:
        levels.setdefault(row["aimed"], {})[row["text"]] = row
    return sorted(((mean([row["density"] for row in texts.values()]), texts) for texts in levels.values()), key=first)


def first(pair: tuple) -> float:
    return pair[0]


def at(rows: Sequence[dict], density: float = DENSITY) -> Judged:
    """The rule at a mean density, on the line through its two levels."""
    (low, below), (high, above) = levels_of(rows)
    share = (density - low) / (high - low)
    kl = {
        text: math.exp(math.log(below[text]["kl"]) * (1 - share) + math.log(above[text]["kl"]) * share)
        for text in below
    }

    def between(measure) -> float:
        return mean([measure(below[text]) * (1 - share) + measure(above[text]) * share for text in below])

    return Judged(kl, between(lambda row: row["agreement"]), between(lambda row: row["perplexity_ratio"]))


def ratio(rule: Judged, other: Judged) -> tuple[float, float, float]:
    """Divergence over another rule's, with the 95 % interval of a bootstrap that draws whole texts."""
    drawn, texts = random.Random(0), list(rule.kl)

    def of(chosen: Sequence[str]) -> float:
        return sum(rule.kl[text] for text in chosen) / sum(other.kl[text] for text in chosen)

    again = sorted(of(drawn.choices(texts, k=len(texts))) for _ in range(DRAWS))
    return of(texts), again[int(0.025 * DRAWS)], again[math.ceil(0.975 * DRAWS) - 1]


class Clock:
    """Milliseconds of a rule at TOKENS tokens, 32 and 8 heads of 128, by density."""

    def __init__(self) -> None:
        rows = [row for row in load(RESULTS) if row["card"] == CARD and row["length"] == TOKENS and row["estimate_ms"]]
        self.estimate: dict[str, list[float]] = {}
        self.attention: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            self.estimate.setdefault(row["label"], []).append(row["estimate_ms"])
            kernel = "×".join(map(str, row["block_size"])), row["backend"]
            self.attention.setdefault(kernel, []).append((row["density"], row["attention_ms"]))

    def ms(self, rule: str, density: float, backend: str) -> float:
        """Attention's is on the line through 0."""
        blocks, label, factor = TIMED[rule]
        points = self.attention[blocks, backend]
        slope = sum(x * y for x, y in points) / sum(x * x for x, _ in points)
        return factor * mean(self.estimate[f"{label} {backend}"]) + slope * density

    def density_for(self, rule: str, ms: float, backend: str) -> float:
        return density_between(lambda density: self.ms(rule, density, backend), ms)


def density_between(measure, value: float, rising: bool = True) -> float:
    """The density at which a monotone measure has the value, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if (measure(middle) > value) == rising else (middle, high)
    return low


def table(found: dict[str, dict[str, list[dict]]]) -> str:
    """Rules by what they do on the worse of the models: divergence at equal density, and at the time of `best`."""
    clock = Clock()
    models = list(found)
    rules = [rule for rule in found[models[0]] if all(rule in found[model] for model in models)]
    judged = {(model, rule): at(found[model][rule]) for model in models for rule in rules}
    worse = {rule: max(judged[model, rule].mean / judged[model, BEFORE].mean for model in models) for rule in rules}
    cells = []
    for rule in sorted(rules, key=worse.get):
        row = [f"`{rule}`" if rule in ("rr", "best", "fast") else rule]
        for model in models:
            own = judged[model, rule]
            share, low, high = ratio(own, judged[model, BEFORE])
            row += [f"{own.mean:.4f}", "1" if rule == BEFORE else f"{share:.2f} ({low:.2f}–{high:.2f})"]
            row += [
                f"{max(own.kl.values()):.4f}",
                f"{100 * own.agreement:.1f} %",
                f"{100 * (own.perplexity - 1):+.1f} %",
            ]
        row += time_cells(clock, found, rule) if rule in TIMED else ["–"] * (2 + len(models))
        cells.append(row)
    heads = ["at density .30"]
    for model in models:
        heads += [f"{model}: KL", "of best 128×64's", "worst text", "same token", "perplexity"]
    heads += ["ms", *(f"in the time of best 128×64, of its KL: {model}" for model in models), "ms at the KL of `rr`"]
    return "\n".join(markdown_table(heads, cells))


def time_cells(clock: Clock, found: dict[str, dict[str, list[dict]]], rule: str) -> list[str]:
    """Time at DENSITY; divergence in the time of BEFORE by model; time at published RR's divergence, on the model where
    that is longer. By kernel, FLASH first."""
    backends = KERNELS[TIMED[rule][0]]
    wanted = clock.ms(BEFORE, DENSITY, "triton")
    shares = []
    for rules in found.values():
        densities = [clock.density_for(rule, wanted, backend) for backend in backends]
        own = [share_of(rules[rule], density, at(rules[BEFORE]).mean) for density in densities]
        shares.append(" / ".join("–" if x is None else f"{x:.2f}" for x in own))
    at_published = []
    for backend in backends:
        densities = [density_like(rules, rule) for rules in found.values()]
        at_published.append(max(clock.ms(rule, density, backend) for density in densities))
    times = [clock.ms(rule, DENSITY, backend) for backend in backends]
    return [" / ".join(f"{x:.0f}" for x in times), *shares, " / ".join(f"{x:.0f}" for x in at_published)]


def share_of(rows: Sequence[dict], density: float, other: float) -> float | None:
    """Divergence at a density over another; None far from what was measured."""
    measured = [level for level, _ in levels_of(rows)]
    if not min(measured) - FARTHEST <= density <= max(measured) + FARTHEST:
        return None
    return at(rows, density).mean / other


def density_like(rules: dict[str, list[dict]], rule: str) -> float:
    """Where the rule diverges as published RR does at DENSITY."""
    wanted = at(rules["rr"]).mean
    return density_between(lambda density: at(rules[rule], density).mean, wanted, rising=False)


def draw(found: dict[str, dict[str, list[dict]]]):
    """Divergence against time, a figure of matplotlib's: a rule is a line between its two levels."""
    from matplotlib.figure import Figure

    clock = Clock()
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axis, (model, rules) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        others = [rule for rule in TIMED if rule not in PICTURED and rule in rules]  # one may have no rows yet
        for rule in (*others, *PICTURED):
            backend = KERNELS[TIMED[rule][0]][0]
            points = [
                (clock.ms(rule, density, backend), mean([row["kl"] for row in texts.values()]))
                for density, texts in levels_of(rules[rule])
            ]
            style = {"linestyle": "--" if backend == "flash" else "-", "marker": "o", "markersize": 4}
            if rule in others:
                style |= {"color": "0.8", "label": "other rules" if rule == others[0] else None, "markersize": 2}
            else:
                style["label"] = f"{rule} ({backend})"
            axis.plot(*zip(*points, strict=True), **style)
        axis.set_yscale("log")
        axis.set_title(f"{model}, 8,192 tokens, ten texts", fontsize=11)
        axis.set_xlabel("estimate and attention of one layer at 131,072 tokens (ms, H200)")
        axis.set_ylabel("next-token KL from the dense model (nats)")
        axis.grid(alpha=0.3, which="both")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def section(found: dict[str, dict[str, list[dict]]]) -> str:
    rows = [row for rules in found.values() for of_rule in rules.values() for row in of_rule]
    row, commits = rows[0], " and ".join(dict.fromkeys(row["commit"] for row in rows))
    where = f"{row['card']}, torch {row['torch']}, Python {row['python']}, {row['date'][:10]}, commits {commits}"
    return f"{where}:\n\n{table(found)}"


def main() -> None:
    found = read()
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_between(text, BEGIN, END, f"{section(found)}\n", PAGE), encoding="utf-8")
    draw(found).savefig(RESULTS / "judge.png", dpi=130)
    print(section(found))


if __name__ == "__main__":
    main()
