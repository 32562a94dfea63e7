"""Results → JSON, HTML, plots and a table; no engine."""

from monai_unlearn.report.html import render_html
from monai_unlearn.report.results import SCHEMA_VERSION, build_report, gap_figures, percent, terminal_table

__all__ = ["SCHEMA_VERSION", "build_report", "gap_figures", "percent", "render_html", "terminal_table"]
