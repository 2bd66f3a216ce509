"""SIGTERM and SIGUSR1 ask a run to write a checkpoint at the end of its step and to exit with `EXIT_CODE`.

transformers' ``enable_jit_checkpoint`` does not serve here: it saves within a step, too, where accumulated gradients
are lost; each process decides for itself, so that processes may save at different steps; and the run ends like one
that is done.
"""

import signal
import threading
from types import FrameType
from typing import Any

import torch

from hfproj import distributed

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
NAMES = ("SIGTERM", "SIGUSR1")


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

    def __exit__(self, *error: object) -> None:
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
