"""Loading a saved adapter: onto its backbone (`from_pretrained`), or its head alone (`load_head`).

A folder and a repository on the Hub are treated alike: `hfproj.hub.fetch` gets and checks the files, so that what is
damaged, hostile or meant for another backbone is refused in one line, and nothing that a file says is run.

Here and everywhere, `adapter` is the name of an adapter in a folder or repository, and `adapter_name`, as in PEFT, its
name in a model.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from hfproj.backbones import load_backbone
from hfproj.backbones.loading import timm_part_of
from hfproj.backbones.preprocessing import OF_ADAPTER, own_processor
from hfproj.errors import AdapterFileError, HfprojError, UsageError, one_line
from hfproj.filenames import ADAPTER_WEIGHTS, PREPROCESSING
from hfproj.hub.fetch import SavedAdapter, config_of, open_adapter
from hfproj.hub.sources import adapters_in, open_source
from hfproj.hub.tensors import HEAD_KEYS
from hfproj.hub.untrusted import read_json, short
from hfproj.hub.validation import backbone_source, check_rank, read_config
from hfproj.tuner.config import ProjectionHeadConfig
from hfproj.tuner.layer import CHILD, HeadModules


def from_pretrained(
    repo: str | Path,
    *,
    adapter: str = "default",
    backbone: nn.Module | None = None,
    adapter_name: str | None = None,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
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

    Raises:
        AdapterFileError: If there is no such adapter, it is damaged or hostile, or its tensors are those of another
            head or backbone.
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
        raise UsageError(
            "This backbone carries an adapter already. To put a second head beside it use model.load_adapter(repo, "
            "name); to start from the bare backbone use model.unload()."
        )
    saved = open_adapter(repo, adapter=adapter, revision=revision, token=token, cache_dir=cache_dir)
    if backbone is None:
        backbone = _load_backbone(saved)
    check_rank(saved.config, backbone, saved.where)
    preprocessing = _preprocessing(backbone, saved)
    name = adapter_name or adapter.replace(".", "_")  # modules can't be named with a dot
    model = _attach(backbone, saved, name, is_trainable, low_cpu_mem_usage)
    if preprocessing is not None:
        backbone.__dict__[OF_ADAPTER] = preprocessing
    return model


def load_head(
    repo: str | Path,
    *,
    adapter: str = "default",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> nn.Module:
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
    modules = HeadModules(saved.config, saved.config.in_dim)
    tensors = load_file(saved.folder / ADAPTER_WEIGHTS)
    modules.load_state_dict({k.removeprefix(HEAD_KEYS): v for k, v in tensors.items() if k.startswith(HEAD_KEYS)})
    return modules.head.eval()


def list_adapters(
    repo: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, ProjectionHeadConfig]:
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


def detach(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Return a copy of a head of `model`, free of the backbone: ``z = head(h)``.

    Args:
        model: A model with a projection head.
        adapter_name: The adapter of the model whose head it is; None takes the active one.

    Raises:
        UsageError: If there is no such head.
    """
    layer = getattr(model.get_base_model() if hasattr(model, "get_base_model") else model, CHILD, None)
    if layer is None:
        raise UsageError(
            f"{type(model).__name__} has no projection head; attach one with get_peft_model(backbone, "
            "ProjectionHeadConfig(…))."
        )
    name = adapter_name or layer.active_adapters[0]
    if name not in layer.projection_head_modules:
        raise UsageError(f"There is no head {name!r}; there are: {', '.join(layer.projection_head_modules)}.")
    return copy.deepcopy(layer.projection_head_modules[name].head)


def _load_backbone(saved: SavedAdapter) -> nn.Module:
    source = backbone_source(saved.config, saved.where, local=saved.local)
    try:
        return load_backbone(**source)
    except HfprojError:
        raise
    except Exception as error:  # whatever the files of another third party do to transformers or timm
        raise AdapterFileError(
            f"{saved.where}: its backbone {short(source['name'])} can't be loaded ({one_line(error)}); load it "
            "yourself and pass it as backbone=."
        ) from error


def _attach(
    backbone: nn.Module, saved: SavedAdapter, name: str, is_trainable: bool, low_cpu_mem_usage: bool
) -> PeftModel:
    """Return the backbone with the adapter; where that fails, the backbone is left as it was."""
    config, folder = copy.deepcopy(saved.config), str(saved.folder)
    config.inference_mode = not is_trainable
    options = {
        "adapter_name": name,
        "is_trainable": is_trainable,
        "low_cpu_mem_usage": low_cpu_mem_usage,
        "key_mapping": getattr(backbone, "_checkpoint_conversion_mapping", {}),
    }
    if {"cpu", "disk"} & set((getattr(backbone, "hf_device_map", None) or {}).values()):
        return PeftModel.from_pretrained(backbone, folder, config=config, **options)  # it knows about offloaded parts
    try:
        model = PeftModel(backbone, config, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage)
        try:
            model.load_adapter(folder, **options)
        except BaseException:
            model.base_model.unload()
            raise
    except HfprojError:
        raise
    except Exception as error:
        raise AdapterFileError(
            f"{saved.where} can't be attached to {type(backbone).__name__} ({one_line(error)}); it belongs to another "
            "backbone, or its backbone_adapter does not work."
        ) from error
    return model


def _preprocessing(backbone: nn.Module, saved: SavedAdapter) -> dict[str, Any] | None:
    """Return the adapter's own account of its images where the backbone has none, for `image_preprocessing`."""
    text = getattr(backbone, "main_input_name", None) == "input_ids"
    if text or OF_ADAPTER in backbone.__dict__ or timm_part_of(backbone) or own_processor(backbone):
        return None
    file = saved.file(PREPROCESSING)
    return None if file is None else read_json(file, saved.where)
