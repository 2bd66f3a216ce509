"""docs: every registered name has its row, and the rows say what the code says."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import hfproj
from hfproj.heads import HEADS
from hfproj.heads.presets import PRESETS as PAPER_HEADS
from hfproj.objectives import OBJECTIVES
from hfproj.presets.published import PUBLISHED
from hfproj.probes import PROBES
from hfproj.regularizers import REGULARIZERS

DOCS = Path(__file__).resolve().parents[1] / "docs"
REGISTRIES = {"heads": HEADS, "objectives": OBJECTIVES, "probes": PROBES, "regularizers": REGULARIZERS}


def rows(file):
    """Return the rows of a file's tables: registered name → cells by the heading of their column; none measured."""
    found, headings = {}, []
    text = (DOCS / f"{file}.md").read_text(encoding="utf-8")
    for line in re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL).splitlines():
        if not line.startswith("|"):
            headings = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not headings:
            headings = cells
        elif not set(line) <= set("|-: "):
            name = cells[0].strip("`")
            assert name not in found, f"two rows for {name}"
            assert len(cells) == len(headings), f"{name}: {len(cells)} cells in a table of {len(headings)} columns"
            found[name] = dict(zip(headings, cells))
    return found


def names(cell):
    return set(re.findall(r"`([^`]+)`", cell))


@pytest.mark.parametrize("file", REGISTRIES)
def test_every_registered_name_has_a_row(file):
    assert set(rows(file)) == set(REGISTRIES[file].list())


@pytest.mark.parametrize("file", ["heads", "probes", "regularizers"])
def test_rows_name_all_options(file):
    registry = REGISTRIES[file]
    for name, cells in rows(file).items():
        if name not in PAPER_HEADS:
            options = {n for n, p in registry.options(name).items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
            assert names(cells["options"]) == options - {"in_dim"}, name


def test_rows_of_objectives_say_what_they_need():
    for name, cells in rows("objectives").items():
        options = {"num_images": 3000} if "num_images" in OBJECTIVES.options(name) else {}
        objective = hfproj.create_objective(name, **options)
        assert names(cells["needs"]) == set(objective.needs), name
        assert cells["EMA"] == ("yes" if "target" in objective.needs else "no"), name
        published = [preset for preset in PUBLISHED.values() if preset.objective["name"] == name]
        batches = {str(preset.training["per_device_train_batch_size"]) for preset in published}
        assert names(cells["head"]) <= set(HEADS.list()), name
        assert cells["published batch"] in batches or cells["published batch"] == "–", name


def test_widths_of_paper_heads():
    for name, cells in rows("heads").items():
        if name in PAPER_HEADS:
            widths = re.split("–", re.match(r"\S+", cells["layers"]).group().strip(","))
            with torch.device("meta"):  # without memory: some are wide
                head = hfproj.create_head(name, in_dim=5, **({"out_dim": 5} if "predictor" in name else {}))
            made = [layer.linear for layer in [*head.hidden, head.last]]
            expected = [5 if width in "dk" else int(width) for width in widths]
            assert expected == [made[0].in_features, *(linear.out_features for linear in made)], name


@pytest.mark.parametrize("part", [hfproj.diagnostics, hfproj.geometry])
def test_every_public_function_has_its_place(part):
    text = (DOCS / f"{part.__name__.split('.')[-1]}.md").read_text(encoding="utf-8")
    functions = [name for name in part.__all__ if inspect.isfunction(getattr(part, name))]
    assert [name for name in functions if f"`{name}" not in text] == []


def test_the_cost_has_its_place():
    """`recipes/benchmarks/objectives.py table` writes between these."""
    text = (DOCS / "objectives.md").read_text(encoding="utf-8")
    assert re.search(r"## Cost of a step\n\n<!-- cost -->\n.+\n<!-- /cost -->\n", text, re.DOTALL)


def test_the_page_on_training_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", (DOCS / "training.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, "docs/training.md", "exec"), found := {})
    assert set(found["shares"]) == {"werank_grad_share", "koleo_grad_share"}
    assert min(found["shares"].values()) > 1e-4
