"""Loading a saved adapter: onto its backbone (`from_pretrained`), or its head alone (`load_head`).

A folder and a repository on the Hub are treated alike. Only what is asked for is downloaded: the configuration first,
which says what the tensors have to be; then the tensors, once their size fits. What is damaged, hostile or meant for
another backbone is refused in one line; a pickle is never opened, and nothing that a file says is run.

Here and everywhere, `adapter` is the name of an adapter in a folder or repository, and `adapter_name`, as in PEFT, its
name in a model.
"""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.utils import WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from hfproj import limits
from hfproj.backbones import load_backbone, main_input_of
from hfproj.backbones.allowance import allowance
from hfproj.backbones.preprocessing import OF_ADAPTER, has_preprocessing, settings_of
from hfproj.checking import checked
from hfproj.errors import AdapterFileError, HfprojError, UsageError, check_choice, one_line
from hfproj.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EMA, OBJECTIVE, PREPROCESSING, RESULTS
from hfproj.hub import sizes, validation
from hfproj.hub.sources import Folder, Remote, adapters_in, open_source
from hfproj.hub.untrusted import check_finite, is_folder_name, read_header
from hfproj.hub.validation import HEAD_KEYS, check_tensors, read_config
from hfproj.results import Results
from hfproj.strict_json import check_size, read_json, short
from hfproj.tuner.config import ProjectionHeadConfig
from hfproj.tuner.layer import CHILD, HeadModules
from hfproj.tuner.soundness import check_head
from hfproj.typing import OneOf

HEADER_FIRST = 1 << 26  # bytes from which on a file's header is read before the rest is downloaded
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@checked
def from_pretrained(
    repo: str | Path, *, adapter: str = "default", backbone: nn.Module | None = None, adapter_name: str | None = None,
    is_trainable: bool = False, revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | Path | None = None, low_cpu_mem_usage: bool = False,
    backbone_check: OneOf["error", "warn"] = "error",
) -> PeftModel:  # fmt: skip
    """Load an adapter together with the backbone it was trained on.

    Args:
        repo: A folder written by ``save_pretrained``, or the id of a repository on the Hub.
        adapter: Which adapter of `repo`, by the name it was saved under (`list_adapters`).
        backbone: The backbone, if it is loaded already; None loads the one that the adapter's config names.
        adapter_name: Its name in the model; None keeps the one it has in `repo`, with "_" for each dot.
        is_trainable: Whether training goes on; False freezes the adapter and sets eval mode.
        revision: Branch, tag, commit or ``"refs/pr/<number>"`` of the repository; every file comes from one commit.
        token: For a private repository; None takes HF_TOKEN or that of ``hf auth login``. The backbone is loaded with
            the latter.
        cache_dir: Where downloads of the adapter are kept; None is huggingface_hub's cache.
        low_cpu_mem_usage: Make the head on the meta device before its weights arrive.
        backbone_check: ``"warn"`` if a backbone with other weights than the adapter was made on is meant; the adapter's
            card says so when it is pushed.

    Raises:
        AdapterFileError: If there is no such adapter, it is damaged or hostile, its tensors are those of another
            head or backbone, or the backbone is not the one that it was made on.
        HubError: If the Hub refuses or can't be reached.
        UsageError: If the config does not say which backbone to load, or `backbone` carries a head already.

    Example:
        >>> import tempfile, hfproj
        >>> from peft import get_peft_model
        >>> model = get_peft_model(hfproj.load_backbone("vit_nano"), hfproj.ProjectionHeadConfig(out_dim=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     from_pretrained(folder, adapter_name="student").active_adapter
        'student'
    """
    if backbone is not None and (isinstance(backbone, PeftModel) or hasattr(backbone, CHILD)):
        hint = "use model.load_adapter(repo, name) to put a second head beside it, model.unload() to start from it bare"
        raise UsageError(f"This backbone carries an adapter already; {hint}.")
    saved = open_adapter(repo, adapter=adapter, revision=revision, token=token, cache_dir=cache_dir)
    check_choice("backbone_check", backbone_check, ("error", "warn"))
    saved.config.backbone_check = backbone_check
    if backbone is None:
        backbone = _load_backbone(saved)
    sizes.check_rank(saved.config, backbone, saved.where)
    preprocessing = _preprocessing(backbone, saved)
    name = adapter_name or adapter.replace(".", "_")  # modules can't be named with a dot
    if name != adapter and is_folder_name(name) and saved.source.size(f"{name}/{ADAPTER_CONFIG}") is not None:
        words = f"adapter {adapter!r} of {repo} gets the name of another one there; adapter={name!r} loads that one."
        warnings.warn(f"adapter_name={name!r}: {words}", stacklevel=2)
    model = _attach(backbone, saved, name, is_trainable, low_cpu_mem_usage)
    if preprocessing is not None:
        backbone.__dict__[OF_ADAPTER] = preprocessing
    return model


@checked
def load_head(
    repo: str | Path, *, adapter: str = "default", revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> nn.Module:  # fmt: skip
    """Load the head of a saved adapter without any backbone: ``z = head(h)``, in eval mode.

    Args:
        repo: A folder written by ``save_pretrained``, or the id of a repository on the Hub.
        adapter: Which adapter of `repo`, by the name it was saved under (`list_adapters`).
        revision: Branch, tag, commit or ``"refs/pr/<number>"`` of the repository; every file comes from one commit.
        token: For a private repository; None takes HF_TOKEN or that of ``hf auth login``.
        cache_dir: Where downloads are kept; None is huggingface_hub's cache.

    Raises:
        AdapterFileError: If there is no such adapter, or it is damaged or hostile.
        HubError: If the Hub refuses or can't be reached.
        UsageError: If `adapter` or `revision` can't be the name of one.
    """
    saved = open_adapter(repo, adapter=adapter, revision=revision, token=token, cache_dir=cache_dir)
    modules = HeadModules(saved.config, cast(int, saved.config.in_dim))
    tensors = load_file(saved.folder / ADAPTER_WEIGHTS)
    modules.load_state_dict({k.removeprefix(HEAD_KEYS): v for k, v in tensors.items() if k.startswith(HEAD_KEYS)})
    check_head(modules, {}, modules.head.in_dim)
    return modules.head.eval()


@checked
def list_adapters(
    repo: str | Path, *, revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, ProjectionHeadConfig]:  # fmt: skip
    """Return the adapters with a projection head in a folder or repository, by the name that `adapter=` takes.

    One whose configuration can't be read is left out with a warning that says why; adapters of other PEFT methods are
    left out silently. No tensors are downloaded.

    Args:
        repo: A folder written by ``save_pretrained``, or the id of a repository on the Hub.
        revision: Branch, tag, commit or ``"refs/pr/<number>"`` of the repository.
        token: For a private repository; None takes HF_TOKEN or that of ``hf auth login``.
        cache_dir: Where downloads are kept; None is huggingface_hub's cache.

    Raises:
        AdapterFileError: If there is no such folder or repository.
        HubError: If the Hub refuses or can't be reached.
        UsageError: If `revision` can't be the name of one.
    """
    source = open_source(repo, revision=revision, token=token, cache_dir=cache_dir)
    found = {}
    for name in adapters_in(source):
        where = f"{repo} (adapter {name!r})"
        try:
            path = config_of(source, "" if name == "default" else f"{name}/", where)
            if path is not None and read_json(path, where).get("peft_type") == "PROJECTION_HEAD":
                found[name] = read_config(path, where)
        except HfprojError as error:
            warnings.warn(f"Left out: {error}", stacklevel=2)
    return found


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter whose configuration and tensors have been checked."""

    where: str  # the adapter in words, for messages
    folder: Path  # its files on this machine, as PEFT loads them
    config: ProjectionHeadConfig
    source: Folder | Remote
    prefix: str  # of its files there: empty, or the name of its folder and a slash

    @property
    def bytes(self) -> int:
        """Size of its file of tensors."""
        return (self.folder / ADAPTER_WEIGHTS).stat().st_size

    @property
    def local(self) -> bool:
        """Whether it lies in a folder that the user named."""
        return isinstance(self.source, Folder) and not self.source.cached

    def file(self, name: str) -> Path | None:
        """Return another file of the adapter, checked, or None if it has none; errors are those of `load_head`.

        `name` is `RESULTS`, `PREPROCESSING`, `OBJECTIVE` or `EMA` of `hfproj.filenames`. For an adapter in a folder of
        its own it may lie in the root, too, where that has no adapter (a checkpoint); preprocessing always.
        """
        file = self.prefix + name
        size = self.source.size(file)
        if size is None and self.prefix and (name == PREPROCESSING or self.source.size(ADAPTER_CONFIG) is None):
            file, size = name, self.source.size(name)
        if size is None:
            return None
        largest = limits.RESULTS_BYTES if name == RESULTS else limits.CONFIG_BYTES
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
            raise UsageError(f"Expected name to be {RESULTS}, {PREPROCESSING}, {OBJECTIVE} or {EMA}, got {name!r}.")
        return path


def open_adapter(
    repo: str | Path, *, adapter: str = "default", revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> SavedAdapter:  # fmt: skip
    """Return a saved adapter, downloaded if it is on the Hub, and checked.

    Arguments and errors are those of `hfproj.load_head`. Further files are downloaded by `SavedAdapter.file`.
    """
    if not is_folder_name(adapter):
        hint = "which is that of one folder inside the repository, without slashes; 'default' is the one in its root"
        raise UsageError(f"Expected adapter to be the name of an adapter, {hint}, got {short(adapter)}.")
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
    expected = validation.head_tensors(config, where)
    if sizes.is_large(config.objective):
        sizes.check_objective(config, where, backing=source.size(prefix + OBJECTIVE) or 0)
    if isinstance(source, Remote):
        low, high = sizes.plausible_size(expected, config)
        if size < low or (high is not None and size > high):
            limits = f"at least {low:,}" if size < low else f"at most {high:,}"
            what = f"it has {size:,} bytes, {ADAPTER_CONFIG} asks for {limits}; download or save it again"
            where = f"{where}: {ADAPTER_WEIGHTS}"
            raise AdapterFileError(f"{where} is damaged or cut short, or belongs to another config: {what}.")
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
        what = f"which can run code when it is loaded and is never opened; ask for {ADAPTER_WEIGHTS} instead"
        return f"{where} has its tensors as a pickle only ({short(pickles[0])[1:-1]}), {what}."
    return _absent(source, where, ADAPTER_WEIGHTS)


def _absent(source: Folder | Remote, where: str, file: str) -> str:
    if isinstance(source, Folder) and source.cached:
        return f"{where}: the cache has no {file} of it; load it once while the Hub can be reached."
    if "config.json" in source.listing()[0] and file == ADAPTER_CONFIG:
        return f"{where} has no {file}: it is a model of its own; hfproj.load_backbone loads it, without a head."
    return f"{where} has no {file}; expected what model.save_pretrained(…) or hfproj.push_to_hub(…) wrote."


def _load_backbone(saved: SavedAdapter) -> nn.Module:
    source = validation.backbone_source(saved.config, saved.where, local=saved.local)
    try:
        sizes.check_backbone_size(source, saved.where, backing=saved.bytes)
        return load_backbone(**source)
    except HfprojError:
        raise
    except Exception as error:  # whatever the files of another third party do to transformers or timm
        what = f"{saved.where}: its backbone {short(source['name'])} can't be loaded ({one_line(error)})"
        raise AdapterFileError(f"{what}; load it yourself and pass it as backbone=.") from error


def _attach(
    backbone: nn.Module, saved: SavedAdapter, name: str, is_trainable: bool, low_cpu_mem_usage: bool
) -> PeftModel:
    """Return the backbone with the adapter; where that fails, the backbone is left as it was."""
    config, folder = copy.deepcopy(saved.config), str(saved.folder)
    config.inference_mode = not is_trainable
    options = {"adapter_name": name, "is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
    options["key_mapping"] = getattr(backbone, "_checkpoint_conversion_mapping", {})
    if {"cpu", "disk"} & set((getattr(backbone, "hf_device_map", None) or {}).values()):
        return PeftModel.from_pretrained(backbone, folder, config=config, **options)  # it knows about offloaded parts
    what, hint = f"{saved.where}: what its config puts on {type(backbone).__name__}", "it is not what its file holds"
    largest = limits.UNBACKED_BYTES + limits.COPIES * saved.bytes
    trainability = {parameter: parameter.requires_grad for parameter in backbone.parameters()}
    try:
        with allowance(largest, what, hint):
            model = PeftModel(backbone, config, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage)
        try:
            model.load_adapter(folder, **options)
        except BaseException:
            model.base_model.unload()
            for parameter, requires_grad in trainability.items():
                parameter.requires_grad_(requires_grad)
            raise
    except HfprojError:
        raise
    except Exception as error:
        what = f"{saved.where} can't be attached to {type(backbone).__name__} ({one_line(error)})"
        hint = "it belongs to another backbone, or its backbone_adapter does not work"
        raise AdapterFileError(f"{what}; {hint}.") from error
    return model


def _preprocessing(backbone: nn.Module, saved: SavedAdapter) -> dict[str, Any] | None:
    """Return the adapter's own account of its images where the backbone has none, for `image_preprocessing`."""
    text = main_input_of(backbone) == "input_ids"
    if text or OF_ADAPTER in backbone.__dict__ or has_preprocessing(backbone):
        return None
    file = saved.file(PREPROCESSING)
    return None if file is None else read_json(file, saved.where)
