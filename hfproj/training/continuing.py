"""Going on from an adapter that was saved: its tensors, the objective's buffers, the moving average, the position.

What an optimizer and schedules remember is not part of an adapter: these start fresh, and so do the views.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from hfproj.errors import UsageError, unknown
from hfproj.filenames import ADAPTER_WEIGHTS, EMA, OBJECTIVE
from hfproj.heads import HEADS
from hfproj.hub.pull import SavedAdapter, open_adapter
from hfproj.objectives.buffers import START, Position, load_buffers, read_position
from hfproj.training import methods
from hfproj.training.ema import EMA as MovingAverage
from hfproj.tuner import ProjectionHeadConfig
from hfproj.tuner.config import plain

LOG = logging.getLogger("hfproj.training")
_COMPARED = ("head", "in_dim", "out_dim", "scales", "pooling", "layer", "trainable")
# Of the backbone's PEFT method, what is about training or about the file.
_FREE = {"inference_mode", "base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping"}
_PLACE = ("repo", "adapter", "revision", "token", "cache_dir")


@dataclass
class Continued:
    """The adapter that a run goes on from.

    Attributes:
        saved: Its checked files.
        same_objective: Whether it was trained on the objective of this run, as far as that is known.
    """

    saved: SavedAdapter
    same_objective: bool = True

    @classmethod
    def load(cls, model: PeftModel, source: Any) -> "Continued":
        """Give the active adapter of `model` the tensors of a saved one, and its objective where it has none yet.

        Args:
            model: A model whose active adapter has the same parts.
            source: A folder or repository, or a dict of "repo" and "adapter", "revision", "token" or "cache_dir".

        Raises:
            UsageError: it has other parts, or `source` is no such thing.
            AdapterFileError: it is missing or damaged.
        """
        options = dict(source) if isinstance(source, Mapping) else {"repo": source}
        for name in options:
            if name not in _PLACE:
                raise unknown("entry of continue_from:", name, _PLACE)
        if not isinstance(options.get("repo"), str | Path):
            raise UsageError(f"continue_from={source!r}: expected a folder, a Hub repository, or a dict with 'repo'.")
        saved, own = open_adapter(**options), methods.active_config(model)
        found = list(differences(saved.config, own))
        if found:
            raise UsageError(
                f"The adapter of {saved.where} and this model's have not the same parts: {'; '.join(found)}. Make the "
                "model with hfproj.from_pretrained(…, is_trainable=True), or with the same options."
            )
        tensors = load_file(saved.folder / ADAPTER_WEIGHTS)
        set_peft_model_state_dict(model, tensors, adapter_name=methods.active_name(model))
        if own.objective is None:
            own.objective, own.regularizers = saved.config.objective, saved.config.regularizers
        return cls(saved)

    def go_on(self, objective: nn.Module, *, tell: bool) -> Position:
        """Give the objective its buffers, log what goes on and what starts fresh, and return where training stood.

        Args:
            objective: That of this run.
            tell: Whether this process logs.

        Raises:
            AdapterFileError: the buffers are those of another objective, or damaged.
        """
        before = (self.saved.config.objective or {}).get("name")
        now = (getattr(objective, "created", None) or {}).get("name")
        self.same_objective = before is None or now is None or before == now
        position, goes_on, fresh = START, ["the adapter's tensors"], ["optimizer", "schedules", "epochs and views"]
        folder = self._folder(OBJECTIVE)
        if objective.state_dict():
            (goes_on if folder else fresh).append(f"buffers of {type(objective).__name__}")
        if folder is not None:
            cure = "give the objective the same options, or remove that file to start with new ones"
            load_buffers(objective, folder, hint=cure)
            position = read_position(folder)
        if "target" in getattr(objective, "needs", ()):
            (goes_on if self._folder(EMA) else fresh).append("the moving average")
        if tell:
            LOG.warning(
                "Going on from %s, at step %d and epoch %.2f: %s. Fresh: %s.%s",
                self.saved.where,
                position.step,
                position.epoch,
                ", ".join(goes_on),
                ", ".join(fresh),
                "" if self.same_objective else f" It was trained on {before}, this run is on {now}.",
            )
        return position

    def load_ema(self, ema: MovingAverage) -> None:
        """Give the moving average the saved one's values, if there is one.

        Raises:
            AdapterFileError: it is that of another adapter, or damaged.
        """
        folder = self._folder(EMA)
        if folder is not None:
            ema.load(folder, cure="remove that file to start with a copy of the model")

    def _folder(self, name: str) -> Path | None:
        """Return the folder of a file that lies beside the adapter itself, if this run has a use for it."""
        if not self.same_objective or self.saved.source.size(self.saved.prefix + name) is None:
            return None
        found = self.saved.file(name)
        return None if found is None else found.parent


def differences(saved: ProjectionHeadConfig, own: ProjectionHeadConfig) -> Iterator[str]:
    """Yield in words each part in which two adapters differ so that their tensors, or what they compute, do not agree.

    Example:
        >>> narrow, wide = (ProjectionHeadConfig(out_dim=n, head_options=o) for n, o in ((8, {}), (16, {"depth": 2})))
        >>> list(differences(narrow, wide))  # two layers are what an mlp has anyway
        ['out_dim is 8 there and 16 here']
    """
    parts = [_parts(config) for config in (saved, own)]
    for name in sorted(parts[0].keys() | parts[1].keys()):
        there, here = (part.get(name) for part in parts)
        if there != here:
            yield f"{name} is {_short(there)} there and {_short(here)} here"


def _parts(config: ProjectionHeadConfig) -> dict[str, Any]:
    parts = {name: getattr(config, name) for name in _COMPARED}
    parts["scales"] = sorted(config.scales or ())
    parts |= _head_options("head_options", config.head, config.head_options)
    if isinstance(config.predictor, dict):
        parts |= _head_options("predictor", config.predictor["head"], config.predictor)
    prototypes = config.prototypes if isinstance(config.prototypes, dict) else {"count": config.prototypes}
    parts |= {f"prototypes.{n}": v for n, v in {"learn_norm": False, **prototypes}.items()}
    for name, value in config.backbone_options.items():
        if name not in _FREE and "dropout" not in name and not name.startswith("init_"):
            parts[f"backbone_adapter.{name}"] = sorted(value) if isinstance(value, list | set) else value
    return {name: plain(value) for name, value in parts.items() if value is not None}


def _head_options(prefix: str, head: str, options: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {n: p.default for n, p in HEADS.options(head).items() if p.default is not inspect.Parameter.empty}
    found = {n: v for n, v in {**defaults, **options}.items() if n not in ("in_dim", "out_dim")}
    return {f"{prefix}.{name}": value for name, value in found.items()}


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} modules"
    return repr(value)
