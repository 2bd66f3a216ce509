"""`reproduce`: a study by its name, from its runs to the page with the verdicts."""

import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfproj import distributed
from hfproj.checking import checked
from hfproj.errors import UsageError, check_choice, unknown
from hfproj.files import command_line, installed_versions, write_atomic, write_json
from hfproj.reproduction import document
from hfproj.reproduction.measures import check_measure
from hfproj.reproduction.registry import get_study
from hfproj.reproduction.running import Job, spread, work
from hfproj.reproduction.sources import places_of
from hfproj.reproduction.study import SCALES, Study, check_seeds
from hfproj.typing import OneOf

LOG = logging.getLogger("hfproj.reproduction")
CONTROLS = ("turned", "shuffled")


@dataclass(frozen=True)
class Reproduction:
    """What came of a study.

    Attributes:
        study: The study.
        scale: Name of its scale.
        runs: One record for each row, data and seed that is finished.
        verdicts: One for each claim: "claim", "source", "verdict" and the numbers of its "tests".
        text: The page, as Markdown.
        path: Where it was written.
    """

    study: Study
    scale: str
    runs: list[dict[str, Any]]
    verdicts: list[dict[str, Any]]
    text: str
    path: Path

    def __str__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:  # what a notebook shows
        return self.text


@checked
def reproduce(
    name: str, *, scale: OneOf["paper", "mini", "trial"] = "mini", output_dir: str | os.PathLike = "out/reproduce",
    data: str | os.PathLike | Mapping[str, str] | None = None, rows: Sequence[str] = (),
    seeds: Sequence[int] | None = None, workers: int = 1, control: OneOf["turned", "shuffled"] | None = None,
    run: bool = True,
) -> Reproduction:  # fmt: skip
    """Make a table or a figure of a paper: train and measure its rows, set them beside the paper's, judge its claims.

    It goes on where it was stopped; runs that other studies of the paper made are taken over. The verdicts follow rules
    that are fixed in :mod:`hfproj.reproduction.judging`.

    Args:
        name: Of the study, see `hfproj.reproduction.list_studies`.
        scale: "paper": as published, which needs GPUs (the study says how long a row takes). "mini": reduced to two CPU
            cores and at most two hours; the page says how. "trial": two steps on random images, in seconds, to see that
            everything runs.
        output_dir: Where runs, page and pictures go.
        data: A folder with the data sets as subfolders (``cifar10``, ``cifar100``), or name → folder or Hub id.
            Default: the Hub.
        rows: Names of the rows to run; none: all.
        seeds: In place of the scale's.
        workers: Processes that share the rows, each with its share of the cores and one of the GPUs.
        control: Negative control: "turned" judges every claim turned round (what holds, must fail), "shuffled" runs
            again with shuffled labels, of which nothing can be said.
        run: False: only write the page of what is finished.

    Raises:
        UsageError: If there is no study, row or scale of this name, or data can't be loaded.
    """
    study = get_study(name)
    check_choice("scale", scale, SCALES)
    if control is not None:
        check_choice("control", control, CONTROLS)
    for row in rows:
        if row not in (known := [r.name for r in study.rows]):
            raise unknown(f"row of {name}:", row, known)
    for column in study.every_column:
        check_measure(column)
    if seeds is not None:
        check_seeds(seeds)
    if workers < 1:
        raise UsageError(f"Expected workers to be at least 1, got {workers}.")
    if control == "turned":
        study = replace(study, claims=tuple(claim.turned() for claim in study.claims))
    job = Job(
        study, scale, Path(output_dir), places_of(data), tuple(rows), None if seeds is None else tuple(seeds),
        shuffled=control == "shuffled",
    )  # fmt: skip
    _make(job.folder)
    if run:
        _run(job, workers)
    _tell_versions(job)
    return _write(job, control)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"Expected output_dir to be a folder that can be written to, got {str(folder)!r} ({error.strerror}); name "
            "another place."
        ) from error


def _tell_versions(job: Job) -> None:
    """Warn of runs of another version of this library, whose defaults may have been others."""
    now = installed_versions()["hfproj"]
    found = {run["versions"].get("hfproj") for run in job.records() if "versions" in run} - {now}
    if found and distributed.rank() == 0:
        LOG.warning(
            f"Some runs in {job.folder} are of hfproj {', '.join(sorted(map(str, found)))}, this is {now}: what they "
            "left to defaults may have been another then. Another output_dir begins anew."
        )


def _run(job: Job, workers: int) -> None:
    missing = len(job.missing())
    if not missing:
        for setting in {s.data: s for s in job.settings()}.values() if job.places else ():
            job.load(setting)  # are the finished runs of these data?
        return
    LOG.warning(
        f"{job.study.name} at scale {job.scale}: {missing} runs, about "
        f"{max(1, round(job.seconds_left() / 60))} minutes of {job.at.machine or 'a CPU core'}."
    )
    if workers == 1 or "HFPROJ_WORKER" in os.environ:
        number, of = map(int, os.environ.get("HFPROJ_WORKER", "0/1").split("/"))
        work(job, only=(number, of))
        if of > 1:
            sys.exit(0)  # the process that started this one writes the page
    else:
        spread(_command(job), workers)


def _command(job: Job) -> list[str]:
    """Return the command of a worker."""
    words = ["-m", "hfproj", "run", "reproduce", job.study.name, "--scale", job.scale, "--output_dir", str(job.folder)]
    words += [word for name, place in job.places.items() for word in ("--data", f"{name}={place}")]
    words += [word for row in job.rows for word in ("--rows", row)]
    words += ["--seeds", *map(str, job.seeds)] if job.seeds else []
    return words + (["--control", "shuffled"] if job.shuffled else [])


def _write(job: Job, control: str | None) -> Reproduction:
    runs, study = job.records(), job.study
    name = f"{study.name}-{job.scale}{f'-{control}' if control else ''}"
    path = job.folder / f"{name}.md"
    if distributed.rank() == 0:
        job.gather()
        pictures = document.draw(study, runs, job.folder / name) if runs else []
        text = document.page(study, job.scale, job.at, runs, pictures)
        write_atomic(path, text.encode())
        found = document.verdicts(study, runs)
        content = {"study": study.name, "scale": job.scale, "control": control, "verdicts": found,
                   "command": command_line(), "versions": installed_versions()}  # fmt: skip
        write_json(path.with_suffix(".json"), content)
    else:
        text, found = document.page(study, job.scale, job.at, runs), document.verdicts(study, runs)
    return Reproduction(study, job.scale, runs, found, text, path)
