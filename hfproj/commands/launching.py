"""A recipe on several processes: accelerate's launcher, without the traceback that it adds to a user's mistake.

The worker that fails first says why, in one line or in the traceback of an error that is not the user's; the launcher's
own report (which process, its exit code, eleven lines of frames) is left out, and its exit code is the worker's.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfproj.commands.arguments import LAUNCHER, read_arguments, split_files
from hfproj.commands.outcome import STOPPED
from hfproj.errors import UsageError

# Flags of `accelerate launch` that go to it, beside what makes us call it; none is a flag of a recipe.
_FLAGS = (
    *LAUNCHER, "num_machines", "machine_rank", "main_process_ip", "main_process_port", "mixed_precision", "gpu_ids",
    "num_cpu_threads_per_process", "rdzv_backend", "rdzv_conf", "same_network", "dynamo_backend", "monitor_interval",
    "max_restarts", "role",
)  # fmt: skip
_SWITCHES = ("multi_gpu", "cpu", "use_deepspeed", "use_fsdp", "same_network", "enable_cpu_affinity")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of the launcher, and those of the recipe; files of arguments may hold some of the launcher's.

    Raises:
        UsageError: If a flag of the launcher has no value.

    Example:
        >>> split(["--num_processes", "2", "--seed", "1"])
        (['--num_processes', '2'], ['--seed', '1'])
    """
    ours: list[str] = []
    theirs: list[str] = []
    files, _ = split_files(words)
    in_files = {name: value for file in files for name, value in read_arguments(file).items() if name in LAUNCHER}
    found: dict[str, Any] = dict(in_files)
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        if name in _SWITCHES and not equals:
            ours.append(f"--{name}")
        elif name in _FLAGS:
            if not equals and (not left or left[0].startswith("--")):
                raise UsageError(f"Expected a value behind --{name}, got none.")
            found[name] = value if equals else left.pop(0)
        else:
            theirs.append(word)
    for name, value in found.items():
        ours += [f"--{name}", str(value)] if value is not None else []
    _check(found)
    return ours, theirs


def _check(found: dict[str, Any]) -> None:
    count, file = found.get("num_processes"), found.get("config_file")
    if count is not None and not (str(count).isdigit() and int(count) > 0):
        raise UsageError(f"Expected --num_processes to be a whole number above 0, got {count!r}.")
    if file is not None and not Path(str(file)).expanduser().is_file():
        hint = "`accelerate config --config_file NAME` makes one"
        raise UsageError(f"Expected --config_file to be a file of accelerate's, got {file!r}, which is none; {hint}.")


def launch(path: Path, words: Sequence[str]) -> None:
    """Run a recipe as ``accelerate launch`` does, and exit with the code of the worker that failed first, if one does.

    Without a configuration of accelerate's and without a GPU the processes run on the CPU.

    Raises:
        UsageError: If a flag of the launcher is wrong.
    """
    ours, theirs = split(words)
    from accelerate.commands import launch as accelerate
    from accelerate.commands.config.config_args import default_config_file
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    count = int(ours[ours.index("--num_processes") + 1]) if "--num_processes" in ours else 1
    configured = "--config_file" in ours or os.path.isfile(default_config_file)
    if not configured and count > 1 and not set(ours) & {"--cpu", "--multi_gpu", "--use_fsdp", "--use_deepspeed"}:
        ours.append("--multi_gpu")  # the name of its launcher of several processes, on CPUs too
        _use_cpu_without_a_gpu()
    parser = accelerate.launch_command_parser()
    _quiet()
    with tempfile.TemporaryDirectory(prefix="hfproj-") as folder:
        os.environ["HFPROJ_SAID"] = os.path.join(folder, "said")
        try:
            accelerate.launch_command(parser.parse_args([*ours, str(path), *theirs]))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            _leave(failure.exitcode, f"process {rank}")
        except subprocess.CalledProcessError as error:
            _leave(error.returncode, "the process")
        except SignalException as stopped:
            saved = os.path.exists(f"{os.environ['HFPROJ_SAID']}.{STOPPED}")
            sys.exit(STOPPED if saved else 128 + int(stopped.sigval))
        except ValueError as error:  # the launcher's, of its flags and its configuration
            raise UsageError(f"{error}") from error


def _leave(code: int, who: str) -> None:
    """Exit with a worker's code; of one that could say nothing, which a signal ended, say it."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = ", as the system does where memory is short" if name == "SIGKILL" else ""
        print(f"error: {who} was ended by {name}{hint}.", file=sys.stderr)
    sys.exit(code if code > 0 else 128 - code)


def _use_cpu_without_a_gpu() -> None:
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def _quiet() -> None:
    """Leave out what the launcher says of defaults, threads and failures; the workers' own words stay."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.run", "accelerate.commands")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
