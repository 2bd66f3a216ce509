"""The checked files of a saved adapter, from a folder or from one commit of a repository on the Hub.

Only what is asked for is downloaded: the configuration first, which says what the tensors have to be; then the tensors,
once their size fits. A file that is not what it has to be is refused with the reason, see `hfproj.hub.safety`; a pickle
is never opened. The result is a folder that PEFT can load.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from peft.utils import WEIGHTS_NAME

from hfproj.backbones.preprocessing import settings_of
from hfproj.errors import AdapterFileError, HfprojError, UsageError
from hfproj.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EMA, OBJECTIVE, PREPROCESSING, RESULTS
from hfproj.hub.remote import Remote, UnreachableError, cached_folder, is_repo_id, warn_stale
from hfproj.hub.safety import (
    LARGEST_CONFIG,
    LARGEST_JSON,
    adapter_folder,
    check_finite,
    is_folder_name,
    read_header,
    read_json,
    regular_file,
    short,
)
from hfproj.hub.strangers import read_config
from hfproj.hub.tensors import check_tensors, head_tensors, plausible_size
from hfproj.results import Results
from hfproj.tuner.config import ProjectionHeadConfig

HEADER_FIRST = 1 << 26  # bytes from which on a file's header is read before the rest is downloaded
MOST_FOLDERS = 200  # that are looked into for adapters
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Folder:
    """A folder on this machine, looked at as `Remote` looks at a repository.

    Args:
        root: The folder.
        where: What the user calls it.
        cached: Whether it is what the cache has of a repository that can't be reached.
    """

    def __init__(self, root: Path, where: str, *, cached: bool = False):
        self.root, self.where, self.cached = root.resolve(), where, cached

    def size(self, file: str) -> int | None:
        """Return the bytes of a file, or None where there is none of that name.

        Raises:
            AdapterFileError: it is a link out of the folder, or no regular file.
        """
        path = self.root / file
        if not path.exists():
            return None
        return regular_file(path, self.root, self.where).stat().st_size

    def get(self, file: str, size: int) -> Path:
        """Return the file's path."""
        return self.root / file

    def listing(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Return the names of the files and of the folders in a folder."""
        path = self.root / folder
        entries = [p for p in sorted(path.iterdir()) if is_folder_name(p.name)] if path.is_dir() else []
        return [p.name for p in entries if not p.is_dir()], [p.name for p in entries if p.is_dir()]


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter whose configuration and tensors have been checked.

    Attributes:
        where: The adapter in words, for messages.
        folder: Its files on this machine, as PEFT loads them.
        config: Its configuration.
        source: Where it comes from.
        prefix: Of its files there: empty, or the name of its folder and a slash.
    """

    where: str
    folder: Path
    config: ProjectionHeadConfig
    source: Folder | Remote
    prefix: str

    @property
    def local(self) -> bool:
        """Whether it lies in a folder that the user named."""
        return isinstance(self.source, Folder) and not self.source.cached

    def file(self, name: str) -> Path | None:
        """Return another file of the adapter, checked, or None where it has none.

        Args:
            name: `RESULTS`, `PREPROCESSING`, `OBJECTIVE` or `EMA` of `hfproj.filenames`. For an adapter in a folder
                of its own it may lie in the root, too, where that has no adapter (a checkpoint); preprocessing always.

        Raises:
            AdapterFileError: the file is damaged or hostile.
            HubError: it can't be had.
        """
        size = self.source.size(self.prefix + name)
        if size is not None:
            return self._checked(name, self.prefix + name, size)
        shared = self.prefix and (name == PREPROCESSING or self.source.size(ADAPTER_CONFIG) is None)
        size = self.source.size(name) if shared else None
        return None if size is None else self._checked(name, name, size)

    def _checked(self, name: str, file: str, size: int) -> Path:
        largest = {RESULTS: LARGEST_JSON, PREPROCESSING: LARGEST_CONFIG}.get(name)
        if largest is not None and size > largest:
            raise AdapterFileError(f"{self.where}: {name} has {size:,} bytes, more than the {largest:,} expected.")
        if largest is None and isinstance(self.source, Remote) and size >= HEADER_FIRST:
            self.source.tensors(file, size)
        path = self.source.get(file, size)
        if name == RESULTS:
            read_json(path, self.where, largest=LARGEST_JSON)
            Results.load(path)
        elif name == PREPROCESSING:
            found = read_json(path, self.where)
            try:
                settings_of(found, f"{self.where}: {PREPROCESSING}", size=1)
            except UsageError as error:
                raise AdapterFileError(str(error)) from error
        elif name in (OBJECTIVE, EMA):
            read_header(path, self.where)
            if name == EMA:  # a queue may begin with infinity, weights may not
                check_finite(path, self.where)
        else:
            raise UsageError(f"{name!r} is no file beside an adapter.")
        return path


def open_adapter(
    repo: str | Path,
    *,
    adapter: str = "default",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> SavedAdapter:
    """Return a saved adapter, downloaded where it is on the Hub, and checked; arguments, errors: as `fetch_adapter`."""
    folder = adapter_folder(adapter)
    source = open_source(repo, revision=revision, token=token, cache_dir=cache_dir)
    where, prefix = (f"{repo} (adapter {adapter!r})", f"{folder}/") if folder else (str(repo), "")
    size = source.size(prefix + ADAPTER_CONFIG)
    if size is None:
        raise AdapterFileError(_no_config(source, where, folder))
    if size > LARGEST_CONFIG:
        raise AdapterFileError(
            f"{where}: {ADAPTER_CONFIG} has {size:,} bytes, more than the {LARGEST_CONFIG:,} that such a file may have."
        )
    config_file = source.get(prefix + ADAPTER_CONFIG, size)
    config = read_config(config_file, where)
    size = source.size(prefix + ADAPTER_WEIGHTS)
    if size is None:
        raise AdapterFileError(_no_weights(source, where, folder))
    expected = head_tensors(config, where)
    if isinstance(source, Remote):
        low, high = plausible_size(expected, config)
        if size < low or (high is not None and size > high):
            limits = f"at least {low:,}" if size < low else f"at most {high:,}"
            raise AdapterFileError(
                f"{where}: {ADAPTER_WEIGHTS} is damaged or cut short, or belongs to another config: it has {size:,} "
                f"bytes, {ADAPTER_CONFIG} asks for {limits}; download or save it again."
            )
        if size >= HEADER_FIRST:
            check_tensors(source.tensors(prefix + ADAPTER_WEIGHTS, size), expected, config, where)
    weights = source.get(prefix + ADAPTER_WEIGHTS, size)
    check_tensors(read_header(weights, where), expected, config, where)
    check_finite(weights, where)
    if isinstance(source, Remote):
        source.remember()
    return SavedAdapter(where, config_file.parent, config, source, prefix)


def fetch_adapter(
    repo: str | Path,
    *,
    adapter: str = "default",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    also: Iterable[str] = (),
) -> Path:
    """Return the folder on this machine with the checked files of a saved adapter, as ``PeftModel`` loads it.

    Args:
        repo: A folder written by ``save_pretrained``, or the id of a repository on the Hub.
        adapter: Which one, where there are several: the name it was saved under.
        revision: Branch, tag, commit or ``"refs/pr/<number>"`` of the repository; every file comes from one commit.
        token: For a private repository; None takes HF_TOKEN or that of ``hf auth login``.
        cache_dir: Where downloads are kept; None is huggingface_hub's cache.
        also: Further files to download and check where the repository has them (`hfproj.filenames`: `RESULTS`,
            `PREPROCESSING`, `OBJECTIVE`, `EMA`).

    Raises:
        AdapterFileError: there is no such adapter, or it is damaged or hostile.
        HubError: the Hub refuses or can't be reached.
        UsageError: `adapter` or `revision` is no name of one.
    """
    saved = open_adapter(repo, adapter=adapter, revision=revision, token=token, cache_dir=cache_dir)
    for name in also:
        saved.file(name)
    return saved.folder


def open_source(
    repo: str | Path, *, revision: str | None, token: str | bool | None, cache_dir: str | Path | None
) -> Folder | Remote:
    """Return the folder, the commit on the Hub, or what the cache has of it while the Hub can't be reached.

    Raises:
        AdapterFileError: there is none.
        HubError: the Hub refuses, or can't be reached and the cache has nothing.
        UsageError: `revision` can't be one.
    """
    name = str(repo)
    if os.path.isdir(name):  # of a name that can be none, it is no folder; `Path.is_dir` raises
        return Folder(Path(name), name)
    if isinstance(repo, Path) or not is_repo_id(name):
        raise AdapterFileError(
            f"{short(name, 200)} is neither a folder nor a Hub repository; expected a folder written by "
            "model.save_pretrained(…), or a name like 'user/name'."
        )
    try:
        return Remote(name, revision=revision, token=token, cache_dir=cache_dir)
    except UnreachableError as error:
        folder = cached_folder(name, revision=revision, cache_dir=cache_dir)
        if folder is None:
            of_it = f"of its revision {short(revision)}" if revision else "of it"
            cache = cache_dir or constants.HF_HUB_CACHE
            raise UnreachableError(
                f"{name} is no folder and can't be loaded: {error}, and the cache {cache} has nothing {of_it}. Check "
                "the name, or load it once while the Hub can be reached."
            ) from error
        if not constants.is_offline_mode():
            warn_stale(str(error), name, folder.name)
        return Folder(folder, name, cached=True)


def adapters_in(source: Folder | Remote) -> list[str]:
    """Return the names of the adapters in a folder or repository, of any PEFT method, sound or not."""

    def has_config(folder: str) -> bool:
        try:
            return source.size(folder + ADAPTER_CONFIG) is not None
        except AdapterFileError:
            return True

    found = [n for n in source.listing()[1][:MOST_FOLDERS] if n != "default" and has_config(f"{n}/")]
    return ["default"] * has_config("") + found


def _no_config(source: Folder | Remote, where: str, folder: str) -> str:
    try:
        others = [name for name in adapters_in(source) if name != (folder or "default")]
    except HfprojError:
        others = []
    if others:
        return f"{where}: there is no such adapter; there are: {', '.join(others[:20])}. Say adapter={others[0]!r}."
    if isinstance(source, Folder) and source.cached:
        return f"{where}: the cache has no {ADAPTER_CONFIG} of it; load it once while the Hub can be reached."
    return f"{where} has no {ADAPTER_CONFIG}; expected what model.save_pretrained(…) or hfproj.push_to_hub(…) wrote."


def _no_weights(source: Folder | Remote, where: str, folder: str) -> str:
    files = source.listing(folder)[0]
    pickles = [name for name in files if name == WEIGHTS_NAME or name.lower().endswith(_PICKLES)]
    if pickles:
        return (
            f"{where} has its tensors as a pickle only ({short(pickles[0])[1:-1]}), which can run code when it is "
            f"loaded and is never opened; ask for {ADAPTER_WEIGHTS} instead."
        )
    if isinstance(source, Folder) and source.cached:
        return f"{where}: the cache has no {ADAPTER_WEIGHTS} of it; load it once while the Hub can be reached."
    return f"{where} has no {ADAPTER_WEIGHTS}; save the adapter again with model.save_pretrained(…)."
