"""Records every file event below a folder, and what would be on disk had the process died, or the power failed, there.

Python's own calls are patched; torch and safetensors, which write from C++ and Rust, are made to write through them. A
write is two events, so that a file is half there in between. Of each event three states of the disk are kept:

- killed: all that was done so far is there (SIGKILL);
- lost: only what was synced is there: contents by fsync of the file, names by fsync of the folder (the worst loss of
  power that POSIX allows);
- torn: names are there at once, unsynced contents are not (as journalled file systems do it).
"""

import builtins
import errno
import io
import os
from pathlib import Path
from unittest import mock

import safetensors
import safetensors.torch
import torch

LOSSES = ("killed", "lost", "torn")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Layer:
    """Records events below `root` while it is entered; raises `error` at event `fail_at`, `once` or from then on."""

    def __init__(self, root, fail_at=None, error=errno.ENOSPC, keep=True, once=False):
        self.once = once
        self.root, self.fail_at, self.error, self.keep = Path(root).resolve(), fail_at, error, keep
        self.events, self.states = [], []  # (operation, path), and {loss: {path: content, or None of a folder}}
        self._contents, self._names, self._held = {}, {}, {}

    # --- recording ---

    def note(self, operation, path):
        """Take down an event that is about to happen."""
        path = Path(os.path.abspath(path))
        if path != self.root and self.root not in path.parents:
            return False
        self.events.append((operation, str(path.relative_to(self.root))))
        if self.keep:
            self._hold()
            self.states.append({"killed": self._live(), "lost": self._lost(), "torn": self._torn()})
        deleting = operation in ("unlink", "rmdir")  # what a full disk still allows
        failing = self.fail_at is not None and len(self.events) > self.fail_at
        if failing and not deleting and not (self.once and len(self.events) > self.fail_at + 1):
            raise OSError(self.error, os.strerror(self.error), str(path))
        return True

    def synced(self, path):
        """Take down that a file or folder is on disk."""
        if self.keep:
            self._hold()
            number = os.stat(path).st_ino
            if os.path.isdir(path):
                self._names[number] = {e.name: e.stat(follow_symlinks=False).st_ino for e in os.scandir(path)}
            else:
                self._contents[number] = Path(path).read_bytes()

    def _hold(self):
        """Keep every file and folder open, so that no number is used twice."""
        for path in [self.root, *self.root.rglob("*")]:
            number = path.lstat().st_ino
            if number not in self._held and not path.is_symlink():
                self._held[number] = (self._os["open"](path, os.O_RDONLY), path.is_dir())

    def _live(self):
        return {str(p.relative_to(self.root)): None if p.is_dir() else p.read_bytes() for p in self.root.rglob("*")}

    def _torn(self):
        contents = {str(p.relative_to(self.root)): self._contents.get(p.stat().st_ino, b"")
                    for p in self.root.rglob("*") if p.is_file()}  # fmt: skip
        return {path: contents.get(path) for path in self._live()}

    def _lost(self, number=None, at=""):
        number, found = self.root.stat().st_ino if number is None else number, {}
        for name, child in self._names.get(number, {}).items():
            folder = self._held[child][1]
            found[at + name] = None if folder else self._contents.get(child, b"")
            if folder:
                found |= self._lost(child, f"{at}{name}/")
        return found

    # --- patching ---

    def __enter__(self):
        names = ("open", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync", "symlink")
        self._os = {name: getattr(os, name) for name in names}
        self._open, self._torch_save = builtins.open, torch.save
        for path in [p for p in [self.root, *self.root.rglob("*")] if self.keep]:
            self.synced(path)  # what lay there before is on disk
        patches = {name: getattr(self, f"_{name}_in_os", None) or self._two(name) for name in self._os}
        self._patches = [mock.patch.object(os, name, new) for name, new in patches.items()]
        self._patches += [mock.patch.object(module, "open", self._open_file) for module in (builtins, io)]
        self._patches += [
            mock.patch.object(torch, "save", self._save_torch),
            mock.patch.object(safetensors.torch, "serialize_file", self._save_safetensors),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error):
        for patch in reversed(self._patches):
            patch.stop()
        for handle, _ in self._held.values():
            os.close(handle)

    def _two(self, name):
        call = self._os[name]
        said = {"remove": "unlink", "replace": "rename"}.get(name, name)

        def patched(path, *args, dir_fd=None, **kwargs):
            where = path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
            self.note(said, where)
            return call(path, *args, **({"dir_fd": dir_fd} if dir_fd is not None else {}), **kwargs)

        return patched

    def _open_in_os(self, path, flags, *args, **kwargs):
        if flags & _WRITING and "dir_fd" not in kwargs:
            self.note("open", path)
        return self._os["open"](path, flags, *args, **kwargs)

    def _fsync_in_os(self, handle):
        path = os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}")
        ours = self.note("fsync", path)
        self._os["fsync"](handle)
        if ours:
            self.synced(path)

    def _open_file(self, file, mode="r", *args, **kwargs):
        writes = any(c in mode for c in "wax+")
        where = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file
        if writes and not isinstance(file, int):
            self.note("open", where)
        opened = self._open(file, mode, *args, **kwargs)
        inside = writes and self.root in Path(os.path.abspath(where)).parents
        return Writer(self, opened, where) if inside else opened

    def _save_torch(self, value, file, *args, **kwargs):
        if not isinstance(file, str | os.PathLike):
            return self._torch_save(value, file, *args, **kwargs)
        buffer = io.BytesIO()
        self._torch_save(value, buffer, *args, **kwargs)
        with open(file, "wb") as opened:
            opened.write(buffer.getvalue())

    def _save_safetensors(self, tensors, file, metadata=None):
        with open(file, "wb") as opened:
            opened.write(safetensors.serialize(tensors, metadata=metadata))


class Writer:
    """An open file whose writes are two events."""

    def __init__(self, layer, file, path):
        self._layer, self._file, self._path = layer, file, path

    def write(self, data):
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._layer.note("write", self._path)
            self._file.write(part)
            self._file.flush()
        return len(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __iter__(self):
        return iter(self._file)


def put(state, folder):
    """Write a recorded state of the disk into a new folder."""
    Path(folder).mkdir(parents=True)
    for path in sorted(state):
        target = Path(folder, path)
        if state[path] is None:
            target.mkdir(exist_ok=True)
        else:
            target.write_bytes(state[path])
