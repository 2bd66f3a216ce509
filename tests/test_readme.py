"""README: short, its figures are those of a committed results.json, its examples name what exists."""

import re
from pathlib import Path

import hfproj
from hfproj import Results

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_its_table_is_that_of_the_results():
    found = re.search(r"<!-- table: (\S+) -->\n(.*?)\n?<!-- end of table -->", README, re.DOTALL)
    assert found.group(2).strip() == Results.load(ROOT / found.group(1)).to_markdown().strip()


def test_every_public_name_in_it_exists():
    for name in set(re.findall(r"hfproj\.([A-Za-z_]+)", README)):
        assert hasattr(hfproj, name), name


def test_every_public_name_can_be_imported():
    for name in hfproj.__all__:
        assert getattr(hfproj, name).__doc__


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
