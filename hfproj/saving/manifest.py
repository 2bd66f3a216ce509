"""What makes a checkpoint whole: its manifest, which names every file with size and SHA-256 and is written last.

A checkpoint of hfproj 0.1.0 has none. Its files must be there and readable, and those that count steps must count the
same; more can't be known of it.
"""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hfproj.filenames import CARD
from hfproj.files import installed_versions, sync, write_atomic

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
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
    content = {"format": 1, **about, "versions": installed_versions(), "files": files}
    content["sha256"] = _own_digest(content)
    write_atomic(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint; None where it has none, or a damaged one."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    valid = isinstance(content, dict) and content.get("sha256") == _own_digest(content)
    return content if valid else None


def flaw(folder: Path, *, digests: bool = True) -> str | None:
    """Return why a checkpoint isn't whole, in words; None if it is. Without `digests`, files are not read."""
    if not folder.is_dir():
        return "there is no such folder"
    manifest, name = read_manifest(folder), folder.name.rpartition("-")
    if manifest is None:
        return f"{MANIFEST} is damaged" if (folder / MANIFEST).exists() else _flaw_of_old(folder, read=digests)
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
    try:
        state = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError):
        return f"{STATE} is missing or can't be read"
    step = state.get("global_step") if isinstance(state, dict) else None
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
    return next(_unreadable(folder), None) or (None if deepspeed else _other_step(folder, step))


def _unreadable(folder: Path) -> Iterator[str]:
    """Yield the damaged files among those that tell: safetensors have a length, torch's zip files a checksum."""
    for file in _files(folder):
        try:
            if file.suffix == ".safetensors":
                with safe_open(str(file), "pt"):
                    pass
            elif file.suffix in (".pt", ".pth") and zipfile.ZipFile(file).testzip() is not None:
                raise zipfile.BadZipFile("a checksum does not fit")
            elif file.suffix == ".json" and not isinstance(json.loads(file.read_bytes()), dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
            yield f"{file.relative_to(folder)} is damaged ({error})"


def _other_step(folder: Path, step: int) -> str | None:
    """Return which of scheduler and optimizer has another step, where they count the steps of training."""
    import torch

    if (folder / "scaler.pt").exists():  # it skips steps, which the others then do not count
        return None
    try:
        scheduler = torch.load(folder / "scheduler.pt", weights_only=True)
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)
    except (FileNotFoundError, pickle.UnpicklingError):  # of FSDP, or holding what torch does not load by default
        return None
    if "lr_lambdas" in scheduler and scheduler.get("last_epoch") != step:
        return f"scheduler.pt is that of step {scheduler.get('last_epoch')}"
    steps = [int(s["step"]) for s in optimizer.get("state", {}).values() if isinstance(s, dict) and "step" in s]
    return f"optimizer.pt is that of step {max(steps)}" if steps and max(steps) != step else None
