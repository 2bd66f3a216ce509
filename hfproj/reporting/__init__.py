"""What a run measured, as a page for people."""

from hfproj.reporting.page import rank_sentences, render_report, report

__all__ = ["rank_sentences", "render_report", "report"]
