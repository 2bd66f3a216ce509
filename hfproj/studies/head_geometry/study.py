"""Where the experiments keep what is finished, and where their results go."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from hfproj.data import load_image_dataset
from hfproj.errors import UsageError
from hfproj.files import installed_versions, measured_once, write_json

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Study:
    """The experiments on one data set.

    Args:
        dataset: What `hfproj.load_image_dataset` takes.
        runs: Folder of adapters, features and finished measurements. What is there is not made again.
        out: Folder of results.json and of the figures.
        seeds: The seeds that are run.
    """

    dataset: str
    runs: Path
    out: Path
    seeds: Sequence[int] = SEEDS

    @property
    def folder(self) -> Path:
        """Where the runs on this data set are kept."""
        return self.runs / Path(self.dataset).name

    @property
    def flip_probability(self) -> float:
        """Of the views: a mirrored digit is no digit."""
        return 0.0 if self.dataset == "digits" else 0.5

    def images(self, split: str, limit: int | None = None) -> datasets.Dataset:
        """Return the images of a split, a random subset of at most `limit`."""
        return load_image_dataset(self.dataset, split=split, limit=limit)

    def kept(self, what: str, which: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the measurement `what` of the run `which`, made now or in an earlier call."""
        words = [str(value).replace(" ", "_") for value in which.values()]
        file = self.folder / what / f"{'-'.join(words)}.json"
        if not file.is_file():
            print(what, *which.values(), flush=True)
        return measured_once(file, lambda: {**which, **measure()})

    def recorded(self, what: str) -> dict[str, Any]:
        """Return what results.json has of one experiment.

        Raises:
            UsageError: If it has nothing.
        """
        file, name = self.out / "results.json", Path(self.dataset).name
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if what not in found.get(name, {}):
            raise UsageError(f"Expected {file} to hold {what!r} of {name}, got nothing; run `{what}` first.")
        return found[name][what]

    def save(self, what: str, content: Mapping[str, Any]) -> None:
        """Write one experiment into results.json, beside the others that are there, with versions if it has none."""
        file = self.out / "results.json"
        results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        results.setdefault(Path(self.dataset).name, {})[what] = {"versions": installed_versions(), **content}
        write_json(file, results)


def tensor_once(file: Path, compute: Callable[[], Tensor]) -> Tensor:
    """Return the tensor of a file; where it is missing, the one that `compute` returns, which is then kept there."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(compute(), file)
    return torch.load(file)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation; of one value 0.

    Example:
        >>> mean_std([1.0, 3.0])[0], mean_std([2.0])
        (2.0, (2.0, 0.0))
    """
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def values_of(rows: Sequence[Mapping[str, Any]], measure: str, **which: Any) -> list[Any]:
    """Return a measure of the rows that have the values in `which`, one for each seed.

    Example:
        >>> values_of([{"head": "ReLU", "std": 0.1}, {"head": "SiLU", "std": 0.2}], "std", head="SiLU")
        [0.2]
    """
    return [row[measure] for row in rows if all(row[name] == value for name, value in which.items())]
