"""What recipes and commands share: errors that a user can act on end the program in one line."""

import os
import re
import sys
from collections.abc import Callable
from typing import Any

from hfproj.errors import HfprojError, UsageError


def parse(*classes: type) -> tuple[Any, ...]:
    """Return an instance of each dataclass from the command line, see ``transformers.HfArgumentParser``.

    Raises:
        UsageError: a flag is unknown, or a value is refused by its dataclass.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(classes)
    try:
        *found, left = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except HfprojError:
        raise
    except ValueError as error:
        raise UsageError(f"{error}") from error
    if left:
        raise UsageError(f"Unknown arguments: {' '.join(left)}. See --help.")
    return tuple(found)


def run(main: Callable[[], None]) -> None:
    """Run `main`; on an error of the user's end with exit status 2 and one line instead of a traceback."""
    _use_all_cores()
    try:
        main()
    except HfprojError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _use_all_cores() -> None:
    """Give a single process on the CPU all its cores: ``accelerate launch`` leaves it one unless told otherwise."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # without a launcher, OMP_NUM_THREADS is the user's own
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _one_line(error: HfprojError) -> str:
    """Return the message; of an error in a worker of a data loader, which carries a whole traceback, its last line."""
    text = str(error).strip()
    if re.match(r"Caught \w+ in .* process", text):
        text = text.splitlines()[-1].partition("Error: ")[2] or text.splitlines()[-1]
    return " ".join(text.split())
