"""Settings of the documentation's generator: `python -m sphinx -W -c docs . site` from the repository's root.

The source is the whole repository, so that the pages, the README and the tables that recipes wrote keep their places
and their links work here and on GitHub alike.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hfproj  # noqa: E402

project, author, copyright = "hfproj", "the hfproj authors", "the hfproj authors, Apache-2.0"
version = release = hfproj.__version__
root_doc = "docs/index"
extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax",
    "sphinx_copybutton",
]  # fmt: skip
include_patterns = [
    "docs/**", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "recipes/benchmarks/results/*.md",
    "recipes/results/reproduce/*.md",
    "model_cards/*/README.md", "hfproj/assets/*/README.md",
]  # fmt: skip
exclude_patterns = ["docs/_*"]
suppress_warnings = ["myst.header", "ref.python"]  # tables begin at any level; fields of two classes share names
nb_execution_mode = "off"  # notebooks hold their outputs; the tests run them again
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
myst_all_links_external = False

html_theme, html_title = "furo", f"hfproj {release}"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_extra_path = ["_site"]  # index.html, which leads to docs/index.html
html_copy_source = False

default_role = "code"  # docstrings are written in plain text with `names`
autodoc_typehints = "none"  # shapes and types stand in the signature
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype, napoleon_use_ivar = False, True  # fields of named tuples would be there twice


def setup(app):
    """Leave out what named tuples say of their fields ("Alias for field number 0"): their docstrings describe them."""
    app.connect(
        "autodoc-skip-member",
        lambda app, what, name, thing, skip, options: (
            (getattr(thing, "__doc__", None) or "").startswith("Alias for field") or None
        ),
    )
