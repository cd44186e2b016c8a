"""Cells of `rr-flex tasks` as the tables of their page: scores and densities, what was not run, no times."""

from dataclasses import replace
from pathlib import Path

from benchmarks.tables import replace_between
from rr_flex import RRConfig
from rr_flex.tasks import results
from rr_flex.tasks.results import DENSE, Cell, describe
from rr_flex.tasks.ruler import TASKS

BEGIN, END = "<!-- tasks: begin -->", "<!-- tasks: end -->"
FILE = "ruler.jsonl"
PAGE = Path(__file__).parents[1] / "rr_flex" / "tasks" / "README.md"

# heading -> attention; none of them stays dense for a short context
COLUMNS = {
    "dense": DENSE,
    "`best`": describe(RRConfig.from_preset("best", budget="threshold", min_length=0)),
    "own budget": "budget=auto local_blocks=2",
}


def load(folder: Path) -> list[Cell]:
    """RULER's cells in the folder of results, none if there is no such file."""
    return results.read(folder / FILE)


def write_page(cells: list[Cell], page: Path = PAGE) -> None:
    if cells:
        text = page.read_text(encoding="utf-8")
        page.write_text(replace_between(text, BEGIN, END, markdown(cells), page), encoding="utf-8")


def draw(folder: Path) -> None:
    """ruler.png beside the cells: a heat map a column of the table that has most cells."""
    cells = load(folder)
    headings = {attention: heading.replace("`", "") for heading, attention in COLUMNS.items()}
    settings = [setting_of(cell) for cell in cells]
    shown = [
        replace(cell, attention=headings[cell.attention])
        for cell in cells
        if cell.attention in headings and setting_of(cell) == max(settings, key=settings.count)
    ]
    if shown:
        results.heat_map(shown).savefig(folder / "ruler.png", dpi=120)


def markdown(cells: list[Cell]) -> str:
    """A table a model and device, the means of its complete rows, and the tasks of which a length has no cell."""
    parts = []
    for setting in dict.fromkeys(setting_of(cell) for cell in sorted(cells, key=lambda cell: -cell.samples)):
        of_setting = [cell for cell in cells if setting_of(cell) == setting]
        parts += [f"**{setting}**", results.table(of_setting, run_of(of_setting), seconds=False), means(of_setting)]
    return "\n\n".join(filter(None, [*parts, not_run(cells)])) + "\n"


def setting_of(cell: Cell) -> str:
    device, dtype = cell.device or "device not recorded", cell.dtype or "dtype not recorded"
    return f"{cell.model}, {device}, {dtype}, {cell.samples} samples a cell"


def run_of(cells: list[Cell]) -> dict[str, str]:
    """The columns of which there is a cell."""
    run = {cell.attention for cell in cells}
    return {heading: name for heading, name in COLUMNS.items() if name in run}


def means(cells: list[Cell]) -> str:
    """Per length, over the tasks that have every column that was run at all; "" where that is one task or none."""
    columns = run_of(cells)
    told = []
    for length in sorted({cell.length for cell in cells}):
        found = {(cell.task, cell.attention): cell for cell in cells if cell.length == length}
        tasks = sorted({task for task, _ in found if all((task, name) in found for name in columns.values())})
        if len(tasks) < 2:
            continue
        shown = []
        for heading, name in columns.items():
            of_column = [found[task, name] for task in tasks]
            densities = [cell.density for cell in of_column if cell.density is not None]
            kept = f" ({sum(densities) / len(densities):.2f})" if densities else ""
            shown.append(f"{heading} {100 * sum(cell.score for cell in of_column) / len(tasks):.1f}{kept}")
        told.append(f"{length:,} tokens, {len(tasks)} tasks: {', '.join(shown)}.")
    return "Means of the rows that have all of these. " + " ".join(told) if told else ""


def not_run(cells: list[Cell]) -> str:
    lines = []
    for length in sorted({cell.length for cell in cells}):
        absent = [task for task in TASKS if not any(c.task == task and c.length == length for c in cells)]
        if absent:
            lines.append(f"at {length:,} tokens {', '.join(absent)}")
    return f"Without a cell: {'; '.join(lines)}." if lines else ""
