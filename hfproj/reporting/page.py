"""`hfproj.report`: what a run measured, as one HTML page that needs no network and no other file.

The page is made from `results.json` and, where that has no history, from `history.parquet` beside it. It holds no
script, its pictures are inside it, and its content security policy forbids it to load anything. Pictures of the user's
own images and texts (`write_image_pictures`, `write_text_pictures`), which the results do not hold, are taken from the
folder by their names.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfproj import filenames, plots
from hfproj.checking import checked
from hfproj.errors import HfprojError, UsageError, check_path
from hfproj.files import portable, write_atomic
from hfproj.redaction import redacted
from hfproj.reporting.context import Context
from hfproj.reporting.maps import LARGEST
from hfproj.reporting.metadata import mapping
from hfproj.reporting.pictures import pictures_of, words_of_images
from hfproj.reporting.rendering import render
from hfproj.reporting.texts import read_text_neighbours
from hfproj.results import HISTORY_FILE, Results, read_history

PAGE = "report.html"


@checked
def report(output_dir: str | os.PathLike, *, path: str | os.PathLike | None = None) -> Path:
    """Write `report.html` into the folder of a run, and return where it lies.

    One page for people: whether the representation got better, the measurements, an alarm if there was one, a picture
    of everything that was recorded, with how to read it, and how to run it again; and views, neighbours and map of the
    images or texts, where `write_image_pictures` or `write_text_pictures` has left them in the folder. It opens without
    a network.

    Args:
        output_dir: The folder that holds `results.json`.
        path: Where to write instead.

    Raises:
        UsageError: If `output_dir` is no path, there is no `results.json` in it, or the page can't be written there.
        AdapterFileError: If the results or the history are damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Results(command="python simclr.py").save(folder)
        ...     report(folder).name
        'report.html'
    """
    check_path("the folder of a run", output_dir)
    folder = Path(output_dir)
    results = Results.load(folder / "results.json")
    if not results.history and (folder / HISTORY_FILE).is_file():
        results.history = read_history(folder / HISTORY_FILE)
    path = folder / PAGE if path is None else Path(path)
    page = render_report(results, of_images=_of_images(folder), of_texts=read_text_neighbours(folder))
    try:
        write_atomic(path, page.encode())
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        what = f"Expected a path where the page can be written, got {str(path)!r} ({error.strerror})"
        raise UsageError(f"{what}; give another: path=….") from error
    return path


@checked
def render_report(
    results: Results, *, of_images: Mapping[str, bytes] | None = None, of_texts: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return the page. Without matplotlib, or where a picture cannot be drawn, a sentence says so in its place.

    `of_images` are pictures of images that the results do not hold: a name of `filenames.OF_IMAGES` → a PNG. What is
    no PNG, or too large for a page, is left out. `of_texts` are the queries of a `neighbours.json`.
    """
    results = redacted(results)
    results = replace(results, command=portable(results.command), notes=portable(results.notes))
    figures: list[dict[str, Any]] = [
        {"picture": words_of_images(name), "kind": "png", "data": base64.b64encode(data).decode(), **size}
        for name, data in (of_images or {}).items()
        if name in filenames.OF_IMAGES and (size := _png_size(data))
    ]
    not_drawn: dict[str, list[str]] = {}  # why → titles
    for picture in pictures_of(results):
        try:
            figure = picture.draw()
            data = base64.b64encode(plots.picture(figure, "svg")).decode()
        except HfprojError as error:
            not_drawn.setdefault(str(error), []).append(picture.title)
        except (ValueError, OverflowError):  # matplotlib's, of numbers such as 1e308
            not_drawn.setdefault("Its numbers are too large to be drawn.", []).append(picture.title)
        else:
            width, height = (round(100 * inches) for inches in figure.get_size_inches())
            figures.append({"picture": picture, "kind": "svg+xml", "data": data, "width": width, "height": height})
    context = Context(results)
    scalars = mapping(results.geometry.get("scalars")).items()
    config = {name: value for name, value in results.config.items() if value is not None}
    return render(
        "page.html.jinja", **vars(context), facts=context.facts, columns=_columns(figures), not_drawn=not_drawn,
        texts=of_texts,
        scalars=[(str(name).replace("_", " "), _number(value)) for name, value in scalars],
        plain={name: value for name, value in config.items() if not isinstance(value, dict | list)},
        structured={name: portable(value) for name, value in config.items() if isinstance(value, dict | list)},
    )  # fmt: skip


def _columns(figures: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the figures in two columns of about one height, each in their order: the tallest are placed first."""
    heights = [_height(figure) for figure in figures]
    columns: list[list[int]] = [[], []]
    for i in sorted(range(len(figures)), key=lambda i: -heights[i]):
        min(columns, key=lambda column: sum(heights[j] for j in column)).append(i)
    columns.sort(key=lambda column: min(column, default=len(figures)))  # the first picture of the page is at its left
    return [[figures[i] for i in sorted(column)] for column in columns]


def _height(figure: dict[str, Any]) -> float:
    """Return about how tall a picture and its caption are, in widths of a column."""
    return figure["height"] / figure["width"] + 0.045 * (len(figure["picture"].caption) / 60) + 0.15


def _of_images(folder: Path) -> dict[str, bytes]:
    """Return the pictures of images that lie in a folder; no more of a file is read than a page takes."""
    found = {}
    for name in filenames.OF_IMAGES:
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                found[name] = file.read(LARGEST + 1)
    return found


def _png_size(data: bytes) -> dict[str, int] | None:
    """Return width and height of a whole PNG of at most `LARGEST` bytes, else None."""
    whole = data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    width, height = (int.from_bytes(data[place : place + 4], "big") for place in (16, 20))
    fits = whole and len(data) <= LARGEST and 0 < width <= 8192 and 0 < height <= 8192
    return {"width": width, "height": height} if fits else None


def _number(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.4g}" if is_number else "–" if value is None else str(value)
