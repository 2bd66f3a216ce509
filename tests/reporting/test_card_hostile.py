"""Nothing in the results can break a card: strings stay strings, and values of another form leave a valid card."""

import ast
import copy
import re

import pytest
from card_results import a_result, blocks, body
from huggingface_hub import ModelCard
from loopback_card import complaints
from markdown_it import MarkdownIt

from hfproj.filenames import TRAINING_PICTURE
from hfproj.reporting.card import render_card
from hfproj.reporting.markdown import code, fence, inline
from hfproj.results import Measurement

HOSTILE = [
    "\n---\n# evil\n",
    "```\n# evil\n````\n",
    "~~~\n<script>alert(1)</script>",
    "| a | b\\| c |",
    "](http://evil) ![x](http://evil/i.png)",
    "<img src=x onerror=alert(1)>",
    "---\n...\nkey: value",
    "&lt;b&gt; $$x$$ \\(y\\) **b** ~~s~~",
    "a\u202eb\u2028# evil\x85# evil\u200b",
    "\ud800 \x00 \x1b[31m",
    "`" * 7,
    "[a]: http://evil",
    "    # evil",
    "1. x",
    "__init__",
    "!!python/object/apply:os.system ['x']",
    "\"'; print(1) #",
]


def replaced(value, text):
    """The same structure with every string in it replaced."""
    if isinstance(value, dict):
        return {name: replaced(part, text) for name, part in value.items()}
    if isinstance(value, list):
        return [replaced(part, text) for part in value]
    return text if isinstance(value, str) else value


def structure(text):
    """Everything in a text that is more than letters: its kind, and where it leads."""
    found, rest = [], MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    while rest:
        token = rest.pop(0)
        where = token.attrs.get("href") or token.attrs.get("src") if token.attrs else None
        if token.type not in ("text", "softbreak", "code_inline", "inline", "paragraph_open", "paragraph_close"):
            found.append((token.type, where))
        rest = [*(token.children or []), *rest]
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_a_string_stays_a_string(text):
    result = a_result(geometry={"collapse": {"step": 3, "what": "x"}})
    options = {"files": ["spectrum.png", TRAINING_PICTURE], "adapters": ["default", "other"]}
    cards = {}
    for string in ("x", text):
        own = copy.deepcopy(result)
        for part in ("config", "command", "notes", "geometry"):
            setattr(own, part, replaced(getattr(own, part), string))
        own.config["adapter"]["regularizers"] = {string: {string: string}}
        own.config["recipe"] = {string: string, "dataset": string, "preset": string, "objective": string}
        own.versions, own.spectra = {string: string}, {string: [1.0]}
        own.measurements = [
            Measurement(
                f"{m.name}{string}", m.layer, m.when, m.value, string, m.unit, {string: string, "seed": 0}, m.outcomes
            )
            for m in own.measurements
        ]
        options["adapters"] = ["default", string]
        cards[string] = render_card(own, **options)
    card = ModelCard(cards[text])
    assert card.content == cards[text]
    assert structure(card.text) == structure(body(cards["x"]))
    assert set(card.data.to_dict()) == set(ModelCard(cards["x"]).data.to_dict())
    assert complaints(cards[text]) == ([], [])
    cards[text].encode()
    for block in blocks(cards[text]):
        ast.parse(block)


@pytest.mark.parametrize("text", HOSTILE)
def test_cells_show_what_was_given(text):
    table = f"| a | b |\n| --- | --- |\n| {code(text)} | {inline(text)} |"
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").parse(table)
    shown = ["".join(part.content for part in t.children) for t in rendered if t.type == "inline"]
    visible = re.sub("[\u202e\u200b\ud800]", "", text)
    expected = " ".join(re.sub("[\x00\x1b\x85\u2028\n]", " ", visible).split())
    assert shown == ["a", "b", expected, expected]


def test_a_command_keeps_its_lines():
    assert fence("a \\\n    --b\n```\n").splitlines() == ["````", "a \\", "    --b", "```", "````"]


@pytest.mark.parametrize("value", [None, 3, [], [None], {"a": 1}, "9" * 30])
def test_a_config_of_another_form_still_gives_a_card(value):
    config = a_result().config
    forms = [{name: value} for name in config]
    forms += [{"adapter": {**config["adapter"], name: value}} for name in config["adapter"]]
    for form in forms:
        assert complaints(render_card(a_result(config=form, measurements=[]))) == ([], [])
