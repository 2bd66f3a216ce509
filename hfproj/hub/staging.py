"""The staged folder that a push sends: adapters as PEFT lays them out, with their cards and what belongs to them.

Before it leaves this machine it is validated: only files of an adapter, without a token, a path or a user name.
"""

import dataclasses
import getpass
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from peft import PeftModel
from torch import nn

from hfproj import filenames
from hfproj.backbones.loading import EMBEDDED
from hfproj.backbones.preprocessing import ImagePreprocessing, preprocessor_config
from hfproj.errors import UsageError, unknown
from hfproj.files import portable, write_json
from hfproj.heads import HEADS
from hfproj.hub.untrusted import is_folder_name, same_folder
from hfproj.objectives.buffers import START, Position, save_buffers
from hfproj.redaction import known_secrets, redacted, secrets_in
from hfproj.reporting.card import render_card, write_card, write_eval_results
from hfproj.results import Results
from hfproj.tuner.description import describe_adapter, known_base, known_preprocessing, starts_random
from hfproj.tuner.layer import CHILD

ROOT = "default"  # the adapter that lies in the root
_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_HUB_PREFIX = re.compile(r"^hf[-_]hub:")
_NAME = re.compile(r"\w[\w-]*", re.ASCII)
_FILES = {
    filenames.ADAPTER_CONFIG, filenames.ADAPTER_WEIGHTS, filenames.CARD, filenames.RESULTS, filenames.PREPROCESSING,
    filenames.OBJECTIVE, filenames.EMA,
}  # fmt: skip
# Prose may hold a slash before a word; a path of a machine begins in one of these.
_PATH = re.compile(
    r"(?<![\w.~/\\:-])(?:~[\w.-]*[/\\]|(?:/(?:home|Users|root|tmp|var|mnt|media|scratch|data|opt|srv|usr|work|workspace|"
    r"private|content|kaggle|dev|proc)|[A-Za-z]:)[/\\])[\w.@~-]+"
)
# Accounts that many machines have: as words they say nothing of a person.
_ANYBODY = {
    "root", "user", "users", "home", "admin", "administrator", "ubuntu", "debian", "centos", "ec2-user", "runner",
    "jovyan", "vscode", "codespace", "docker", "nobody", "default", "guest", "test", "tests", "app", "work", "data",
    "workspace", "train", "model", "models", "base", "vision", "lab", "dev", "research", "student", "researcher",
    "conda", "python", "head", "heads", "image", "images", "results",
}  # fmt: skip
Pattern = tuple[re.Pattern[str], str]  # what may not occur in what is sent, with the words for it


@dataclasses.dataclass
class Staged:
    """A folder that is ready to be sent."""

    folder: Path  # laid out as the repository
    adapters: list[str]
    subject: str  # the adapter that results, objective and EMA belong to


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
        attach = "attach one with peft.get_peft_model(backbone, hfproj.ProjectionHeadConfig(…))"
        raise UsageError(f"{type(model).__name__} has no projection head to push; {attach}.")
    if isinstance(adapters, str):
        adapters = [adapters]
    names = list(model.peft_config) if adapters is None else list(dict.fromkeys(adapters))
    for name in names:
        if name not in model.peft_config:
            raise unknown("adapter", name, model.peft_config)
        if not _NAME.fullmatch(name) or not is_folder_name(name):
            raise UsageError(f"Adapter {name!r} would lie in a folder of that name; use letters, digits, '-' and '_'.")
        hub_base(model.peft_config[name], name)
    folders: dict[str, str] = {}
    for name in names:
        if (first := folders.setdefault(same_folder(name), name)) != name:
            raise UsageError(f"Adapters {first!r} and {name!r} are one folder where case does not count; rename one.")
    if not names:
        raise UsageError("adapters=[] leaves nothing to push; name adapters, or leave it out to push all.")
    return names


def _warn_of_own_head(config: Any, adapter: str) -> None:
    """Say which heads nobody else has: who loads the adapter needs their code."""
    named = [config.head, (config.predictor or {}).get("head")]
    for name in dict.fromkeys(n for n in named if n in HEADS.list()):
        cls = HEADS.get(name)
        if not cls.__module__.startswith("hfproj."):
            warnings.warn(
                f"The head {name!r} of adapter {adapter!r} is {cls.__qualname__} of {cls.__module__}, which is not "
                f"pushed: who loads it has to run hfproj.register_head({name!r}, {cls.__name__}) first. Put the class "
                "where they find it, and say so in the card.",
                stacklevel=4,
            )


def hub_base(config: Any, adapter: str = ROOT) -> str | None:
    """Return the id under which everybody finds the backbone of a config; None without one, or with random weights.

    A folder of this machine is a `UsageError`.
    """
    if starts_random(config.backbone):
        return None
    base = _HUB_PREFIX.sub("", str(known_base(config.backbone, config.base_model_name_or_path) or ""))
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
    model: nn.Module, folder: Path, repo_id: str, *, results: Any = None, adapters: Sequence[str] | None = None,
    objective: Any = None, ema: SavesItself | None = None, license: str | None = None, eval_results: bool = False,
    unmeasured: Results | None = None, preprocessing: ImagePreprocessing | None = None, before: Position = START,
    saved: Path | None = None,
) -> Staged:  # fmt: skip
    """Write everything that a push sends into an empty `folder`; arguments and errors are those of `push_to_hub`.

    Where there are no `results`, `unmeasured` says for the card what is known of the run. `preprocessing` is how images
    are prepared, if it is not the backbone's own; `before` the position at which the run began that trains the
    objective; `saved` a folder in which the adapters are saved already (with FSDP the model can't be saved here).
    """
    names = check_pushable(model, adapters)
    subject = _subject(model, names, results)
    for name in names:
        _warn_of_own_head(cast(Any, model).peft_config[name], name)
    if objective is not None and not isinstance(objective, nn.Module):
        raise UsageError(f"objective is a {type(objective).__name__}; expected the module, such as trainer.objective.")
    _adapter_files(model, names, folder, saved, preprocessing)
    place = folder_of(folder, subject)
    if objective is not None:
        save_buffers(objective, place, before=before)
    if ema is not None:
        ema.save(place)
    shown = redacted(_with_digest(results or unmeasured or described(model, subject), model, subject))
    for name in names:
        own, keep = (
            (shown, results is not None)
            if name == subject
            else (_with_digest(described(model, name), model, name), False)
        )
        write_card(
            own, folder_of(folder, name), repo_id=repo_id, license=license, adapters=names, adapter=name,
            keep_results=keep,
        )  # fmt: skip
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
        base = hub_base(model.peft_config[name], name)
        _check_known(model.peft_config[name], base, name)
        _name_base(place / filenames.ADAPTER_CONFIG, base)
        settings = preprocessing or known_preprocessing(model, name)
        if settings is not None:
            write_json(place / filenames.PREPROCESSING, preprocessor_config(settings))


def folder_of(folder: Path, adapter: str) -> Path:
    """Return where PEFT has an adapter below a folder."""
    return folder if adapter == ROOT else folder / adapter


def _check_known(config: Any, base: str | None, adapter: str) -> None:
    """Refuse an adapter whose backbone nobody else finds and nobody could recognise."""
    known = config.fingerprint or {}
    if base is None and "sha256" not in known and (config.trainable != "full" or not starts_random(config.backbone)):
        hint = (
            "attach it to a backbone with a public source, or to one whose tensors are all in memory and not quantized"
        )
        if not known:
            hint = "for cached features use FeatureBackbone.of(model), or give it source= and fingerprint="
        raise UsageError(
            f"The backbone of adapter {adapter!r} has no public source, and no digest by which who has it could tell "
            f"that it is the right one; {hint}."
        )


def _with_digest(results: Results, model: PeftModel, adapter: str) -> Results:
    """Return results with what the adapter's config says of its backbone now that it is saved."""
    known, now = results.config.get("adapter"), describe_adapter(model, adapter)["adapter"]
    if not isinstance(known, dict):
        return results
    kept = now.get("fingerprint", {})
    if digest := (model.peft_config[adapter].fingerprint or {}).get("sha256"):
        kept = kept | {"sha256": digest}
    return dataclasses.replace(results, config=results.config | {"adapter": known | {"fingerprint": kept}})


def _name_base(file: Path, base: str | None) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    saved = config.get("base_model_name_or_path")
    if saved and base != _HUB_PREFIX.sub("", saved):
        config["base_model_name_or_path"] = None if base == EMBEDDED else base
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def described(model: PeftModel, adapter: str) -> Results:
    """Return results without a measurement: what the adapter is, for a card without numbers."""
    return Results(config=describe_adapter(model, adapter))


def check_outgoing(folder: Path, *, adapters: Iterable[str], owner: str, token: str, texts: dict[str, str]) -> None:
    """Refuse to send a folder in which there is anything but an adapter's files, or anything private.

    Each adapter but "default" has a folder. The name of `owner`, the user or organisation that it is sent to, may
    occur. `texts` is what is sent beside the files, by name, such as the commit's message, which may name people. The
    `UsageError` says in which file what was found, and what to change.
    """
    folders, places = set(adapters) - {"default"}, _places()
    typed = [*places, (_PATH, "a path of this machine")]
    everything = [*typed, *_accounts(owner)]
    secrets = {**known_secrets(), token: "the access token"}
    for name, text in texts.items():
        _check_secrets(name, text, secrets)
        _check(name, text, typed)
    for path in sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not _allowed(name, folders):
            known = f"{', '.join(sorted(_FILES))} and pictures as .png, none of your own images"
            raise UsageError(f"{name} is no file of an adapter, and is not sent; take it out: an adapter has {known}.")
        if path.suffix == ".png":
            picture = path.read_bytes().decode("latin-1")
            _check_secrets(name, picture, secrets, written=False)
            _check(name, picture, places)
            continue
        text = header(path) if path.suffix == ".safetensors" else path.read_text(encoding="utf-8")
        _check_secrets(name, text, secrets)
        _check(name, text, everything)
        if path.suffix in (".safetensors", ".json"):
            _check_paths(name, json.loads(text))


def header(path: Path) -> str:
    """Return the JSON in which a safetensors file describes its tensors, with its metadata."""
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")).decode("utf-8")


def _allowed(name: str, folders: set[str]) -> bool:
    parts = name.split("/")
    if len(parts) > 1 and parts[0] in folders:
        parts = parts[1:]
    if parts[0] == filenames.EVAL_RESULTS:
        return len(parts) == 2 and parts[1].endswith(".yaml")
    if len(parts) != 1 or parts[0] in filenames.OF_OWN_DATA:  # the user's own images and texts
        return False
    return parts[0] in _FILES or bool(re.fullmatch(r"[\w-]+\.png", parts[0]))


def _places() -> list[Pattern]:
    """Return the folders in use, whatever they are called."""
    places = {str(Path.home()): "home folder", str(Path.cwd()): "working folder"}
    places |= {tempfile.gettempdir(): "folder of temporary files"}
    return [
        (re.compile(rf"(?<![\w.~/\\:-]){re.escape(place)}(?![\w-])"), f"the {words} of this machine")
        for place, words in places.items() if len(place) > 1
    ]  # fmt: skip


def _accounts(owner: str) -> list[Pattern]:
    """Return the names of this machine's user, unless they say nothing of a person or are the owner's."""
    names = {Path.home().name, *(os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME"))}
    with suppress(OSError, KeyError, ImportError):  # a container's user may have no entry
        names.add(getpass.getuser())
    told = [re.escape(n) for n in sorted(names) if len(n) > 2 and n.lower() not in _ANYBODY | {owner.lower()}]
    # `name/repository` is an id of the Hub, which anybody may see; `../name/folder` is a path
    patterns = [re.compile(rf"(?<![\w-]){name}(?![\w-])(?!(?<![/\\]{name})/\w)") for name in told]
    return [(pattern, "the name of this machine's user") for pattern in patterns]


def _check_secrets(name: str, text: str, known: Mapping[str, str], *, written: bool = True) -> None:
    """Refuse text with a secret; of what nobody has `written`, such as a picture, its form says nothing."""
    if found := next(secrets_in(text, known, by_form=written), None):
        raise _found(name, found)


def _check(name: str, text: str, patterns: Iterable[Pattern]) -> None:
    for pattern, words in patterns:
        if found := pattern.search(text):
            raise _found(name, f"{words}, {found.group()}…" if pattern is _PATH else words)


def _check_paths(name: str, value: Any, where: str = "") -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _check_paths(name, key, f"{where}.{key}")
            _check_paths(name, part, f"{where}.{key}")
    elif isinstance(value, list):
        for part in value:
            _check_paths(name, part, where)
    elif isinstance(value, str) and portable(value) != value:
        raise _found(name, f"a path of this machine in {where.lstrip('.')}")


def _found(name: str, what: str) -> UsageError:
    return UsageError(f"Nothing was sent: {name} holds {what}. Take it out, then push again.")
