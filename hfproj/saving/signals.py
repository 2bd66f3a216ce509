"""SIGTERM and SIGUSR1 ask a run to write a checkpoint at the end of its step and to exit with `EXIT_CODE`.

transformers' ``enable_jit_checkpoint`` does not serve here: it saves within a step, too, where accumulated gradients
are lost; each process decides for itself, so that processes may save at different steps; and the run ends like one
that is done.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from hfproj import distributed

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
LOG = logging.getLogger("hfproj.training")
NAMES = ("SIGTERM", "SIGUSR1")


class LeaveSignals:
    """A ``worker_init_fn`` after which a data loader's worker leaves these signals to the main process.

    A scheduler may send them to all processes of a job; a worker that died would end the run before its checkpoint.
    """

    def __init__(self, then: Callable[[int], Any] | None = None):
        self.then = then

    def __call__(self, worker: int) -> None:
        """Be the ``worker_init_fn`` of a data loader."""
        parent = os.getppid()

        def leave(number: int, frame: FrameType | None) -> None:
            if os.getppid() != parent:  # its main process is dead, and nothing else will end it
                os._exit(128 + number)

        for number in (getattr(signal, name, None) for name in NAMES):
            if number is not None:
                signal.signal(number, leave)
        if self.then is not None:
            self.then(worker)


class StopSignals:
    """While it is entered, notes these signals instead of dying from them.

    Only where nothing else handles them, and in the main thread, where alone Python allows it.
    """

    def __init__(self) -> None:
        self.received, self._before = 0, dict[int, Any]()

    def __enter__(self) -> "StopSignals":
        self.received = 0
        main = threading.current_thread() is threading.main_thread()
        for number in (getattr(signal, name, None) for name in NAMES):
            if main and number is not None and signal.getsignal(number) == signal.SIG_DFL:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if self.received and kind is None:
            LOG.warning(f"{signal.Signals(self.received).name} came when the training was over: nothing to stop.")
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self, device: torch.device) -> str | None:
        """Return the name of a signal that any process received; every process has to ask, and gets the same answer."""
        if distributed.world_size() > 1:
            number = int(distributed.all_reduce_max(torch.tensor(self.received, device=device)))
        else:
            number = self.received
        return signal.Signals(number).name if number else None
