"""Results → JSON, HTML, plots and a table; no engine."""

from monai_unlearn.report.curve import forget_size_rows
from monai_unlearn.report.html import render_html
from monai_unlearn.report.model_card import model_card
from monai_unlearn.report.numbers import percent
from monai_unlearn.report.results import MAIN_FIGURE, SCHEMA_VERSION, build_report, gap_figures, terminal_table
from monai_unlearn.report.scalars import scalars
from monai_unlearn.report.schema import read_report, validate_report
from monai_unlearn.report.tuning_page import tuning_page

__all__ = [
    "MAIN_FIGURE",
    "SCHEMA_VERSION",
    "build_report",
    "forget_size_rows",
    "gap_figures",
    "model_card",
    "percent",
    "read_report",
    "render_html",
    "scalars",
    "terminal_table",
    "tuning_page",
    "validate_report",
]
