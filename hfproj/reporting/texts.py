"""Nearest neighbours of the user's own texts in words, and a map of their h, before and after training.

They show texts that may be private: they are written beside the results, and neither pushed nor named on the card.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hfproj import distributed, filenames
from hfproj.checking import checked
from hfproj.data.indexing import as_item
from hfproj.errors import HfprojError, UsageError, check_path
from hfproj.files import write_atomic, write_json
from hfproj.reporting.maps import Labels, check_pairs, draw_map, nearest, small_png
from hfproj.strict_json import read_json
from hfproj.typing import Data

_QUERIES = 8
_LETTERS = 240  # of a text that is shown


@checked
def write_text_pictures(
    folder: str | os.PathLike, dataset: Data, before: Float[Tensor, "rows dim"], after: Float[Tensor, "_ _"], *,
    text_column: str = "text", label_column: str | None = "label",
) -> list[Path]:  # fmt: skip
    """Write `neighbours.json` and `map.png` into the folder of a run, where `hfproj.report` finds them.

    The first says in words what a gallery shows of images: eight texts, evenly spaced over the data set, and under each
    the five nearest by cosine of h before training and after it, marked right or wrong where there are labels. On
    several processes the first one writes. Those of a run before are removed; without matplotlib there is no map.

    Args:
        folder: Where `results.json` lies.
        dataset: The held-out texts.
        before: h of all of them before training, in their order (`hfproj.extract_features`).
        after: h of all of them after it.
        text_column: Column of the texts.
        label_column: Column of the labels, where there is one, to mark neighbours and points; None: without labels.

    Returns:
        What was written.

    Raises:
        UsageError: If rows of h and texts do not pair, there are fewer than two, or an item that is shown has no
            text.

    Example:
        >>> import tempfile, torch
        >>> from datasets import Dataset
        >>> texts = Dataset.from_dict({"text": ["a cat", "a dog", "a ship"]})
        >>> h = torch.eye(3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in write_text_pictures(folder, texts, h, h)]
        ['neighbours.json', 'map.png']
    """
    check_path("the folder of a run", folder)
    check_pairs(dataset, before, after, what="texts")
    if distributed.rank() != 0:
        return []
    folder, labels, h = Path(folder), Labels(dataset, label_column), {"before": before, "after": after}
    queries = _queries(dataset, labels, h, text_column)
    for name in filenames.OF_OWN_DATA:  # of a run before, which would be taken for this one's
        (folder / name).unlink(missing_ok=True)
    write_json(folder / filenames.TEXT_NEIGHBOURS, {"queries": queries})
    written = [folder / filenames.TEXT_NEIGHBOURS]
    with suppress(HfprojError):  # no matplotlib
        write_atomic(folder / filenames.MAP, small_png(draw_map(labels, h)))
        written.append(folder / filenames.MAP)
    return written


def read_text_neighbours(folder: Path) -> list[dict[str, Any]]:
    """Return the queries of a folder's `neighbours.json`; none if there is no such file, or another one of its name."""
    file = folder / filenames.TEXT_NEIGHBOURS
    if not file.is_file():
        return []
    with suppress(HfprojError):
        queries = read_json(file, str(folder)).get("queries")
        if isinstance(queries, list) and all(map(_is_query, queries)):
            return queries[:_QUERIES]
    return []


def _queries(dataset: Any, labels: Labels, h: Mapping[str, Tensor], column: str) -> list[dict[str, Any]]:
    """Return texts, each with its label if it has one, and those nearest to it under each name of `h`."""
    rows, found = nearest(h, _QUERIES)
    queries = []
    for i, row in enumerate(rows):
        query: dict[str, Any] = {
            "text": _text(dataset, row, column),
            "label": None if (names := labels.names([row])) is None else names[0],
        }
        for name, near in found.items():
            marks = labels.right(row, near[i])
            query[name] = [{"text": _text(dataset, n, column), "right": mark} for n, mark in zip(near[i], marks)]
        queries.append(query)
    return queries


def _is_query(query: Any) -> bool:
    """Return whether this is a query as `write_text_pictures` writes it, so that the page can show it."""

    def is_text(item: Any) -> bool:
        return isinstance(item, Mapping) and isinstance(item.get("text"), str) and len(item["text"]) <= _LETTERS

    near = [query.get("before"), query.get("after")] if is_text(query) else [None]
    return all(isinstance(items, list) and len(items) <= _QUERIES and all(map(is_text, items)) for items in near)


def _text(dataset: Any, row: int, column: str) -> str:
    text = as_item(dataset[int(row)]).get(column)
    if not isinstance(text, str):
        what = f"Expected a text in column {column!r} of item {row}, got {type(text).__name__}"
        raise UsageError(f"{what}; name the column of the texts: text_column=….")
    text = " ".join(text.split())
    if not text:
        raise UsageError(f"Expected a text in column {column!r} of item {row}, got an empty one; leave such items out.")
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
