"""What a run measured, as a card and as a page for people.

    Results ──► context.Context ──► templates/card.md.jinja (the card), templates/page.html.jinja (the page)

The layout and the sentences of a card or page are in its template; the words of verdicts and intervals and the
roundings, which the table of `Results` shares, are in `hfproj.results.words`. Pictures of the user's own images and
texts are made in `images.py` and `texts.py` and lie beside the results. Imports `results`, `plots`, `presets` and what
lies below them.
"""

from hfproj.reporting.card import render_card, write_card
from hfproj.reporting.images import write_image_pictures
from hfproj.reporting.metadata import check_license, write_eval_results
from hfproj.reporting.page import render_report, report
from hfproj.reporting.texts import write_text_pictures

__all__ = [
    "check_license", "render_card", "render_report", "report", "write_card", "write_eval_results",
    "write_image_pictures", "write_text_pictures",
]  # fmt: skip
