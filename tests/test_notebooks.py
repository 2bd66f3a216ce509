"""The notebooks: committed with outputs that hold no error, no warning and nothing of a machine; and they run."""

import ast
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
FEW = {  # pattern → what makes it quick; each is in one notebook at least
    r"num_train_epochs=\d+": "max_steps=2",
    r'split="train"\)': 'split="train", limit=160)',
    r'split="test"\)': 'split="test", limit=160)',
    r"range\((400|300)\)": "range(40)",
}


def cells(book):
    return [cell for cell in json.loads(book.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def written(cell):
    """Return the texts that the outputs of a cell show."""
    for output in cell["outputs"]:
        yield "".join(output.get("text", ""))
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield "".join(data)


def test_there_are_two():
    assert [book.stem for book in BOOKS] == ["adapt_and_look", "what_does_the_head_do"]


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_what_is_committed(book):
    assert book.stat().st_size < 400_000
    found = cells(book)
    assert [cell["execution_count"] for cell in found] == [*range(1, len(found) + 1)]  # from top to bottom, once
    for cell in found:
        ast.parse(source(cell))
        assert cell["outputs"] or cell is found[0], source(cell)
        kinds = {(output["output_type"], output.get("name")) for output in cell["outputs"]}
        assert kinds <= {("stream", "stdout"), ("display_data", None), ("execute_result", None)}, kinds
        for text in written(cell):
            assert not re.search(r"[Ww]arning|Traceback|\d+it/s|\x1b", text), text
            assert not re.search(r"(^|[\s'\"])(/[a-z]+/|[A-Z]:\\)", text), text
    images = [kind for cell in found for output in cell["outputs"] for kind in output.get("data", {})]
    assert images.count("image/png") >= 3


def test_each_is_linked_from_the_index_and_the_readme():
    for page in ("docs/index.md", "README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [book.name for book in BOOKS if f"notebooks/{book.name})" not in text] == [], page


@pytest.mark.long
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_it_runs(book, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="hfproj[docs] is not installed")
    nbclient = pytest.importorskip("nbclient", reason="hfproj[docs] is not installed")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    found = nbformat.read(book, as_version=4)
    for cell in found.cells:
        for pattern, quick in FEW.items():
            if cell.cell_type == "code":
                cell.source = re.sub(pattern, quick, cell.source)
    client = nbclient.NotebookClient(found, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises with the cell that failed
    assert (tmp_path / "out").is_dir()


def test_what_makes_them_quick_is_there():
    code = "\n".join(source(cell) for book in BOOKS for cell in cells(book))
    assert [pattern for pattern in FEW if not re.search(pattern, code)] == []
