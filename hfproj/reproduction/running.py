"""Running a study: row after row, each seed once, on one process or several, going on where it was stopped.

A finished run is a file ``runs/<key>-<seed>.json``, where the key is a digest of every value that study, preset and
scale give (`Setting.written`): a run of other values is never taken for it. What they leave to the defaults of this
library is not in it: runs of another version of hfproj are named in a warning. Studies that show the same runs share
them. A run that is in progress holds a lock, so that any number of processes, on one machine or on a shared file
system, can work on the same folder.
"""

import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.trainer_callback import PrinterCallback

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.files import installed_versions, rounded, write_json
from hfproj.reproduction.measures import Trained, check_labels, check_layers, measured
from hfproj.reproduction.setting import Setting
from hfproj.reproduction.sources import Splits
from hfproj.reproduction.store import Store
from hfproj.reproduction.study import Scale, Study
from hfproj.saving.locks import InUseError, locked

LOG = logging.getLogger("hfproj.reproduction")
TRIAL_ROWS = 32  # images of a trial


@dataclass(frozen=True)
class Job:
    """A study at a scale, and where its runs are kept.

    Args:
        study: What is run.
        scale: Name of its scale.
        folder: Where finished runs are kept, see `Store`.
        places: Name of a data set → where it is.
        rows: Names of the rows that are run; none: all.
        seeds: In place of the scale's.
        shuffled: Negative control: the probes' labels are shuffled.
    """

    study: Study
    scale: str
    folder: Path
    places: Mapping[str, str]
    rows: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    shuffled: bool = False

    @property
    def at(self) -> Scale:
        """The scale."""
        return trial_of(self.study) if self.scale == "trial" else self.study.scales[self.scale]

    def settings(self) -> list[Setting]:
        """Return every row on every data, at the scale."""
        runs = self.study.runs()
        if self.scale == "trial":
            runs = [(row, next(iter(row.data or self.study.data))) for row in self.study.rows]
        return [Setting(self.study, row, data, self.at) for row, data in runs]

    @property
    def store(self) -> Store:
        """Where its runs are kept."""
        return Store(self.folder, self.study.name.split(".")[0], self.scale)

    def run_name(self, setting: Setting, seed: int) -> str:
        """Return what a run is called."""
        return f"{setting.key}-{seed}{'-shuffled' if self.shuffled else ''}"

    def gather(self) -> None:
        """Write the finished runs into the one file that is kept of them."""
        pairs = [(setting, seed) for setting, seed, record in self._pairs() if record is not None]
        self.store.gather(self.run_name(*pair) for pair in pairs)

    def records(self) -> list[dict[str, Any]]:
        """Return the runs that are finished, in the order of the rows."""
        return [record for _, _, record in self._pairs() if record is not None]

    def missing(self) -> list[tuple[Setting, int]]:
        """Return the runs that are not, of the rows and seeds that are to be run."""
        wanted = self.seeds or self.at.seeds
        missing = [(setting, seed) for setting, seed, record in self._pairs() if record is None and seed in wanted]
        return [(s, seed) for s, seed in missing if not self.rows or s.row.name in self.rows]

    def _pairs(self) -> list[tuple[Setting, int, dict[str, Any] | None]]:
        seeds, store = dict.fromkeys((*self.at.seeds, *(self.seeds or ()))), self.store
        return [(s, seed, self._read(store, s, seed)) for seed in seeds for s in self.settings()]

    def _read(self, store: Store, setting: Setting, seed: int) -> dict[str, Any] | None:
        name = self.run_name(setting, seed)
        record = store.read(name)
        return record and {**record, "name": name, "row": setting.row.name, "data": setting.data}

    def load(self, setting: Setting) -> Splits:
        """Return the data of a run.

        Raises:
            UsageError: If they can't be loaded, or are others than those of the runs that are finished.
        """
        if self.scale == "trial":
            return setting.source.synthetic(TRIAL_ROWS)
        splits = setting.source.load(self.places, setting.scale.images, setting.scale.test_images)
        for column in self.study.every_column:
            check_labels(column, splits)
        for record in self.records():
            known = record.get("data_fingerprint", splits.fingerprint)
            if record["data"] == setting.data and known != splits.fingerprint:
                raise UsageError(
                    f"Expected {setting.data} to be the images that {self.folder} has runs of, got others; name their "
                    "place (data=…), or give another output_dir."
                )
        return splits

    def seconds_left(self) -> float:
        """Return how long the runs that are missing take, about, one after the other."""
        own = [record["cpu_seconds"] for record in self.records()]
        each = sum(own) / len(own) if own else self.at.seconds
        return each * len(self.missing())


def trial_of(study: Study) -> Scale:
    """Return the scale of a trial: two steps of a tiny model on random images, so that everything runs once."""
    mini = study.scales["mini"]
    if mini.backbone["name"] == "timm/resnet18":
        backbone: Mapping[str, Any] = {**mini.backbone, "width": 1 / 8}
    else:
        backbone = mini.backbone
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0}
    note = "A trial: two steps on random images. Its figures mean nothing."
    timed: dict[str, Any] = {"seconds": 3.0, "machine": "one CPU core"}
    views = {"size": min(mini.views.get("size", 16), 16)} if "width" in backbone else {}
    return mini.but(
        backbone=backbone, training=training, views=views, heads=mini.heads / 4, images=TRIAL_ROWS,
        test_images=TRIAL_ROWS, seeds=(0,), note=note, **timed,
    )  # fmt: skip


def work(job: Job, *, only: tuple[int, int] = (0, 1)) -> None:
    """Run what is missing, but for what another process is running.

    Args:
        job: What to run.
        only: (number of this worker, number of workers): each begins at another place.

    Raises:
        UsageError: If data can't be loaded.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState()  # rows are then trained by all processes of the launcher together
    loaded: dict[str, Splits] = {}
    todo = distributed.broadcast_object(job.missing())  # the same on all processes, whatever else is written meanwhile
    start = only[0] * len(todo) // only[1]
    for setting in {setting.data: setting for setting, _ in todo}.values():
        loaded = {setting.data: job.load(setting)}  # are all data there? One at a time in memory
    for setting, seed in [*todo[start:], *todo[:start]]:
        file = job.store.file(job.run_name(setting, seed))
        scratch = file.parent / f".{file.stem}"
        together = distributed.world_size() > 1
        try:
            with nullcontext() if together else locked(scratch, patience=0.0):
                if file.is_file() and not together:
                    continue
                if setting.data not in loaded:
                    loaded = {setting.data: job.load(setting)}
                record = run(setting, seed, loaded[setting.data], scratch, shuffled=job.shuffled)
                if distributed.rank() == 0:
                    write_json(file, record)
                    brief = f"{setting.row.name}, {setting.data}, seed {seed}: {_brief(job, record)}"
                    LOG.warning(f"{brief}{_time(job.seconds_left())}")
                    shutil.rmtree(scratch, ignore_errors=True)
                distributed.barrier()
        except InUseError:
            continue  # another worker is at it
        finally:
            with suppress(OSError):  # it stays where a checkpoint is in it
                scratch.rmdir()


def run(setting: Setting, seed: int, splits: Splits, scratch: Path, *, shuffled: bool = False) -> dict[str, Any]:
    """Train one row with one seed, and return what was measured of it."""
    wall, cpu = time.monotonic(), time.process_time()
    model = setting.model(seed)
    check_layers(setting, model)
    log: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    if setting.row.trained:
        for items in splits.phases or (splits.train,):
            trainer = setting.trainer(model, items, seed, scratch / "trainer")
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            log += trainer.state.log_history
            history += trainer.history
            model = trainer.bare_model()
    trained = Trained(setting, model, splits, seed, history)
    found = measured(trained, shuffled=shuffled)
    return {
        "row": setting.row.name, "data": setting.data, "seed": seed, **found,
        "loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
        "data_fingerprint": splits.fingerprint, "seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "history": rounded(history), "threads": torch.get_num_threads(), "versions": installed_versions(),
        "setting": setting.written(),
    }  # fmt: skip


def spread(command: Sequence[str], workers: int) -> None:
    """Start workers, each a process of its own with its share of the cores and one of the GPUs, and wait for them.

    Raises:
        UsageError: If one fails.
    """
    threads = max(1, (os.cpu_count() or 1) // workers)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    started = []
    for number in range(workers):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HFPROJ_WORKER": f"{number}/{workers}"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
        started.append(subprocess.Popen([sys.executable, *command], env=environment))
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.terminate()
    if any(codes):
        raise UsageError(
            f"{sum(map(bool, codes))} of {workers} workers ended in an error, told above; what is finished is kept."
        )


def _brief(job: Job, record: Mapping[str, Any]) -> str:
    shown = [(c, record["values"].get(c.name)) for c in job.study.columns[:3]]
    return ", ".join(f"{c.name} {'–' if v is None else c.shown(v)}" for c, v in shown)


def _time(seconds: float) -> str:
    return "" if seconds < 60 else f"; about {math.ceil(seconds / 60)} minutes of one core are left"
