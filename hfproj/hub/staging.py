"""The staged folder that a push sends: adapters as PEFT lays them out, with their cards and what belongs to them."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from peft import PeftModel
from torch import nn

from hfproj import filenames
from hfproj.backbones.loading import EMBEDDED
from hfproj.backbones.preprocessing import ImagePreprocessing, preprocessor_config
from hfproj.errors import UsageError, unknown
from hfproj.files import write_json
from hfproj.hub.outgoing import without_tokens
from hfproj.objectives.buffers import START, Position, save_buffers
from hfproj.reporting.card import render_card, write_card, write_eval_results
from hfproj.results import Results
from hfproj.tuner.description import describe_adapter, known_preprocessing, starts_random
from hfproj.tuner.layer import CHILD

ROOT = "default"  # the adapter that lies in the root
_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_HUB_PREFIX = re.compile(r"^hf[-_]hub:")
_NAME = re.compile(r"\w[\w-]*", re.ASCII)


@dataclass
class Staged:
    """A folder that is ready to be sent.

    Attributes:
        folder: Laid out as the repository.
        adapters: Names of its adapters.
        subject: The one that results, objective and EMA belong to.
    """

    folder: Path
    adapters: list[str]
    subject: str


@runtime_checkable
class SavesItself(Protocol):
    """An EMA teacher (``trainer.ema``) that writes its file into a folder."""

    def save(self, folder: Path, /) -> object:
        """Write the file."""


def check_pushable(model: Any, adapters: Sequence[str] | None = None) -> list[str]:
    """Return the names of the adapters to push.

    Raises:
        UsageError: If the model has no head or no such adapter, a name can't be that of a folder, or the backbone is
            known to this machine only.
    """
    backbone = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(model, PeftModel) or not hasattr(backbone, CHILD):
        raise UsageError(
            f"{type(model).__name__} has no projection head to push; attach one with peft.get_peft_model(backbone, "
            "hfproj.ProjectionHeadConfig(…))."
        )
    if isinstance(adapters, str):
        adapters = [adapters]
    names = list(model.peft_config) if adapters is None else list(dict.fromkeys(adapters))
    for name in names:
        if name not in model.peft_config:
            raise unknown("adapter", name, model.peft_config)
        if not _NAME.fullmatch(name):
            raise UsageError(f"Adapter {name!r} would lie in a folder of that name; use letters, digits, '-' and '_'.")
        hub_base(model.peft_config[name], name)
    if not names:
        raise UsageError("adapters=[] leaves nothing to push; name adapters, or leave it out to push all.")
    return names


def hub_base(config: Any, adapter: str = ROOT) -> str | None:
    """Return the id under which everybody finds the backbone of a config; None without one, or with random weights.

    Raises:
        UsageError: If it is a folder of this machine.
    """
    if starts_random(config.backbone):
        return None
    base = _HUB_PREFIX.sub("", str((config.backbone or {}).get("id") or config.base_model_name_or_path or ""))
    if not base:
        return None
    if not _ID.fullmatch(base) or os.path.isdir(base):
        raise UsageError(
            f"The backbone of adapter {adapter!r} was loaded from {base!r}, a folder of this machine, where nobody "
            "else finds it. Push the backbone itself (backbone.push_to_hub('me/backbone')), then say where it is: "
            f"model.peft_config[{adapter!r}].backbone = "
            "{'library': 'transformers', 'id': 'me/backbone', 'kwargs': {}}."
        )
    return base


def stage(
    model: nn.Module,
    folder: Path,
    repo_id: str,
    *,
    results: Any = None,  # of users, who are told here what was expected
    adapters: Sequence[str] | None = None,
    objective: Any = None,
    ema: SavesItself | None = None,
    license: str | None = None,
    eval_results: bool = False,
    unmeasured: Results | None = None,
    preprocessing: ImagePreprocessing | None = None,
    before: Position = START,
    saved: Path | None = None,
) -> Staged:
    """Write everything that a push sends into an empty `folder`; arguments and errors are those of `push_to_hub`.

    Where there are no `results`, `unmeasured` says for the card what is known of the run. `preprocessing` is how images
    are prepared, if it is not the backbone's own; `before` the position at which the run began that trains the
    objective; `saved` a folder in which the adapters are saved already (with FSDP the model can't be saved here).
    """
    names = check_pushable(model, adapters)
    subject = _subject(model, names, results)
    if objective is not None and not isinstance(objective, nn.Module):
        raise UsageError(f"objective is a {type(objective).__name__}; expected the module, such as trainer.objective.")
    _adapter_files(model, names, folder, saved, preprocessing)
    place = folder_of(folder, subject)
    if objective is not None:
        save_buffers(objective, place, before=before)
    if ema is not None:
        ema.save(place)
    shown = without_tokens(results or unmeasured or described(model, subject))
    for name in names:
        write_card(
            shown if name == subject else described(model, name),
            folder_of(folder, name),
            repo_id=repo_id,
            license=license,
            adapters=names,
            adapter=name,
            keep_results=results is not None and name == subject,
        )
    if ROOT not in names:  # the page of a repository is its root: without a "default" there, it shows this adapter
        files = [file for file in (filenames.PREPROCESSING,) if (place / file).is_file()]
        for file in files:
            shutil.copyfile(place / file, folder / file)
        text = render_card(shown, repo_id=repo_id, license=license, files=files, adapters=names, adapter=subject)
        (folder / filenames.CARD).write_text(text, encoding="utf-8")
    if results is not None and eval_results:
        write_eval_results(shown, folder)
    return Staged(folder, names, subject)


def _subject(model: Any, names: list[str], results: Any) -> str:
    """Return the adapter that results, objective and EMA belong to: the active one, or the first without results."""
    if results is not None and not isinstance(results, Results):
        raise UsageError(f"results is a {type(results).__name__}; expected hfproj.Results, as hfproj.evaluate returns.")
    active = getattr(model.get_base_model(), CHILD).active_name
    if results is not None and active not in names:
        which = "none is" if active is None else f"{active!r} is, and it is not among those to push, {', '.join(names)}"
        raise UsageError(f"results are those of the active adapter, but {which}; switch with model.set_adapter(…).")
    return active if active in names else names[0]


def _adapter_files(
    model: Any, names: list[str], folder: Path, saved: Path | None, preprocessing: ImagePreprocessing | None
) -> None:
    """Save or copy the adapters, name their backbone as others find it, and write how their images are prepared."""
    if saved is None:
        # Else PEFT asks the Hub whether the vocabulary has changed, and a head has none.
        model.save_pretrained(str(folder), selected_adapters=names, save_embedding_layers=False)
        (folder / filenames.CARD).unlink(missing_ok=True)  # PEFT's own, which is empty
    for name in names:
        place = folder_of(folder, name)
        if saved is not None:
            place.mkdir(parents=True, exist_ok=True)
            for file in (filenames.ADAPTER_CONFIG, filenames.ADAPTER_WEIGHTS):
                shutil.copyfile(folder_of(saved, name) / file, place / file)
        _name_base(place / filenames.ADAPTER_CONFIG, hub_base(model.peft_config[name], name))
        settings = preprocessing or known_preprocessing(model, name)
        if settings is not None:
            write_json(place / filenames.PREPROCESSING, preprocessor_config(settings))


def folder_of(folder: Path, adapter: str) -> Path:
    """Return where PEFT has an adapter below a folder."""
    return folder if adapter == ROOT else folder / adapter


def _name_base(file: Path, base: str | None) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    saved = config.get("base_model_name_or_path")
    if saved and base != _HUB_PREFIX.sub("", saved):
        config["base_model_name_or_path"] = None if base == EMBEDDED else base
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def described(model: PeftModel, adapter: str) -> Results:
    """Return results without a measurement: what the adapter is, for a card without numbers."""
    return Results(config=describe_adapter(model, adapter))
