"""What a run measured, as a card and as a page for people.

Imports `results`, `plots`, `presets` and what lies below them.
"""

from hfproj.reporting.card import render_card, write_card
from hfproj.reporting.page import rank_sentences, render_report, report

__all__ = ["rank_sentences", "render_card", "render_report", "report", "write_card"]
