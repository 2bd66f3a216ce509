"""Fills the templates: in HTML every value is escaped by jinja2, in Markdown by `markdown.escaped`."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hfproj.files import portable
from hfproj.redaction import redacted
from hfproj.reporting import markdown
from hfproj.results import Results, words

_TEMPLATES = Path(__file__).parent / "templates"


def as_saved(results: Results) -> Results:
    """Return results as `Results.save` writes them: without secrets and paths of this machine."""
    results = redacted(results)
    return replace(results, **{name: portable(getattr(results, name)) for name in ("config", "command", "notes")})


def render(name: str, **values: Any) -> str:
    """Return a template filled with values; none of them can add structure to the page or the card."""
    return _environment(name.endswith(".md.jinja")).get_template(name).render(words=words, **values)


@cache
def _environment(of_markdown: bool) -> Environment:
    blanks: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    made = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, **blanks)
    made.finalize = markdown.escaped if of_markdown else None
    made.filters["json"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    if of_markdown:
        made.filters |= {
            "code": markdown.Code,
            "fence": lambda text, language: Markup(markdown.fence(text, language)),
            "long": lambda text: Markup(markdown.inline(text, 2000)),
            "whole": lambda text: Markup(markdown.inline(text).replace(" ", "\u00a0")),  # no break within a number
            "python": lambda text: Markup(json.dumps(markdown.one_line(text), ensure_ascii=False)),
        }
    return made
