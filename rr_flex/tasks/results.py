"""Scores of tasks, one JSON line a cell: kept as they come, so that a run that was cut off goes on where it stopped."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rr_flex.config import RRConfig
from rr_flex.fields import DEFAULTS
from rr_flex.registry import BUDGETS
from rr_flex.runtime.writing import write_atomically

DENSE = "dense"
# What makes two cells the same one: where a table shows it, and what else they may differ by.
PLACE = ("task", "length", "attention")
FACTS = ("suite", "model", "samples", "chat", "device", "dtype", "data")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells of a run share. Defaults are what a file says that was written before the field was kept."""

    model: str
    samples: int
    batch_size: int = 1  # samples generated at once, which changes the time and not the task
    device: str = ""  # the card's name or CPU
    dtype: str = ""  # of the weights, as "bfloat16"
    chat: bool = False  # prompts through the model's chat template
    data: str = ""  # folder of the suite's data


@dataclass(frozen=True, kw_only=True)
class Cell(Setting):
    """One task at one length under one attention."""

    suite: str
    task: str
    length: int  # tokens of prompt and answer
    attention: str  # DENSE, or the settings that differ from the defaults, as "tau=0.95 order=2"
    score: float  # mean share of the references found, 0 to 1
    seconds: float  # wall time of the cell's generation
    density: float | None  # mean over layers and samples; None: dense
    dense_reasons: dict[str, int]  # prefill calls that stayed dense, by reason
    tokens: int  # prompt tokens of all samples

    @property
    def key(self) -> tuple:
        return key_of(**asdict(self))


def key_of(**facts: Any) -> tuple:
    """What makes two cells the same one, so that the second is not run."""
    return tuple(facts[name] for name in (*PLACE, *FACTS))


def describe(config: RRConfig | None) -> str:
    """The level by the name of its budget's field, and the settings that differ from the defaults; DENSE for None.

    The budget is told where another that was entered before goes by the same field.
    """
    if config is None:
        return DENSE
    usual = {field.name: (None, getattr(RRConfig(), field.name), DEFAULTS.get(field.name)) for field in fields(config)}
    untold = ("budget", *(rule.level for rule in BUDGETS.values()))
    said = {name: getattr(config, name) for name in usual if name not in untold}
    shown = [f"{name}={value}" for name, value in said.items() if value not in usual[name]]
    first = next(name for name, rule in BUDGETS.items() if rule.level == config.level_field)
    budget = [] if config.budget == first else [f"budget={config.budget}"]
    return " ".join([*budget, f"{config.level_field}={config.level}", *shown])


def read(path: Path) -> list[Cell]:
    """The cells in `path`, none if there is no such file. ValueError for a line that is none."""
    if not path.exists():
        return []
    names = {field.name for field in fields(Cell)}
    needed = {field.name for field in fields(Cell) if field.default is MISSING}
    cells = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} must hold a JSON object a line, got line {number}: {error}") from error
        if not needed <= set(row) <= names:
            raise ValueError(f"{path} must hold the fields {sorted(names)}, got {sorted(row)} in line {number}")
        cells.append(Cell(**row))
    return cells


def append(path: Path, cell: Cell) -> None:
    before = path.read_bytes() if path.exists() else b""
    write_atomically(path, lambda stream: stream.write(before + json.dumps(asdict(cell)).encode() + b"\n"))


def table(cells: Iterable[Cell], columns: Mapping[str, str] | None = None, *, seconds: bool = True) -> str:
    """A Markdown table: a row a task and length, the dense score beside every other.

    `columns`: heading -> attention, in this order, run or not; all that were run unless given. `seconds`: times too.
    """
    cells = told_apart(cells)
    if columns is None:
        columns = {name: name for name in _attentions(cells)}
    rows: dict[tuple[int, str], dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.length, cell.task), {})[cell.attention] = cell
    lines = [f"| length | task | samples | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for (length, task), found in sorted(rows.items()):
        samples = "/".join(str(n) for n in sorted({cell.samples for cell in found.values()}))
        shown = [_shown(found[name], seconds) if name in found else "–" for name in columns.values()]
        lines.append(f"| {length:,} | {task} | {samples} | {' | '.join(shown)} |")
    return "\n".join(lines)


def told_apart(cells: Iterable[Cell]) -> list[Cell]:
    """The cells, their attention named with the facts by which some differ that would stand in one place."""
    cells, places = list(cells), {}
    for cell in cells:
        places.setdefault(tuple(getattr(cell, name) for name in PLACE), []).append(cell)
    differing = [
        name for name in FACTS if any(len({getattr(cell, name) for cell in found}) > 1 for found in places.values())
    ]
    names = (" ".join([cell.attention, *(f"{name}={getattr(cell, name)}" for name in differing)]) for cell in cells)
    return [replace(cell, attention=name) for cell, name in zip(cells, names, strict=True)]


def _attentions(cells: list[Cell]) -> list[str]:
    """Dense first."""
    return sorted({cell.attention for cell in cells}, key=lambda name: (not name.startswith(DENSE), name))


def _shown(cell: Cell, seconds: bool) -> str:
    beside = [f"{cell.seconds / cell.samples:.0f} s"] if seconds else []
    beside += [] if cell.density is None else [f"{cell.density:.2f}"]
    return f"{100 * cell.score:.0f}" + (f" ({', '.join(beside)})" if beside else "")


def heat_map(cells: Iterable[Cell]):
    """Task × length, a panel an attention, scores 0 to 100; a matplotlib Figure."""
    from matplotlib.figure import Figure

    cells = told_apart(cells)
    attentions = _attentions(cells)
    tasks, lengths = (sorted({getattr(cell, name) for cell in cells}) for name in ("task", "length"))
    size = (1.6 + len(attentions) * (0.8 + 0.7 * len(lengths)), 1.2 + 0.4 * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(attentions), squeeze=False)[0]
    for axis, attention in zip(axes, attentions, strict=True):
        scores = {(cell.task, cell.length): 100 * cell.score for cell in cells if cell.attention == attention}
        grid = [[scores.get((task, length), float("nan")) for length in lengths] for task in tasks]
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for (task, length), score in scores.items():
            color = "black" if score > 60 else "white"
            place = lengths.index(length), tasks.index(task)
            axis.text(*place, f"{score:.0f}", ha="center", va="center", color=color, fontsize=8)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(tasks)), tasks if axis is axes[0] else [])
        axis.set_title(attention, fontsize=9)
    figure.colorbar(image, ax=axes, label="score")
    return figure
