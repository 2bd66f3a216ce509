"""Where the methods of an adapter come from: the first reference in the docstring of each one's module."""

import re
import sys
from collections.abc import Iterator

from hfproj.objectives import OBJECTIVES
from hfproj.presets import all_presets
from hfproj.registry import Registry
from hfproj.regularizers import REGULARIZERS
from hfproj.reporting.card_markdown import inline, mapping
from hfproj.results import Results

_ARXIV = re.compile(r"\barXiv (\d{4}\.\d{4,5})\b")


def sources(results: Results) -> list[str]:
    """Return a line of Markdown for every method of which the source is known: objective, regularizers, preset.

    Example:
        >>> sources(Results(config={"adapter": {"objective": {"name": "byol"}}}))[0][:64]
        'Objective `byol`: Grill et al. 2020, "Bootstrap your own latent"'
    """
    lines = []
    for kind, registry, name in _methods(results):
        if isinstance(name, str) and name in registry.list() and (found := reference(registry, name)):
            lines.append(f"{kind} `{name}`: {found}")
    preset = mapping(results.config.get("recipe")).get("preset")
    if isinstance(preset, str) and preset in all_presets():
        lines.append(f"Settings of the preset `{preset}`: {inline(all_presets()[preset].source, 2000)}")
    return lines


def _methods(results: Results) -> Iterator[tuple[str, Registry, object]]:
    adapter, recipe = mapping(results.config.get("adapter")), mapping(results.config.get("recipe"))
    yield "Objective", OBJECTIVES, mapping(adapter.get("objective")).get("name") or recipe.get("objective")
    for name in mapping(adapter.get("regularizers")):
        yield "Regularizer", REGULARIZERS, name


def reference(registry: Registry, name: str) -> str | None:
    """Return the first reference of a registered method as Markdown, its arXiv number as a link; None without one.

    Example:
        >>> reference(OBJECTIVES, "barlow_twins")
        'Zbontar et al. 2021, [arXiv:2103.03230](https://arxiv.org/abs/2103.03230)'
    """
    text = sys.modules[registry.get(name).__module__].__doc__ or ""
    found = re.search(r"^References:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        return None
    first = " ".join(found[1].split()).split("; ")[0]
    number = _ARXIV.search(first)
    if number is None:
        return inline(first.rstrip(".")) if '"' in first else None
    link = f"[arXiv:{number[1]}](https://arxiv.org/abs/{number[1]})"
    return f"{inline(first[: number.start()])} {link}"
