"""What a run found, as one HTML file that opens anywhere: no network, no script, charts as inline SVG."""

from mambify.evaluate.report.page import render_report

__all__ = ["render_report"]
