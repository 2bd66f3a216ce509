"""The checked files of a saved adapter, from a folder or from one commit of a repository on the Hub.

Only what is asked for is downloaded: the configuration first, which says what the tensors have to be; then the tensors,
once their size fits. A file that is not what it has to be is refused with the reason, see `hfproj.hub.untrusted`; a
pickle is never opened. The result is a folder that PEFT can load.
"""

from dataclasses import dataclass
from pathlib import Path

from peft.utils import WEIGHTS_NAME

from hfproj.backbones.preprocessing import settings_of
from hfproj.errors import AdapterFileError, HfprojError, UsageError
from hfproj.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EMA, OBJECTIVE, PREPROCESSING, RESULTS
from hfproj.hub import untrusted
from hfproj.hub.sources import Folder, Remote, adapters_in, open_source
from hfproj.hub.tensors import check_tensors, head_tensors, plausible_size
from hfproj.hub.untrusted import check_finite, check_size, is_folder_name, read_header, read_json, short
from hfproj.hub.validation import read_config
from hfproj.results import Results
from hfproj.tuner.config import ProjectionHeadConfig

HEADER_FIRST = 1 << 26  # bytes from which on a file's header is read before the rest is downloaded
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter whose configuration and tensors have been checked."""

    where: str  # the adapter in words, for messages
    folder: Path  # its files on this machine, as PEFT loads them
    config: ProjectionHeadConfig
    source: Folder | Remote
    prefix: str  # of its files there: empty, or the name of its folder and a slash

    @property
    def local(self) -> bool:
        """Whether it lies in a folder that the user named."""
        return isinstance(self.source, Folder) and not self.source.cached

    def file(self, name: str) -> Path | None:
        """Return another file of the adapter, checked, or None if it has none.

        Args:
            name: `RESULTS`, `PREPROCESSING`, `OBJECTIVE` or `EMA` of `hfproj.filenames`. For an adapter in a folder
                of its own it may lie in the root, too, where that has no adapter (a checkpoint); preprocessing always.

        Raises:
            AdapterFileError: If the file is damaged or hostile.
            HubError: If the Hub does not give it.
        """
        file = self.prefix + name
        size = self.source.size(file)
        if size is None and self.prefix and (name == PREPROCESSING or self.source.size(ADAPTER_CONFIG) is None):
            file, size = name, self.source.size(name)
        if size is None:
            return None
        largest = untrusted.LARGEST_JSON if name == RESULTS else untrusted.LARGEST_CONFIG
        if name in (RESULTS, PREPROCESSING):
            check_size(name, size, self.where, largest=largest)
        elif isinstance(self.source, Remote) and size >= HEADER_FIRST:
            self.source.tensors(file, size)
        path = self.source.get(file, size)
        if name == RESULTS:
            read_json(path, self.where, largest=largest)
            Results.load(path)
        elif name == PREPROCESSING:
            try:
                settings_of(read_json(path, self.where), f"{self.where}: {PREPROCESSING}", size=1)
            except UsageError as error:
                raise AdapterFileError(str(error)) from error
        elif name in (OBJECTIVE, EMA):
            read_header(path, self.where)
            if name == EMA:  # a queue may begin with infinity, weights may not
                check_finite(path, self.where)
        else:
            raise UsageError(f"name={name!r}: expected {RESULTS}, {PREPROCESSING}, {OBJECTIVE} or {EMA}.")
        return path


def open_adapter(
    repo: str | Path,
    *,
    adapter: str = "default",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> SavedAdapter:
    """Return a saved adapter, downloaded if it is on the Hub, and checked.

    The arguments are those of `hfproj.load_head`. Further files are downloaded by `SavedAdapter.file`.

    Raises:
        AdapterFileError: If there is no such adapter, or it is damaged or hostile.
        HubError: If the Hub refuses or can't be reached.
        UsageError: If `adapter` or `revision` can't be the name of one.
    """
    if not is_folder_name(adapter):
        raise UsageError(
            f"adapter={short(adapter)}: expected the name of an adapter, which is that of one folder inside the "
            "repository, without slashes; 'default' is the one in its root."
        )
    folder = "" if adapter == "default" else adapter
    source = open_source(repo, revision=revision, token=token, cache_dir=cache_dir)
    where, prefix = (f"{repo} (adapter {adapter!r})", f"{folder}/") if folder else (str(repo), "")
    config_file = config_of(source, prefix, where)
    if config_file is None:
        raise AdapterFileError(_no_config(source, where, adapter))
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


def config_of(source: Folder | Remote, prefix: str, where: str) -> Path | None:
    """Return the file with an adapter's configuration, or None without one; a huge one is an `AdapterFileError`."""
    size = source.size(prefix + ADAPTER_CONFIG)
    if size is None:
        return None
    check_size(ADAPTER_CONFIG, size, where)
    return source.get(prefix + ADAPTER_CONFIG, size)


def _no_config(source: Folder | Remote, where: str, adapter: str) -> str:
    try:
        others = [name for name in adapters_in(source) if name != adapter]
    except HfprojError:
        others = []
    if others:
        return f"{where} is no saved adapter; there are: {', '.join(others[:20])}. Say adapter={others[0]!r}."
    return _absent(source, where, ADAPTER_CONFIG)


def _no_weights(source: Folder | Remote, where: str, folder: str) -> str:
    pickles = [n for n in source.listing(folder)[0] if n == WEIGHTS_NAME or n.lower().endswith(_PICKLES)]
    if pickles:
        return (
            f"{where} has its tensors as a pickle only ({short(pickles[0])[1:-1]}), which can run code when it is "
            f"loaded and is never opened; ask for {ADAPTER_WEIGHTS} instead."
        )
    return _absent(source, where, ADAPTER_WEIGHTS)


def _absent(source: Folder | Remote, where: str, file: str) -> str:
    if isinstance(source, Folder) and source.cached:
        return f"{where}: the cache has no {file} of it; load it once while the Hub can be reached."
    return f"{where} has no {file}; expected what model.save_pretrained(…) or hfproj.push_to_hub(…) wrote."
