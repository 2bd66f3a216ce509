"""Functions in processes of their own, which start in a moment: they are forked from a server that has imported all.

A new Python takes six seconds of a core to import torch, transformers, PEFT and hfproj. One server serves all tests of
a pytest process. The type checks of the tests are not in it.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import socket
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLACES = [HERE.parent, HERE, *(HERE / room for room in ("faults", "hub", "heads", "reporting", "training"))]


def context():
    """Return the context of `multiprocessing` whose processes are forked; its server runs."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["preloaded"])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, PLACES), before["PYTHONPATH"] or ""])
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return found


def start(function, *arguments, world=1, log):
    """Start a function of a module in so many processes, as a launcher does; return them. They write into `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        process = context().Process(target=_child, args=(function, arguments, rank, world, port, str(log)))
        process.start()
        started.append(process)
    return started


def returned(function, *arguments, world=1, timeout=240):
    """Return what a function of a module returns in so many processes, which are joined before it is called."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        codes = wait(start(_kept, folder, function, arguments, world=world, log=log), timeout)
        assert codes == [0] * world, f"{codes}: {log.read_text(errors='replace')[-4000:]}"
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world)]


def _kept(folder, function, arguments):
    from accelerate import PartialState

    rank = os.environ.get("RANK", "0")
    if "RANK" in os.environ:
        PartialState(cpu=True)
    Path(folder, rank).write_bytes(pickle.dumps(function(*arguments)))


def _child(function, arguments, rank, world, port, log):
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its own children: it was started with "forkserver"
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    function(*arguments)


def wait(processes, timeout=120):
    """Return their exit codes; when one has died, the others get SIGTERM and then SIGKILL, as a launcher does it."""
    until, dead = time.monotonic() + timeout, None
    while any(p.is_alive() for p in processes):
        if dead is None and any(not p.is_alive() and p.exitcode not in (0, 75) for p in processes):
            dead = time.monotonic()
            for p in processes:
                kill(p, signal.SIGTERM)
        if time.monotonic() > until or (dead is not None and time.monotonic() > dead + 5):
            for p in processes:
                kill(p, signal.SIGKILL)
        time.sleep(0.02)
    return [p.exitcode for p in processes]


def kill(process, number):
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):  # between one and the other
        if process.is_alive():
            os.kill(process.pid, number)
