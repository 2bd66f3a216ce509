"""One run at a time in a folder: an operating system's lock, which goes with the process that holds it."""

import errno
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hfproj.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger("hfproj.training")
LOCK = ".run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_PATIENCE = 2.0  # seconds: a process that was just killed may not be gone yet


class InUseError(UsageError):
    """Another process holds the lock."""


@contextmanager
def locked(folder: Path, *, patience: float = _PATIENCE) -> Iterator[None]:
    """Hold the lock of `folder`; on a file system without locks say so once, and go on.

    Raises:
        InUseError: If another process holds it, and after `patience` seconds still does.
        OSError: If the folder can't be written to.
    """
    handle = _lock(folder, patience)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                os.unlink(folder / LOCK)  # before it is let go: nobody else holds it now
            with suppress(OSError):
                os.close(handle)
            _open.discard(handle)


def _lock(folder: Path, patience: float) -> int | None:
    file, until = folder / LOCK, time.monotonic() + patience
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        LOG.warning(f"This system has no file locks: nothing keeps a second run from writing into {folder}.")
        return None
    while True:
        handle = _opened(file)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(handle, file):
                break
        except OSError as error:
            os.close(handle)
            if error.errno in _NO_LOCKS:
                LOG.warning(
                    f"The file system of {folder} has no locks ({error.strerror}): nothing keeps a second run from "
                    "writing there. Give each run an output_dir of its own."
                )
                return None
            if not isinstance(error, BlockingIOError) and error.errno != errno.EACCES:
                raise
            if time.monotonic() > until:
                raise InUseError(f"{_said(file)}; wait for it, or give this run another output_dir.") from None
            time.sleep(0.1)
        else:
            os.close(handle)  # the run before took its file away just now
    _open.add(handle)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):  # a full disk: who holds it is only for the message
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}).encode())
    return handle


def _opened(file: Path) -> int:
    """Open the file of the lock, but nothing that it links to: that would be somebody else's."""
    found = os.lstat(file) if os.path.lexists(file) else None
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise UsageError(f"Expected {file} to be a file that only runs write, got a link or a folder; remove it.")
    return os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _is_still(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _said(file: Path) -> str:
    try:
        held = json.loads(file.read_bytes())
        who = f"process {held['pid']} on {held['host']}, since {held['started']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        who = "another process"
    return f"Another run writes into {file.parent}: {who}"


_open: set[int] = set()  # locks that this process holds


def _let_go() -> None:
    """Close what a forked child inherited: with a worker of a data loader the lock would outlive its process."""
    for handle in _open:
        with suppress(OSError):
            os.close(handle)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
