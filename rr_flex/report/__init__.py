"""One self-contained HTML page from the JSON of demo, evaluate, tasks or benchmarks: tables, charts, block maps."""

from rr_flex.report.page import report_page
from rr_flex.report.runs import read_runs

__all__ = ["read_runs", "report_page"]
