"""Reports on training runs: tables, plots, Markdown, JSON and one HTML page, from run folders."""

from experiments.report.build import ReportPaths, build_report
from experiments.report.document import MINIATURE, ReferenceRow, Report, ReportNotes, ReportRun

__all__ = ["MINIATURE", "ReferenceRow", "Report", "ReportNotes", "ReportPaths", "ReportRun", "build_report"]
