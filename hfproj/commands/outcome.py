"""How a command ends: an error of the user's is one line and status 2, without a traceback."""

import errno
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

from hfproj.errors import HfprojError

STOPPED = 75  # EX_TEMPFAIL: a signal ended training in a checkpoint (hfproj.saving.signals, which imports torch)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


def run(main: Callable[[], None]) -> None:
    """Run `main`; after an error of the user's, or of the disk, exit with status 2 and one line, no traceback."""
    _use_all_cores()
    try:
        main()
    except HfprojError as error:
        say_once(f"error: {_one_line(error)}")
        sys.exit(2)
    except SystemExit as end:
        if end.code == STOPPED and (mark := os.environ.get("HFPROJ_SAID")):
            with suppress(OSError):
                open(f"{mark}.{STOPPED}", "w").close()  # the launcher, which had the signal first, does not learn of it
        raise
    except OSError as error:
        if error.errno not in _DISK:
            raise
        what = error.filename or "a file"
        say_once(f"error: {what} can't be written ({error.strerror}); what was written before it is whole and stays.")
        sys.exit(2)


def _use_all_cores() -> None:
    """Give a single process on the CPU all its cores: ``accelerate launch`` leaves it one unless told otherwise."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # without a launcher, OMP_NUM_THREADS is the user's own
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _one_line(error: HfprojError) -> str:
    """Return the message; of an error in a worker of a data loader, which holds a whole traceback, its last line."""
    text = str(error).strip()
    if re.match(r"Caught \w+ in .* process", text):
        text = text.splitlines()[-1].partition("Error: ")[2] or text.splitlines()[-1]
    return " ".join(text.split())


def say_once(line: str) -> None:
    """Print a line on the standard error; of several processes that ``hfproj run`` started, the first one does."""
    mark = os.environ.get("HFPROJ_SAID")
    if mark:
        try:
            with suppress(FileNotFoundError):  # the launcher has gone
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return
    print(line, file=sys.stderr)
