"""One commit of a repository on the Hub: how large a file is, the file itself, what lies in a folder.

The revision is resolved once; every file then comes from that commit, through huggingface_hub and into its cache, so
that HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean everywhere. Nothing is written outside that
cache.
"""

import itertools
import os
import re
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
    XetDownloadError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from hfproj.errors import AdapterFileError, HubError, UsageError
from hfproj.files import write_atomic
from hfproj.hub.safety import LARGEST_HEADER, TensorInfo, is_folder_name, one_line, short

WAITS = (1.0, 3.0)  # seconds before the second and the third try
LONGEST_WAIT = 30.0  # a server that asks for more gets no second try: the user is told instead
MOST_ENTRIES = 1000  # of a folder that is listed
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_FAILURES = (HTTPError, OSError, ValueError, KeyError, TypeError, RuntimeError, XetDownloadError)

T = TypeVar("T")


class UnreachableError(HubError):
    """The Hub could not be asked at all, so that only the cache is left."""


class Remote:
    """A commit of a repository on the Hub.

    Args:
        repo_id: ``"user/name"``.
        revision: A branch, a tag, a commit or ``"refs/pr/1"``; None is the main branch.
        token: A token, None for HF_TOKEN or the one of ``hf auth login``, False for none.
        cache_dir: The cache; None is that of HF_HOME.

    Raises:
        AdapterFileError: there is no such repository or revision, or none that the token may see.
        HubError: the Hub refuses; `UnreachableError` where it can't be asked at all.
        UsageError: `revision` can't be one.
    """

    def __init__(self, repo_id: str, *, revision: str | None, token: str | bool | None, cache_dir: str | Path | None):
        self.repo_id, self.revision, self.token = repo_id, _checked(revision), token
        self.folder = _cache_folder(repo_id, cache_dir)
        self.cache_dir = self.folder.parent
        self._api, wait = HfApi(), constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = self._ask(
            lambda: self._api.model_info(repo_id, revision=revision, expand=["sha"], timeout=wait, token=token)
        )
        self.commit = str(info.sha)
        if not _COMMIT.fullmatch(self.commit):
            raise HubError(f"{constants.ENDPOINT} does not answer as a Hub does; check HF_ENDPOINT.")

    def size(self, file: str) -> int | None:
        """Return the bytes of a file, or None where this commit has none of that name.

        Raises:
            HubError: the Hub does not tell.
        """
        url = hf_hub_url(self.repo_id, file, revision=self.commit)
        try:
            found = self._ask(
                lambda: get_hf_file_metadata(url, token=self.token, timeout=constants.HF_HUB_ETAG_TIMEOUT), file
            )
        except EntryNotFoundError:
            return None
        if found.size is None:
            raise HubError(f"The Hub does not say how large {file} of {self.repo_id} is; try again later.")
        return found.size

    def get(self, file: str, size: int) -> Path:
        """Return the file's place in the cache, downloaded where it is not there yet in full.

        Raises:
            HubError: it can't be had, or arrived cut short, even after another try.
        """
        for force in (False, True):
            arrived = Path(self._ask(lambda force=force: self._download(file, force), file))  # type: ignore[misc]
            if arrived.stat().st_size == size:
                return arrived
        length = arrived.stat().st_size
        _forget(arrived)
        raise HubError(
            f"{file} of {self.repo_id} arrived with {length:,} bytes instead of {size:,} and was removed again; check "
            "the connection and try again."
        )

    def _download(self, file: str, force: bool) -> str:
        return hf_hub_download(
            self.repo_id,
            file,
            revision=self.commit,
            token=self.token,
            cache_dir=self.cache_dir,
            force_download=force,
        )

    def tensors(self, file: str, size: int) -> dict[str, TensorInfo]:
        """Return what a safetensors file of `size` bytes holds; only its header is read.

        Raises:
            AdapterFileError: it has no such header, or one of another file.
        """
        try:
            found = self._ask(
                lambda: self._api.parse_safetensors_file_metadata(
                    self.repo_id,
                    file,
                    revision=self.commit,
                    token=self.token,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                ),
                file,
            )
            tensors = {name: TensorInfo(info.dtype, tuple(info.shape)) for name, info in found.tensors.items()}
            least = sum(info.bytes for info in tensors.values())
        except (SafetensorsParsingError, AttributeError, LookupError, TypeError) as error:
            raise AdapterFileError(
                f"{self.repo_id}: {file} does not begin with the header of a safetensors file ({one_line(error)})."
            ) from error
        if not least <= size <= least + LARGEST_HEADER:
            raise AdapterFileError(
                f"{self.repo_id}: {file} has {size:,} bytes, but its header lists tensors of {least:,}; it is damaged "
                "or made to mislead."
            )
        return tensors

    def listing(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Return the names of the files and of the folders in a folder: the first thousand, none that could mislead.

        Raises:
            HubError: the Hub does not tell.
        """

        def listed() -> list[Any]:
            tree = self._api.list_repo_tree(self.repo_id, folder or None, revision=self.commit, token=self.token)
            return list(itertools.islice(tree, MOST_ENTRIES))

        try:
            entries = self._ask(listed, "the list of files")
        except EntryNotFoundError:
            return [], []
        files: list[str] = []
        folders: list[str] = []
        for entry in entries:
            name = entry.path.removeprefix(f"{folder}/")
            if is_folder_name(name):
                (files if isinstance(entry, RepoFile) else folders).append(name)
        return sorted(files), sorted(folders)

    def remember(self) -> None:
        """Note in the cache which commit the revision is, once its files are there: for use without a network."""
        revision = self.revision or constants.DEFAULT_REVISION
        if revision != self.commit:
            with suppress(OSError):  # a cache that can only be read serves as well
                write_atomic(self.folder / "refs" / revision, self.commit.encode())

    def _ask(self, call: Callable[[], T], file: str | None = None) -> T:
        """Return what `call` returns, tried again where the failure may pass; `file` is what is asked for."""
        for wait in (*WAITS, None):
            try:
                return call()
            except EntryNotFoundError as error:
                if not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
                    self._refuse(error.__cause__, file)  # "not in the cache" says what kept it from asking the Hub
                raise
            except _FAILURES as error:
                pause = _pause(error, wait)
                if pause is None:
                    self._refuse(error, file)
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _refuse(self, error: BaseException, file: str | None) -> NoReturn:
        """Raise one error that says what the Hub said and what to do."""
        passing = self._passing(error)
        if passing is not None:
            if file is None:
                raise UnreachableError(passing) from error
            raise HubError(f"{file} of {self.repo_id} could not be loaded: {passing}; try again later.") from error
        repo, hub, status = self.repo_id, constants.ENDPOINT, _status(error)
        if isinstance(error, GatedRepoError):
            raise HubError(
                f"{repo} is gated: ask for access at {hub}/{repo}, then pass token=… or run `hf auth login`."
            ) from error
        if isinstance(error, RepositoryNotFoundError):
            raise AdapterFileError(
                f"{repo} is neither a folder nor a Hub repository that you may see at {hub}; check the name, and for "
                "a private one pass token=…, set HF_TOKEN or run `hf auth login`."
            ) from error
        if isinstance(error, RevisionNotFoundError):
            raise AdapterFileError(
                f"{repo} has no revision {short(self.revision)}; give a branch, a tag, a whole commit or "
                "refs/pr/<number>."
            ) from error
        if status == 401:
            said = f"{hub} does not accept the token (401); check token=… and HF_TOKEN, or run `hf auth login`."
        elif status == 403:
            said = f"{hub} does not let this token read {repo} (403); use one with that right."
        elif _of_disk(error):
            said = f"{file} of {repo} could not be stored in {self.cache_dir} ({one_line(error)})."
        else:
            said = f"{hub} did not give {file or repo} as asked ({status or one_line(error)})."
        raise HubError(said) from error

    def _passing(self, error: BaseException) -> str | None:
        """Return in words what failed, or None where it was no failure that may pass."""
        hub, status = constants.ENDPOINT, _status(error)
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set"
        if status == 429:
            seconds = _retry_after(error)
            return f"{hub} asks to wait {f'{seconds:.0f} seconds' if seconds else 'a while'} before more requests (429)"
        if _of_disk(error) or (status is not None and status not in _PASSING):
            return None
        return f"{hub} can't be reached ({one_line(error)})" if status is None else f"{hub} fails ({status})"


def cached_folder(repo_id: str, *, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """Return the folder of a revision in the cache, or None where it was never loaded.

    Raises:
        UsageError: `revision` can't be one.
    """
    folder = _cache_folder(repo_id, cache_dir)
    revision = _checked(revision) or constants.DEFAULT_REVISION
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if "/" not in commit and snapshot.is_dir() else None


def is_repo_id(name: str) -> bool:
    """Return whether the Hub can have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def warn_stale(reason: str, repo_id: str, commit: str) -> None:
    """Warn that an adapter comes from the cache, since the Hub did not answer."""
    warnings.warn(f"{reason}; {repo_id} comes from the cache, at commit {commit[:8]}.", stacklevel=5)


def _cache_folder(repo_id: str, cache_dir: str | Path | None) -> Path:
    root = Path(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE).expanduser()
    return root / repo_folder_name(repo_id=repo_id, repo_type="model")


def _checked(revision: str | None) -> str | None:
    if revision is None:
        return None
    parts = revision.split("/") if isinstance(revision, str) else []
    if not parts or not all(map(is_folder_name, parts)):
        raise UsageError(f"revision={short(revision)}: expected a branch, a tag, a whole commit or refs/pr/<number>.")
    return revision


def _forget(path: Path) -> None:
    """Remove a file of a snapshot with the blob that it is a link to."""
    if path.is_symlink():
        Path(os.path.normpath(path.parent / os.readlink(path))).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _pause(error: BaseException, wait: float | None) -> float | None:
    """Return the seconds to wait before another try, or None where none will help."""
    if wait is None or isinstance(error, OfflineModeIsEnabled | ValueError | KeyError | TypeError):
        return None
    status = _status(error)
    if status is not None:
        pause = max(wait, _retry_after(error) or 0.0)
        return pause if status in _PASSING and pause <= LONGEST_WAIT else None
    return None if _of_disk(error) else wait


def _of_disk(error: BaseException) -> bool:
    """Whether it is the disk that failed, not the network."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | HTTPError)


def _retry_after(error: BaseException) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = str(headers.get("Retry-After", "")).strip()
    return float(value) if value.isdigit() else None
