"""One self-contained HTML page from the JSON of demo, evaluate, tasks or benchmarks: tables, block maps."""

from rr_flex.view.page.build import make_page
from rr_flex.view.page.runs import read_runs

__all__ = ["make_page", "read_runs"]
