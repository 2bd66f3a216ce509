"""One way from a number to its words: what is changed in one place changes in table, card and page."""

import re
from html import unescape

import pytest
from card_results import a_result, body

from hfproj.reporting import render_card, render_report
from hfproj.results import words


def everywhere(results):
    """The table as text and in Markdown, the card and the page, as a reader sees them."""
    page = unescape(re.sub(r"<[^>]+>", "", render_report(results)))
    card = body(render_card(results)).replace("**", "").replace("\u00a0", " ")
    return results.table(), results.to_markdown(), card, page


def bare(**changes):
    return a_result(history=[], spectra={}, **changes)


CASES = [
    ("better", (0.8, 0.9), "The representation got better: 20-NN accuracy of h on uoft-cs/cifar10 went from"),
    ("worse", (0.9, 0.8), "The representation got worse: 20-NN accuracy of h on uoft-cs/cifar10 went from"),
    ("unclear", (0.8, 0.8), "No gain was measured: 20-NN accuracy of h on uoft-cs/cifar10 went from"),
]


@pytest.mark.parametrize(("sense", "h", "begins"), CASES)
def test_the_words_of_a_verdict_are_changed_in_one_place(monkeypatch, sense, h, begins):
    for text in everywhere(bare(h=h)):
        assert begins in text
    monkeypatch.setitem(words.HEADLINES, sense, "Every {layer} is a fish")
    for text in everywhere(bare(h=h)):
        assert begins.split(":")[0] not in text
        assert "Every representation is a fish: 20-NN accuracy of h on uoft-cs/cifar10 went from" in text


def test_the_words_of_an_interval_are_changed_in_one_place(monkeypatch):
    monkeypatch.setattr(words, "INTERVAL", "likely range")
    for text in everywhere(bare()):
        assert "(+0.1000, likely range +0.0" in text
        assert "95 %" not in text


def test_a_rounding_is_changed_in_one_place(monkeypatch):
    monkeypatch.setattr(words, "_digits", lambda name: 2)
    table, markdown, card, page = everywhere(bare())
    for text in (table, markdown, card, page):
        assert "went from 0.80 to 0.90 (+0.10, 95 % interval +0.0" in text
        assert "0.8000" not in text
        assert "20.00" in text  # RankMe


def test_signs_of_collapse_read_the_same_everywhere():
    alarm = {"collapse": {"step": 40, "what": "RankMe of z fell."}}
    for text in everywhere(bare(ranks=(20.0, 9.0), geometry=alarm)):
        assert "The collapse alarm rang while it trained at step 40: RankMe of z fell." in text
        assert "A sign of dimensional collapse: RankMe of z went from 20.0 to 9.0 (less than half) on uoft-cs" in text


def test_a_probe_that_nobody_knows_is_called_by_its_name_and_unit():
    results = bare()
    for i, m in enumerate(results.measurements):
        if m.name == "knn":
            protocol = {name: value for name, value in m.protocol.items() if name != "k"}
            results.measurements[i] = type(m)(**{**vars(m), "name": "my_probe", "protocol": protocol})
    for text in everywhere(results):
        assert "my probe accuracy of h on uoft-cs/cifar10 went from" in text
