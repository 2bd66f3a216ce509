"""Neighbours of the user's own texts, in words: right ones, on the page and nowhere else."""

import json

import pytest
import torch
from datasets import Dataset
from test_report import Structure, a_result

import hfproj
from hfproj import filenames
from hfproj.errors import UsageError
from hfproj.reporting import texts, write_text_pictures
from hfproj.reporting.card import write_card
from hfproj.reporting.maps import spaced

H = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
DATA = Dataset.from_dict({
    "text": [f"sentence {i}: <b>{'cats' if i % 2 else 'ships'}</b>" for i in range(20)],
    "label": [i % 2 if i else -1 for i in range(20)],
})  # fmt: skip


def queries_of(folder):
    return json.loads((folder / filenames.TEXT_NEIGHBOURS).read_text())["queries"]


def test_neighbours_are_the_nearest_others_and_marked_by_their_labels(tmp_path):
    after = H.flip(1) + 1
    paths = write_text_pictures(tmp_path, DATA, H, after)
    assert [path.name for path in paths] == [filenames.TEXT_NEIGHBOURS, filenames.MAP]
    rows = spaced(20, 8)
    for query, row in zip(queries_of(tmp_path), rows, strict=True):
        assert (query["text"], query["label"]) == (DATA[row]["text"], str(DATA[row]["label"]))
        for name, h in (("before", H), ("after", after)):
            unit = torch.nn.functional.normalize(h.double(), dim=1)
            near = [i for i in (unit @ unit[row]).argsort(descending=True).tolist() if i != row][:5]
            assert [item["text"] for item in query[name]] == [DATA[i]["text"] for i in near]
            marks = [None if i == 0 else DATA[i]["label"] == DATA[row]["label"] for i in near]  # 0 has no label
            assert [item["right"] for item in query[name]] == marks


def test_they_are_on_the_page_escaped_and_not_on_the_card(tmp_path):
    write_text_pictures(tmp_path, DATA, H, H)
    a_result().save(tmp_path)
    page = hfproj.report(tmp_path).read_text()
    assert "sentence 1: &lt;b&gt;cats&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "Nearest neighbours, in words" in Structure(page).text
    assert page.count("✓</span>") > 4
    assert page.count("✗</span>") > 4
    assert "cats" not in write_card(a_result(), tmp_path).read_text()


@pytest.mark.parametrize("content", [
    b"no JSON", b"{}", b'{"queries": [1]}', b'{"queries": [{"text": "a", "before": [], "after": [{"text": 3}]}]}',
    b'{"queries": [{"text": "%s", "before": [], "after": []}]}' % (b"a" * 500),
])  # fmt: skip
def test_what_is_not_of_this_form_is_left_out(content, tmp_path):
    a_result().save(tmp_path)
    (tmp_path / filenames.TEXT_NEIGHBOURS).write_bytes(content)
    assert "in words" not in hfproj.report(tmp_path).read_text()


def test_long_texts_are_cut_and_labels_may_be_missing(tmp_path):
    data = Dataset.from_dict({"sentence": ["word " * 100, "b", "c"]})
    write_text_pictures(tmp_path, data, H[:3], H[:3], text_column="sentence")
    first = queries_of(tmp_path)[0]
    assert (len(first["text"]), first["text"][-1], first["label"]) == (texts._LETTERS, "…", None)
    assert [item["right"] for item in first["before"]] == [None, None]


def test_rows_have_to_pair_and_items_to_hold_texts(tmp_path):
    with pytest.raises(UsageError, match="20 and 3 rows of 20 texts"):
        write_text_pictures(tmp_path, DATA, H, H[:3])
    with pytest.raises(UsageError, match="column 'sentence' of item 1, got NoneType; name the column"):
        write_text_pictures(tmp_path, DATA, H, H, text_column="sentence")
    assert list(tmp_path.iterdir()) == []
