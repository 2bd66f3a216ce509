"""Where saved adapters lie: a folder, or one commit of a repository on the Hub, looked at alike.

The revision is resolved once; every file then comes from that commit, through huggingface_hub and into its cache, so
that HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean everywhere. Nothing is written outside that
cache.
"""

import inspect
import itertools
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from torch import nn

from hfproj import limits
from hfproj.backbones.loading import EMBEDDED
from hfproj.errors import AdapterFileError, HubError, UsageError, one_line
from hfproj.filenames import ADAPTER_CONFIG
from hfproj.files import write_atomic
from hfproj.hints import plain_name
from hfproj.hub.failures import FAILURES, explain, is_transient, origin, retry
from hfproj.hub.untrusted import TensorInfo, is_folder_name, regular_file, same_folder, shape_of
from hfproj.redaction import remember
from hfproj.strict_json import short

TRIES = 3  # of a request that fails; then the cache serves, where it can
MOST_ENTRIES = 1000  # of a folder that is listed
MOST_FOLDERS = 200  # that are looked into for adapters
_COMMIT = re.compile(r"[0-9a-f]{40}")
T = TypeVar("T")


class UnreachableError(HubError):
    """The Hub could not be asked at all, so that only the cache is left."""


class Folder:
    """A folder on this machine, which the user calls `where`; `cached` if it is the cache of an unreachable Hub."""

    def __init__(self, root: Path, where: str, *, cached: bool = False):
        self.root, self.where, self.cached = root.resolve(), where, cached

    def size(self, file: str) -> int | None:
        """Return the bytes of a file, or None without one; a link out of the folder is an `AdapterFileError`."""
        path = self.root / file
        return regular_file(path, self.root, self.where).stat().st_size if path.exists() else None

    def get(self, file: str, size: int) -> Path:
        """Return the file's path."""
        return self.root / file

    def listing(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Return the names of the files and of the folders in a folder."""
        path = self.root / folder
        entries = [p for p in sorted(path.iterdir()) if is_folder_name(p.name)] if path.is_dir() else []
        return [p.name for p in entries if not p.is_dir()], [p.name for p in entries if p.is_dir()]


class Remote:
    """A commit of a repository on the Hub; arguments and errors are those of `hfproj.load_head`."""

    def __init__(self, repo_id: str, *, revision: str | None, token: str | bool | None, cache_dir: str | Path | None):
        self.repo_id, self.where, self.revision, self.token = repo_id, repo_id, _checked(revision), token
        remember(token)
        self.folder = _cache_folder(repo_id, cache_dir)
        self._api, wait = HfApi(), constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = self._ask(
            lambda: self._api.model_info(repo_id, revision=revision, expand=["sha"], timeout=wait, token=token)
        )
        self.commit = str(info.sha)
        self._at: dict[str, Any] = {"revision": self.commit, "token": token}
        if not _COMMIT.fullmatch(self.commit):
            raise HubError(f"{constants.ENDPOINT} does not answer as a Hub does; check HF_ENDPOINT.")

    def size(self, file: str) -> int | None:
        """Return the bytes of a file, or None without one; a failure is a `HubError`."""
        url, wait = hf_hub_url(self.repo_id, file, revision=self.commit), constants.HF_HUB_ETAG_TIMEOUT
        try:
            found = self._ask(lambda: get_hf_file_metadata(url, token=self.token, timeout=wait), file)
        except errors.EntryNotFoundError:
            return None
        if found.size is None:
            raise HubError(f"The Hub does not say how large {file} of {self.repo_id} is; try again later.")
        return found.size

    def get(self, file: str, size: int) -> Path:
        """Return the file's place in the cache, downloaded if it is not there yet in full."""

        def download(force: bool) -> str:
            place = self.folder.parent
            return hf_hub_download(self.repo_id, file, cache_dir=place, force_download=force, **self._at)

        for force in (False, True):
            arrived = Path(self._ask(lambda force=force: download(force), file))  # type: ignore[misc]
            if (length := arrived.stat().st_size) == size:
                return arrived
        _forget(arrived)
        what = f"{file} of {self.repo_id} arrived with {length:,} bytes instead of {size:,}"
        raise HubError(f"{what} and was removed again; check the connection and try again.")

    def tensors(self, file: str, size: int) -> dict[str, TensorInfo]:
        """Return what a safetensors file of `size` bytes holds by its header, of which alone it is downloaded."""
        read = self._api.parse_safetensors_file_metadata
        known = "timeout" in inspect.signature(read).parameters  # not in huggingface_hub 1
        wait: dict[str, Any] = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT} if known else {}
        try:
            found = self._ask(lambda: read(self.repo_id, file, **wait, **self._at), file)
            tensors = {name: TensorInfo(info.dtype, shape_of(info.shape)) for name, info in found.tensors.items()}
            least = sum(info.bytes for info in tensors.values())
        except (
            errors.SafetensorsParsingError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            what = f"{self.repo_id}: {file} does not begin with the header of a safetensors file"
            raise AdapterFileError(f"{what} ({one_line(error)}).") from error
        if not least <= size <= least + limits.HEADER_BYTES:
            what = f"{self.repo_id}: {file} has {size:,} bytes, but its header lists tensors of {least:,}"
            raise AdapterFileError(f"{what}; it is damaged or made to mislead.")
        return tensors

    def listing(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Return the names of the files and of the folders in a folder: the first thousand, none that could mislead."""

        def listed() -> list[Any]:
            tree = self._api.list_repo_tree(self.repo_id, folder or None, **self._at)
            return list(itertools.islice(tree, MOST_ENTRIES))

        try:
            entries = self._ask(listed, "the list of files")
        except errors.EntryNotFoundError:
            return [], []
        names = {entry.path.removeprefix(f"{folder}/"): isinstance(entry, RepoFile) for entry in entries}
        sound = sorted(filter(is_folder_name, names))
        return [name for name in sound if names[name]], [name for name in sound if not names[name]]

    def remember(self) -> None:
        """Note in the cache which commit the revision is, once its files are there: for use without a network."""
        revision = self.revision or constants.DEFAULT_REVISION
        if revision != self.commit:
            with suppress(OSError):  # a cache that can only be read serves as well
                write_atomic(self.folder / "refs" / revision, self.commit.encode())

    def _ask(self, call: Callable[[], T], file: str | None = None) -> T:
        """Return what `call` returns, tried again where the failure may pass; `file` is what is asked for."""
        try:
            return retry(call, tries=TRIES)
        except errors.EntryNotFoundError as error:
            if origin(error) is error:
                raise
            self._refuse(origin(error), file)
        except (*FAILURES, KeyError, TypeError) as error:
            self._refuse(error, file)

    def _refuse(self, error: BaseException, file: str | None) -> NoReturn:
        reason = explain(error, self.repo_id)
        if file is None and is_transient(error):
            raise UnreachableError(reason) from error
        missing = isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError)
        what = f"{file} of {self.repo_id}" if file else self.repo_id
        if missing and not isinstance(error, errors.GatedRepoError):
            raise AdapterFileError(f"{what} is no folder and can't be loaded: {reason}.") from error
        raise HubError(f"{what} can't be loaded: {reason}.") from error


def open_source(
    repo: str | Path, *, revision: str | None, token: str | bool | None, cache_dir: str | Path | None
) -> Folder | Remote:
    """Return the folder, the commit on the Hub, or what the cache has of it while the Hub can't be reached.

    Arguments and errors are those of `hfproj.load_head`.
    """
    if isinstance(repo, nn.Module):
        hint = "give its folder or repository; of a model in memory hfproj.detach(model) gives the head"
        raise UsageError(f"Expected a saved adapter, got {type(repo).__name__}; {hint}.")
    if not isinstance(repo, str | os.PathLike):
        hint = "expected a folder written by model.save_pretrained(…), or a name like 'user/name'"
        raise UsageError(f"Expected a saved adapter, got {type(repo).__name__} {short(repo)}; {hint}.")
    name = str(repo)
    if os.path.isdir(name):  # of a name that can be none, it is no folder; `Path.is_dir` raises
        return Folder(Path(name), name)
    if plain_name(name) == plain_name(EMBEDDED):
        how = f"hfproj.load_backbone({EMBEDDED!r})"
        raise AdapterFileError(f"{name!r} is a backbone that ships with the package, and no adapter; {how} loads it.")
    if isinstance(repo, Path) or not is_repo_id(name):
        expected = "expected a folder written by model.save_pretrained(…), or a name like 'user/name'"
        raise AdapterFileError(f"{short(name, 200)} is neither a folder nor a Hub repository; {expected}.")
    try:
        return Remote(name, revision=revision, token=token, cache_dir=cache_dir)
    except UnreachableError as error:
        folder = _cached(name, revision=revision, cache_dir=cache_dir)
        if folder is None:
            cache, part = cache_dir or constants.HF_HUB_CACHE, f"revision {short(revision)} of " * bool(revision)
            what = f"{name} is no folder and can't be loaded: {error}, and the cache {cache} does not have {part}it"
            raise UnreachableError(f"{what}. Check the name, or load it once while the Hub can be reached.") from error
        if not constants.is_offline_mode():
            warnings.warn(f"{error}; {name} comes from the cache, at commit {folder.name[:8]}.", stacklevel=4)
        return Folder(folder, name, cached=True)


def adapters_in(source: Folder | Remote) -> list[str]:
    """Return the names of the adapters in a folder or repository, of any PEFT method, sound or not."""

    def has_config(folder: str) -> bool:
        try:
            return source.size(folder + ADAPTER_CONFIG) is not None
        except AdapterFileError:
            return True

    found: dict[str, str] = {"default": "default"} if has_config("") else {}
    for name in source.listing()[1][:MOST_FOLDERS]:
        if name != "default" and has_config(f"{name}/"):
            first = found.setdefault(same_folder(name), name)
            if first != name:
                what = f"adapter {name!r} of {source.where}, one folder with {first!r} where case does not count"
                warnings.warn(f"Left out: {what}.", stacklevel=3)
    return list(found.values())


def is_repo_id(name: str) -> bool:
    """Return whether the Hub can have a repository of this name."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return True


def _cached(repo_id: str, *, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """Return the folder of a revision in the cache, or None where it was never loaded."""
    folder, revision = _cache_folder(repo_id, cache_dir), revision or constants.DEFAULT_REVISION
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if "/" not in commit and snapshot.is_dir() else None


def _cache_folder(repo_id: str, cache_dir: str | Path | None) -> Path:
    root = Path(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE).expanduser()
    return root / repo_folder_name(repo_id=repo_id, repo_type="model")


def _checked(revision: str | None) -> str | None:
    parts = revision.split("/") if isinstance(revision, str) else []
    if revision is not None and not (parts and all(map(is_folder_name, parts))):
        wanted = "revision to be a branch, a tag, a whole commit or refs/pr/<number>"
        raise UsageError(f"Expected {wanted}, got {short(revision)}.")
    return revision


def _forget(path: Path) -> None:
    """Remove a file of a snapshot with the blob that it is a link to."""
    if path.is_symlink():
        Path(os.path.normpath(path.parent / os.readlink(path))).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
