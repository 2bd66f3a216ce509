"""The site: built without a warning, its links well-formed, its search and its pages as a browser has them.

What leads nowhere inside of it, a page, a file or a heading, is a warning of the generator.
"""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from chromium import BROWSER, Page
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("recipes/benchmarks/results/*.md")),
    *sorted(ROOT.glob("model_cards/*/README.md")),
    *sorted(ROOT.glob("hfproj/assets/*/README.md")),
]
SEARCHES = {  # words → pages that must be among what is found
    "EMA": {"docs/glossary", "docs/objectives"},
    "kNN": {"docs/glossary", "docs/probes", "docs/reference/probes"},
    "k-NN": {"docs/glossary", "docs/probes", "docs/reference/probes"},
    "DINOv2": {"docs/glossary", "docs/backbones"},
    "own images": {"docs/images", "docs/tutorial", "docs/command"},
}
WIDE = ("docs/index", "docs/tutorial", "docs/objectives", "docs/reference/probes", "docs/notebooks/adapt_and_look",
        "recipes/benchmarks/results/lora_study", "README")  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("furo", reason="hfproj[docs] is not installed")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", "-d", place / "trees"]
    done = subprocess.run([*command, ".", place / "html"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place / "html"


def links(page):
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        for inner in token.children or ():
            if inner.type in ("link_open", "image"):
                yield inner.attrs["src" if inner.type == "image" else "href"]


def test_links_to_elsewhere_are_well_formed():
    outside = [(page.name, link) for page in PAGES for link in links(page) if re.match(r"\w+:", link)]
    wrong = [
        (page, link)
        for page, link in outside
        if urlsplit(link).scheme != "https" or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", urlsplit(link).netloc)
    ]
    assert wrong == []


@pytest.mark.long
def test_it_is_built_without_a_warning(site):
    assert (site / "index.html").is_file()
    assert (site / "docs" / "reference" / "probes.html").is_file()


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
@pytest.mark.parametrize("words", SEARCHES)
def test_its_search_finds(site, words):
    with Page() as page:
        page.open(site / "search.html", query=f"q={words.replace(' ', '+')}")
        found = page.evaluate(
            "new Promise(done => { const wait = setInterval(() => {"
            "if (/finished|did not match/.test(document.querySelector('#search-results').textContent)) {"
            "clearInterval(wait); done([...document.querySelectorAll('#search-results li a')]"
            ".map(a => a.getAttribute('href')))}}, 100)})"
        )
    pages = {address.partition(".html")[0] for address in found}
    assert SEARCHES[words] <= pages, pages


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(site, width):
    with Page(width, 800) as page:
        for name in WIDE:
            page.open(site / f"{name}.html")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            broken = "[...document.images].filter(image => image.complete && !image.naturalWidth).map(i => i.src)"
            assert page.evaluate(broken) == [], name
