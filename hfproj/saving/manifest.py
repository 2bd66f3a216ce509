"""What makes a checkpoint whole: its manifest, which names every file with size and SHA-256 and is written last.

A checkpoint of hfproj 0.1.0 has none. Its files must be there and readable, and those that count steps must count the
same; more can't be known of it.
"""

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hfproj.errors import one_line
from hfproj.filenames import CARD
from hfproj.files import installed_versions, sync, write_atomic

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
_FORMAT = 1
PREFIX = "checkpoint"  # transformers' PREFIX_CHECKPOINT_DIR
# What resuming needs, by pattern: names differ between one process, several, FSDP and DeepSpeed.
_RESUMED = {"optimizer*": "optimizer.pt", "scheduler.pt": "scheduler.pt", "rng_state*": "rng_state.pth"}
# What transformers, PEFT and this library look for in a checkpoint: such a file beside those of the manifest is read.
_READ = re.compile(
    r"(adapter_|pytorch_)?model.*\.(safetensors|bin)|adapter_config\.json|optimizer.*|scheduler\.pt|scaler\.pt|rng_state.*"
    r"|(objective|ema)\.safetensors|history\.parquet|trainer_state\.json"
)
_DEEPSPEED = "global_step*"  # its folder, which holds the optimizer's part


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Sync every file of a checkpoint to disk, then write the manifest, with what the trainer says `about` it."""
    found = _files(folder)
    for file in found:
        sync(file)
    found = [file for file in found if file.name != CARD]  # which may be edited
    with ThreadPoolExecutor() as pool:  # hashing needs no lock of the interpreter
        digests = list(pool.map(digest, found))
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": known}
        for file, known in zip(found, digests)
    }
    for part in sorted(p for p in folder.rglob("*") if p.is_dir()):
        sync(part)
    content = {"format": _FORMAT, **about, "versions": installed_versions(), "files": files}
    content["sha256"] = _own_digest(content)
    write_atomic(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint; None where it has none, a damaged one, or one of a later format."""
    content = _object(folder / MANIFEST)
    return content if content is not None and content["format"] == _FORMAT else None


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return what the trainer's state of a checkpoint holds; None where it is no JSON object."""
    try:
        content = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _object(file: Path) -> dict[str, Any] | None:
    """Return what a manifest says, of whatever format, if it is what was written."""
    try:
        content = json.loads(file.read_bytes())
        known = isinstance(content, dict) and content.get("sha256") == _own_digest(content)
    except (OSError, ValueError, RecursionError):
        return None
    if not known or content.get("format") != _FORMAT:
        return content if known and isinstance(content.get("format"), int) else None
    fields = {"step": int, "processes": int, "files": dict, "course": dict | None}
    return content if all(isinstance(content.get(name, 0.0), kind) for name, kind in fields.items()) else None


def _why_not_read(folder: Path) -> str | None:
    """Return why a manifest that is there can't be used; None where there is none."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    content = _object(folder / MANIFEST)
    if content is None:
        return f"{MANIFEST} is damaged"
    return f"{MANIFEST} has format {content['format']}, of a later hfproj, which this one can't read"


def flaw(folder: Path, *, digests: bool = True) -> str | None:
    """Return why a checkpoint isn't whole, in words; None if it is. Without `digests`, files are not read."""
    if not folder.is_dir():
        return "there is no such folder"
    manifest, name = read_manifest(folder), folder.name.rpartition("-")
    if manifest is None:
        return _why_not_read(folder) or _flaw_of_old(folder, read=digests)
    if name[0] == PREFIX and name[2] != str(manifest["step"]):
        return f"it is that of step {manifest['step']}"
    for relative, known in manifest["files"].items():
        try:
            size = (folder / relative).stat().st_size
            if size != known["size"]:
                return f"{relative} has {size:,} bytes instead of {known['size']:,}"
            if digests and digest(folder / relative) != known["sha256"]:
                return f"{relative} is not the file that was saved (its SHA-256 is another one)"
        except FileNotFoundError:
            return f"{relative} is missing"
        except OSError as error:
            return f"{relative} can't be read ({error.strerror})"
    names = (path.relative_to(folder).as_posix() for path in _files(folder))
    added = [name for name in names if name not in manifest["files"] and _READ.fullmatch(name.rpartition("/")[2])]
    return f"{added[0]} does not belong to it" if added else None


def lacks_optimizer(folder: Path) -> bool:
    """Whether a checkpoint was saved with ``save_only_model=True``: nothing to resume from."""
    manifest = read_manifest(folder)
    return manifest is not None and not manifest.get("resumable", True)


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    total = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def _own_digest(content: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# --- checkpoints without a manifest ---


def _flaw_of_old(folder: Path, *, read: bool) -> str | None:
    state = read_state(folder)
    if state is None:
        return f"{STATE} is missing or can't be read"
    step = state.get("global_step")
    if not isinstance(step, int) or isinstance(step, bool):
        return f"{STATE} names no step"
    name = folder.name.rpartition("-")
    if name[0] == PREFIX and name[2] != str(step):
        return f"{STATE} is that of step {step}"
    deepspeed = any(folder.glob(_DEEPSPEED))
    needed = {} if deepspeed else {**_RESUMED, "**/*adapter_config.json": "adapter_config.json"}
    for pattern, called in needed.items():
        if not any(folder.glob(pattern)):
            return f"{called} is missing"
    sharded = deepspeed or any(folder.rglob("*.distcp"))
    for config in [] if sharded else folder.rglob("adapter_config.json"):
        if not any(config.with_name(f"adapter_model.{kind}").exists() for kind in ("safetensors", "bin")):
            return f"{config.with_name('adapter_model.safetensors').relative_to(folder)} is missing"
    if not read:
        return None
    return next(_unreadable(folder), None) or (None if deepspeed else _other_content(folder, step))


def _unreadable(folder: Path) -> Iterator[str]:
    """Yield the damaged files among those that tell: safetensors have a length, torch's zip files a checksum."""
    for file in _files(folder):
        try:
            if file.suffix == ".safetensors":
                with safe_open(str(file), "pt") as opened:
                    whole = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
                if file.name.startswith("adapter_model") and whole and not any("F" in dtype for dtype in whole):
                    raise ValueError("no tensor in it has floating-point numbers")
            elif file.suffix in (".pt", ".pth") and zipfile.ZipFile(file).testzip() is not None:
                raise zipfile.BadZipFile("a checksum does not fit")
            elif file.suffix == ".json" and not isinstance(json.loads(file.read_bytes()), dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError, RecursionError, zipfile.BadZipFile, SafetensorError) as error:
            yield f"{file.relative_to(folder)} is damaged ({one_line(error)})"


def _other_content(folder: Path, step: int) -> str | None:
    """Return what scheduler, optimizer or random states hold that a run can't go on from, or of another step."""
    found: dict[str, Any] = {}
    for name, mapped in (("scheduler.pt", False), ("optimizer.pt", True)):
        if (folder / name).exists():  # those of FSDP have other names
            try:
                found[name] = _load(folder / name, mmap=mapped)
            except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, EOFError, AttributeError) as error:
                return f"{name} can't be read ({one_line(error)[:200]})"
            if not isinstance(found[name], dict):
                return f"{name} holds no state but a {type(found[name]).__name__}"
    for file in sorted(folder.glob("rng_state*.pth")):
        try:
            states = _load(file)
        except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, EOFError, AttributeError) as error:
            return f"{file.name} can't be read ({one_line(error)[:200]})"
        if not isinstance(states, dict) or not {"python", "numpy", "cpu"} <= states.keys():
            return f"{file.name} holds no states of random generators"
    optimizer, scheduler = found.get("optimizer.pt"), found.get("scheduler.pt", {})
    if optimizer is not None:
        state, groups = optimizer.get("state"), optimizer.get("param_groups")
        if not isinstance(state, dict) or not groups or not isinstance(groups, list):
            return "optimizer.pt holds no state of an optimizer"
    if optimizer is None or (folder / "scaler.pt").exists():  # it skips steps, which the others then do not count
        return None
    if "lr_lambdas" in scheduler and scheduler.get("last_epoch") != step:
        return f"scheduler.pt is that of step {scheduler.get('last_epoch')}"
    steps = [int(s["step"]) for s in optimizer["state"].values() if isinstance(s, dict) and "step" in s]
    return f"optimizer.pt is that of step {max(steps)}" if steps and max(steps) != step else None


def _load(file: Path, *, mmap: bool = False) -> Any:
    import numpy as np
    import torch

    core: Any = getattr(np, "_core", None) or np.core  # NumPy before 2.0
    arrays = [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]  # of random states
    with torch.serialization.safe_globals(arrays):
        return torch.load(file, weights_only=True, map_location="cpu", mmap=mmap)
