"""What docs/autopsy.md says of adapters is what their files say."""

import json
from pathlib import Path

from hfproj.results.inside import Autopsy

ROOT = Path(__file__).resolve().parents[2]


def test_each_sentence_is_that_of_its_file():
    text = (ROOT / "docs" / "autopsy.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "recipes" / "results" / "autopsy").glob("*.json"))
    assert files
    for file in files:
        found = Autopsy.from_dict(json.loads(file.read_text(encoding="utf-8")))
        cells = {row[0]: row for row in found.cells()[1:]}
        linear, knn = (cells[name][column] for name, column in (("z", 6), ("z", 8)))
        said = [cut.sentence.removeprefix("By linear probe: ").removeprefix("By 20-NN: ") for cut in found.cuts]
        row = f"| {file.stem} | {said[0]} | {said[1]} | {linear} | {knn} |"
        assert row in text, row
        _, h, *inner, z = found.layers
        assert all(4.5 <= layer.rankme / h.rankme < 9.5 for layer in inner)  # "five to nine times that of h"
        assert all(score.over_h.high < 0 for score in z.scores.values())  # "worse than h by both probes"
        assert not any(cut.keep.startswith(("head", "z")) for cut in found.cuts)  # "no layer … is confirmed"
        assert [cut.probe for cut in found.cuts if cut.keep != "h"] == ["knn"] * (file.stem == "vicreg")
