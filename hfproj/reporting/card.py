"""The model card of an adapter, generated from its `results.json` and from nothing else.

Its text is `templates/card.md.jinja`. Whatever the results do not say the card does not say either, and its section of
limits names what was not measured.
"""

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from hfproj import filenames
from hfproj.checking import checked
from hfproj.errors import HfprojError, UsageError, check_path, check_type
from hfproj.files import write_atomic
from hfproj.plots import plot_history, plot_spectrum
from hfproj.reporting.context import Context
from hfproj.reporting.metadata import check_license, front_matter, write_eval_results
from hfproj.reporting.pictures import PROBE_VIEWS
from hfproj.reporting.rendering import as_saved, render
from hfproj.results import Results

__all__ = ["render_card", "write_card", "write_eval_results"]

_WATCHED = ("loss", "rankme", "positive_cosine", "std")  # the first three that a run has
_SPECTRA = 40  # of a picture
_PICTURE_WIDTH = 8.0  # inches: three panels in a row, readable at the width of a card


@checked
def render_card(
    results: Results, *, repo_id: str | None = None, license: str | None = None, files: Collection[str] = (),
    adapters: Sequence[str] = (), adapter: str = "default",
) -> str:  # fmt: skip
    """Return the README.md of an adapter: YAML front matter and the text.

    Beside what `evaluate` and the recipes write, these entries of ``results.config`` are read: "license", "dataset"
    (what it was trained on: a name or a list of them), "modality" ("image" or "text"), "language" (codes, for texts),
    "views" (options of the augmentation).

    Args:
        results: What was measured, best before and after training.
        repo_id: Where the adapter is going to lie on the Hub, for the title and the loading example.
        license: The licence of the adapter, as the Hub writes it ("apache-2.0"). None: that of ``results.config``; a
            card without any says so, for the choice is the author's.
        files: Names of the files that lie beside the card; those it knows are shown or explained.
        adapters: Names of all adapters, where there are several.
        adapter: Name of the one that the card is of.

    Raises:
        UsageError: If the licence is not one of the Hub's identifiers.

    Example:
        >>> from hfproj.results import Measurement
        >>> card = render_card(Results(measurements=[Measurement("rankme", "h", "after", 18.7)]))
        >>> card.startswith("---") and "library_name: peft" in card and "import hfproj" in card
        True
    """
    check_license(license)
    results = as_saved(results)
    results.config = {**results.config, **({"license": license} if license else {})}
    if filenames.PREPROCESSING in files:
        results.config.setdefault("modality", "image")
    others = [name for name in adapters if name != adapter]
    if adapter not in adapters and others:  # without a "default" the card in the root is that of another one
        adapter = others.pop(0)
    name = repo_id.split("/")[-1] if repo_id else ""
    context = Context(results)
    context.title = name or context.title
    front, repo = front_matter(results, name or "projection-head"), repo_id or "path/or/repository"
    more = {"front_matter": front, "repo": repo, "adapter": adapter, "others": others, "files": files}
    text = render("card.md.jinja", **vars(context), **more, filenames=filenames)
    return text.rstrip("\n") + "\n"


@checked
def write_card(
    results: Results, folder: str | os.PathLike, *, repo_id: str | None = None, license: str | None = None,
    adapters: Sequence[str] = (), adapter: str = "default", keep_results: bool = True,
) -> Path:  # fmt: skip
    """Write `results.json`, pictures (where matplotlib is installed) and `README.md` into the adapter's folder.

    A picture that lies there already is replaced where it can be drawn, and shown in any case. The licence goes into
    the results, so that the card can be made of them again. Without `keep_results` no `results.json` is written;
    `repo_id`, `license`, `adapters` and `adapter` are those of `render_card`.

    Raises:
        UsageError: If `results` are no `Results`, there is no folder, or the licence is none of the Hub's identifiers.
    """
    check_type("results", results, Results, "take them from hfproj.evaluate, or read a file by Results.load")
    check_path("the adapter's folder", folder)
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"There is no folder {str(folder)!r}; save the adapter there first.")
    check_license(license)
    results = as_saved(results)
    if license:
        results = replace(results, config={**results.config, "license": license})
    if keep_results:
        results.save(folder / filenames.RESULTS)
    with suppress(
        HfprojError, ValueError, OverflowError
    ):  # no matplotlib, or nothing that can be drawn: the card is complete without pictures
        if results.spectra:
            plot_spectrum(
                dict(islice(results.spectra.items(), _SPECTRA)), folder / filenames.PICTURE, width=_PICTURE_WIDTH
            )
    names = {str(name) for row in results.history for name in row}
    watched = [metric for metric in _WATCHED if names & {metric, f"{metric}_h", f"{metric}_z"}][:3]
    with suppress(HfprojError, ValueError, OverflowError):
        if watched:
            path = folder / filenames.TRAINING_PICTURE
            plot_history(results.history, path, metrics=watched, of=PROBE_VIEWS, width=_PICTURE_WIDTH)
    files = [file.name for file in folder.iterdir() if file.is_file()]
    text = render_card(results, repo_id=repo_id, files=files, adapters=adapters, adapter=adapter)
    write_atomic(path := folder / filenames.CARD, text.encode())
    return path
