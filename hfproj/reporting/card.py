"""The model card of an adapter, generated from its `results.json` and from nothing else.

    results.json ──► front matter (what the Hub indexes), the text, pictures, and `.eval_results` on request

Whatever the results do not say the card does not say either, and its last section names what was not measured.
"""

import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hfproj.errors import HfprojError, UsageError
from hfproj.filenames import CARD, PICTURE, PREPROCESSING, RESULTS, TRAINING_PICTURE
from hfproj.files import portable, write_atomic
from hfproj.plots import plot_history, plot_spectrum
from hfproj.reporting import card_text
from hfproj.reporting.card_markdown import code, fence, inline, mapping
from hfproj.reporting.card_metadata import check_license, front_matter, write_eval_results
from hfproj.reporting.card_numbers import layer_tables, protocol_lines, tables
from hfproj.reporting.card_sources import sources
from hfproj.results import LAYERS, Results
from hfproj.results.verdict import Verdict, verdicts

__all__ = ["protocols", "render_card", "write_card", "write_eval_results"]


_WATCHED = ("loss", "rankme", "positive_cosine", "std")  # the first three that a run has
_READING = "All of it in eval mode. RankMe does not centre; spectra are of unit rows, centred."
_PICTURE_WIDTH = 8.0  # inches: three panels in a row, readable at the width of a card


def render_card(
    results: Results,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    files: Collection[str] = (),
    adapters: Sequence[str] = (),
    adapter: str = "default",
) -> str:
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
        UsageError: the licence is no identifier of one.

    Example:
        >>> from hfproj.results import Measurement
        >>> card = render_card(Results(measurements=[Measurement("rankme", "h", "after", 18.7)]))
        >>> card.startswith("---") and "library_name: peft" in card and "import hfproj" in card
        True
    """
    check_license(license)
    plain = {name: portable(getattr(results, name)) for name in ("config", "command", "notes")}
    results = replace(results, **plain)  # results that were never saved may still hold paths of this machine
    results.config = {**results.config, **({"license": license} if license else {})}
    if PREPROCESSING in files:
        results.config.setdefault("modality", "image")
    name = repo_id.split("/")[-1] if repo_id else "projection-head"
    judged = [verdict for layer in LAYERS for verdict in verdicts(results, layer)]
    parts = [
        f"---\n{front_matter(results, name)}\n---",
        f"# {card_text.title(results, repo_id)}",
        card_text.summary(results),
        *card_text.verdict_lines(results, judged),
        _measured(results, judged, files),
        "## How to use it",
        card_text.loading(results, repo_id, files, adapters, adapter),
        _training(results, files),
        _section("Protocol", _list([*protocol_lines(results), *([_READING] if results.measurements else [])])),
        _section("Limits", _list(card_text.limits(results, judged))),
        _section("Notes", _list(inline(note, 2000) for note in results.notes)),
        _section("Sources", _list(sources(results))),
        "## Versions",
        ", ".join(f"{inline(package)} {inline(version)}" for package, version in results.versions.items()),
        f"This card was generated from `{RESULTS}`." * bool(results.measurements),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_card(
    results: Results,
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    adapters: Sequence[str] = (),
    adapter: str = "default",
    keep_results: bool = True,
) -> Path:
    """Write `results.json`, pictures (where matplotlib is installed) and `README.md` into the adapter's folder.

    A picture that lies there already is replaced where it can be drawn, and shown in any case. The licence goes into
    the results, so that the card can be made of them again.

    Args:
        results: As in `render_card`.
        folder: Where the adapter lies.
        repo_id: As in `render_card`.
        license: As in `render_card`.
        adapters: As in `render_card`.
        adapter: As in `render_card`.
        keep_results: Write `results.json` too; without it the folder has the card alone.

    Raises:
        UsageError: the folder does not exist, or the licence is no identifier of one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"There is no folder {str(folder)!r}; save the adapter there first.")
    check_license(license)
    if license:
        results = replace(results, config={**results.config, "license": license})
    if keep_results:
        results.save(folder / RESULTS)
    with suppress(HfprojError):  # no matplotlib, or nothing that can be drawn: the card is complete without pictures
        if results.spectra:
            plot_spectrum(results.spectra, folder / PICTURE, width=_PICTURE_WIDTH)
    with suppress(HfprojError):
        if watched := _watched(results):
            plot_history(results.history, folder / TRAINING_PICTURE, metrics=watched, width=_PICTURE_WIDTH)
    path = folder / CARD
    files = [file.name for file in folder.iterdir() if file.is_file()]
    text = render_card(results, repo_id=repo_id, files=files, adapters=adapters, adapter=adapter)
    write_atomic(path, text.encode())
    return path


def protocols(results: Results) -> list[str]:
    """Return a line of text per protocol under which something was measured."""
    lines: dict[str, None] = {}
    for m in results.measurements:
        settings = ", ".join(f"{key} = {value}" for key, value in m.settings.items())
        lines[f"{m.label}{f' on {m.dataset}' if m.dataset else ''}: {settings or 'no settings'}"] = None
    return [*lines, "All in eval mode. RankMe does not centre; spectra are of L2-normalised, centred features."]


def _measured(results: Results, judged: Sequence[Verdict], files: Collection[str]) -> str:
    if not results.measurements:
        return "## Results\n\nNothing was measured."
    datasets = list(dict.fromkeys(m.dataset for m in results.measurements if m.dataset))
    on = f"Measured on held-out data of {code(datasets[0])}. " if len(datasets) == 1 else ""
    several = f"Mean ± standard deviation over {len(results.seeds)} seeds, without ± where all agree. "
    spread = several if len(results.seeds) > 1 else ""
    before = any(m.when == "before" for m in results.measurements)
    continued = mapping(results.config.get("recipe")).get("continue_from")
    origin = (
        f"h and z are those of {code(continued)}" if continued else "h is the bare backbone's, z an untrained head's"
    )
    start = f"Before and after training: before it {origin}."
    parts = ["## Results", (on + spread + start * before).strip(), tables(results, judged)]
    if PICTURE in files:
        parts.append(_figure(PICTURE, *_spectrum_in_words(results)))
    if layers := layer_tables(results):
        parts += ["### Layer by layer", "Before → after training." * before, layers]
    return "\n\n".join(part for part in parts if part)


def _spectrum_in_words(results: Results) -> tuple[str, str]:
    alt = (
        "Eigenvalues of the covariance of h and z against their rank, before and after training, on a logarithmic scale"
    )
    seed = f" Seed {inline(results.seeds[0])}." if len(results.seeds) > 1 else ""
    return alt, (
        "Spectrum of the covariance. The flatter a curve, the more evenly the features fill their dimensions; one that "
        f"falls off the lower edge early has nothing in those that remain (dimensional collapse).{seed}"
    )


def _training(results: Results, files: Collection[str]) -> str:
    parts = []
    if results.command:
        parts.append(fence(results.command, "bash"))
    if results.seeds:
        parts.append(f"Run with seed{'s' * (len(results.seeds) > 1)} {', '.join(map(inline, results.seeds))}.")
    parts.append(card_text.configuration(results))
    if TRAINING_PICTURE in files:
        alt = "Loss and diagnostics of h and z against the training step"
        seeds = " The band is one standard deviation over seeds." if len(results.seeds) > 1 else ""
        caption = f"While it trained, on augmented views: the numbers are not those of the tables.{seeds}"
        parts.append(_figure(TRAINING_PICTURE, alt, caption))
    return _section("Training", "\n\n".join(part for part in parts if part))


def _watched(results: Results) -> list[str]:
    names = {str(name) for row in results.history for name in row}
    return [m for m in _WATCHED if names & {m, f"{m}_h", f"{m}_z"}][:3]


def _figure(file: str, alt: str, caption: str) -> str:
    return f"![{alt}]({file})\n\n*{caption}*"


def _section(heading: str, content: str) -> str:
    return f"## {heading}\n\n{content}" if content else ""


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
