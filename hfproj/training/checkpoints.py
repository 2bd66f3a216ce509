"""What training starts from: checkpoints of this run, and adapters that were saved.

A run that resumes has its optimizer, schedules and views again. One that continues from an adapter has its tensors, the
objective's buffers, the EMA teacher and the position; the rest is not part of an adapter and starts fresh.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from hfproj import distributed, filenames
from hfproj.errors import AdapterFileError, UsageError, check_choice
from hfproj.hub.pull import open_adapter
from hfproj.hub.staging import folder_of
from hfproj.objectives.buffers import START, Position, load_buffers, read_position
from hfproj.training.ema import EMA
from hfproj.training.setup import PARTS, Source
from hfproj.tuner import ProjectionHeadConfig
from hfproj.tuner.active import active_config, active_name
from hfproj.tuner.belonging import check_continued
from hfproj.tuner.comparison import differences, terms
from hfproj.tuner.layer import CHILD

LOG = logging.getLogger("hfproj.training")
_PLACE = ("repo", "adapter", "revision", "token", "cache_dir")


class Continued:
    """The adapter that a run continues from, whose tensors are loaded into the active adapter of `model`.

    `source` is a folder or repository, or a dict of "repo" and "adapter", "revision", "token" or "cache_dir". Both
    adapters must have the same head and train the same of the backbone; that of `model` gets the saved one's objective
    where it has none yet. Under another `objective`, a predictor, prototypes or scales that only it needs stay as they
    were made, and those that it has no use for are left behind.
    """

    def __init__(self, model: PeftModel, source: Source, objective: nn.Module | None = None):
        options = dict(source) if isinstance(source, Mapping) else {"repo": source}
        for name in options:
            check_choice("entry of continue_from:", name, _PLACE)
        if not isinstance(options.get("repo"), str | os.PathLike):
            wanted = "continue_from to be a folder, a Hub repository, or a dict with 'repo'"
            raise UsageError(f"Expected {wanted}, got {source!r}.")
        saved, own = open_adapter(**options), active_config(model)
        found = differences(model, saved.config, own)
        self.new, self.left = _exchanged(found, saved.config, own, objective)
        for name in [*self.new, *self.left]:
            found.pop(name)
        if found:
            how = "with hfproj.from_pretrained(…, is_trainable=True), or with the same options"
            raise UsageError(f"{_other_parts(saved.where, found)}. Make the model {how}.")
        check_continued(saved.config, own)
        tensors = load_file(saved.folder / filenames.ADAPTER_WEIGHTS)
        if self.new or self.left:
            made = get_peft_model_state_dict(model, adapter_name=active_name(model))
            tensors = {n: t for n, t in tensors.items() if _part(n) not in {*self.new, *self.left}}
            tensors |= {n: t for n, t in made.items() if _part(n) in self.new}
        set_peft_model_state_dict(model, tensors, adapter_name=active_name(model))
        if own.objective is None:
            own.objective, own.regularizers = saved.config.objective, saved.config.regularizers
        self.saved, self.own = saved, own
        self.same_objective = True  # as far as that is known

    def restore_objective(self, objective: nn.Module, *, log: bool) -> Position:
        """Give the objective its buffers and return where training stood; `log` what continues and what is fresh."""
        before = (self.saved.config.objective or {}).get("name")
        now = (getattr(objective, "created", None) or {}).get("name")
        self.same_objective = before is None or now is None or before == now
        position, continues, fresh = START, ["the adapter's tensors"], ["optimizer", "schedules", "epochs and views"]
        lacking = [n for n in PARTS if getattr(self.own, n) and not getattr(self.saved.config, n)]
        fresh += [f"the {part}" for part in dict.fromkeys([*self.new, *lacking])]
        folder = self._folder(filenames.OBJECTIVE)
        if objective.state_dict():
            (continues if folder else fresh).append(f"buffers of {type(objective).__name__}")
        if folder is not None:
            hint = "give the objective the same options, or remove that file to start with new ones"
            load_buffers(objective, folder, hint=hint)
            position = read_position(folder)
        if "target" in getattr(objective, "needs", ()):
            (continues if self._folder(filenames.EMA) else fresh).append("the EMA teacher")
        if log:
            other = "" if self.same_objective else f" It was trained on {before}, this run is on {now}."
            other += f" Left behind: the {' and the '.join(self.left)}." if self.left else ""
            LOG.warning(
                f"Continuing from {self.saved.where}, at step {position.step} and epoch {position.epoch:.2f}: "
                f"{', '.join(continues)}. Fresh: {', '.join(fresh)}.{other}"
            )
        return position

    def load_ema(self, ema: EMA) -> None:
        """Give the EMA teacher the saved one's values, if there is one."""
        folder = self._folder(filenames.EMA)
        if folder is not None:
            ema.load(folder, hint="remove that file to start with a copy of the model")

    def _folder(self, name: str) -> Path | None:
        """Return the folder of a file that lies beside the adapter itself, if this run has a use for it."""
        if not self.same_objective or self.saved.source.size(self.saved.prefix + name) is None:
            return None
        return None if (found := self.saved.file(name)) is None else found.parent


def folder_to_resume(checkpoint: str | Path, model: PeftModel) -> Path:
    """Return the folder of a checkpoint's adapter, which has the active one's parts and was trained on its backbone.

    Raises:
        AdapterFileError: If it has other parts, or was trained on another backbone.
    """
    folder, own = folder_of(Path(checkpoint), active_name(model)), active_config(model)
    saved = cast(ProjectionHeadConfig, ProjectionHeadConfig.from_pretrained(str(folder)))
    if found := differences(model, saved, own):
        hint = "resume with the adapter that it was written with, or without resume_from_checkpoint"
        raise AdapterFileError(f"{_other_parts(folder, found)}; {hint}.")
    check_continued(saved, own)
    _warn_of_other_terms(folder, saved, own)
    return folder


def _warn_of_other_terms(folder: Path, *configs: ProjectionHeadConfig) -> None:
    """Warn where a checkpoint was trained on another objective, options of it or regularizers than this run."""
    was, now = map(terms, configs)
    names = ["objective"] if was["objective"] != now["objective"] else list(was | now)
    names += [name for name in was | now if name.startswith("regularizer ") and name not in names]
    changes = [f"{n} was {was.get(n)!r}, is {now.get(n)!r} now" for n in names if was.get(n) != now.get(n)]
    if changes and distributed.rank() == 0:
        LOG.warning(f"{folder} was trained on other terms than this run has: {'; '.join(changes)}.")


def _other_parts(where: str | Path, found: Mapping[str, list[str]]) -> str:
    said = "; ".join(said for part in found.values() for said in part)
    return f"The adapter of {where} and this model's do not have the same parts: {said}"


def _exchanged(
    found: Mapping[str, Any], saved: ProjectionHeadConfig, own: ProjectionHeadConfig, objective: nn.Module | None
) -> tuple[list[str], list[str]]:
    """Return which of the differing parts another objective starts anew, and which it leaves behind."""
    if objective is None:
        return [], []
    needs: Any = getattr(objective, "needs", frozenset())
    created: Any = getattr(objective, "created", None) or {}
    other = (saved.objective or {}).get("name") not in (None, created.get("name"))
    new, left = [], []
    for part in PARTS:
        there, here = (bool(getattr(config, part)) for config in (saved, own))
        if part in found and here and PARTS[part] in needs and (other or not there):
            new.append(part)
        elif part in found and there and not here and PARTS[part] not in needs:
            left.append(part)
    return new, left


def _part(name: str) -> str | None:
    """Return the part of the adapter to which a tensor belongs, from its name in a file."""
    _, of_head, rest = name.partition(f".{CHILD}.projection_head_modules.")
    return rest.partition(".")[0] if of_head else None
