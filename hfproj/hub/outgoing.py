"""What leaves this machine: only files of an adapter, without a token, a path or a user name of this machine."""

import dataclasses
import getpass
import json
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hfproj import filenames
from hfproj.errors import UsageError
from hfproj.files import TOKEN, portable
from hfproj.results import Results

_FILES = {
    filenames.ADAPTER_CONFIG, filenames.ADAPTER_WEIGHTS, filenames.CARD, filenames.RESULTS, filenames.PREPROCESSING,
    filenames.OBJECTIVE, filenames.EMA,
}  # fmt: skip
_SECRET = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_?KEY)$")
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


def without_tokens(results: Results) -> Results:
    """Return `results` with ``$HF_TOKEN`` in place of each token of the Hub; as a command it still runs.

    Example:
        >>> without_tokens(Results(command="python train.py --hub_token hf_" + 34 * "a")).command
        'python train.py --hub_token $HF_TOKEN'
    """
    return dataclasses.replace(
        results,
        **{name: _replaced(getattr(results, name)) for name in ("config", "command", "log", "notes", "geometry")},
    )


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return TOKEN.sub("$HF_TOKEN", value)
    if isinstance(value, dict):
        return {_replaced(k): _replaced(v) for k, v in value.items()}
    return [_replaced(v) for v in value] if isinstance(value, list | tuple) else value


Pattern = tuple[re.Pattern[str], str]  # what may not occur in what is sent, with the words for it


def check_outgoing(folder: Path, *, adapters: Iterable[str], owner: str, token: str, texts: dict[str, str]) -> None:
    """Refuse to send a folder in which there is anything but an adapter's files, or anything private.

    Args:
        folder: What is about to be sent.
        adapters: Names of its adapters; each but "default" has a folder.
        owner: User or organisation that it is sent to, whose name may occur.
        token: The token in use.
        texts: What is sent beside the files, by name, such as the commit's message, which may name people.

    Raises:
        UsageError: If there is; it says in which file, and what to change.
    """
    folders, secrets = set(adapters) - {"default"}, _secrets(token)
    typed = [*secrets, (_PATH, "a path of this machine")]
    everything = [*typed, *_accounts(owner)]
    for name, text in texts.items():
        _check(name, text, typed)
    for path in sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not _allowed(name, folders):
            raise UsageError(
                f"{name} is no file of an adapter, so it is not sent; take it out: an adapter has "
                f"{', '.join(sorted(_FILES))} and pictures as .png."
            )
        if path.suffix == ".png":
            _check(name, path.read_bytes().decode("latin-1"), secrets)
            continue
        text = header(path) if path.suffix == ".safetensors" else path.read_text(encoding="utf-8")
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
    return len(parts) == 1 and (parts[0] in _FILES or bool(re.fullmatch(r"[\w-]+\.png", parts[0])))


def _secrets(token: str) -> list[Pattern]:
    """Return tokens, passwords of the environment, and the folders in use whatever they are called."""
    values = {value: f"the value of ${name}" for name, value in os.environ.items() if _SECRET.search(name.upper())}
    found = {value: words for value, words in values.items() if len(value) >= 12} | {token: "the access token"}
    places = {str(Path.home()): "home folder", str(Path.cwd()): "working folder"}
    places |= {tempfile.gettempdir(): "folder of temporary files"}
    return [
        *((re.compile(re.escape(value)), words) for value, words in found.items()),
        *(
            (re.compile(rf"(?<![\w.~/\\:-]){re.escape(place)}(?![\w-])"), f"the {words} of this machine")
            for place, words in places.items()
            if len(place) > 1
        ),
        (TOKEN, "an access token"),
    ]


def _accounts(owner: str) -> list[Pattern]:
    """Return the names of this machine's user, unless they say nothing of a person or are the owner's."""
    names = {Path.home().name, *(os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME"))}
    with suppress(OSError, KeyError, ImportError):  # a container's user may have no entry
        names.add(getpass.getuser())
    told = [re.escape(n) for n in sorted(names) if len(n) > 2 and n.lower() not in _ANYBODY | {owner.lower()}]
    # `name/repository` is an id of the Hub, which anybody may see; `../name/folder` is a path
    patterns = [re.compile(rf"(?<![\w-]){name}(?![\w-])(?!(?<![/\\]{name})/\w)") for name in told]
    return [(pattern, "the name of this machine's user") for pattern in patterns]


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
