"""The report: one HTML file that needs nothing but a browser. Matplotlib is imported late."""

from omega_qvla.evaluation.report.data import DriftView, LayerView, PairedEpisode, ReportData
from omega_qvla.evaluation.report.page import render_report, write_report

__all__ = [
    "DriftView",
    "LayerView",
    "PairedEpisode",
    "ReportData",
    "render_report",
    "write_report",
]
