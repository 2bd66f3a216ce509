"""Every public call with one wrong argument: it works, or ends in an HfprojError, soon and in one line."""

import contextlib
import importlib
import io
import math
import random
import signal
import warnings
from pathlib import Path

import torch
from faults.good_calls import METHODS, ROOMS

import hfproj

SECONDS = 10.0  # of a call: most are a few milliseconds, and machines that are shared may be slow
WRONG = {
    "None": None, "-1": -1, "0": 0, "NaN": math.nan, "inf": math.inf, "10**20": 10**20, "a number": 3.7, "''": "",
    "no such": "no such", "[]": [], "{}": {}, "object": object(), "bytes": b"bytes", "path": Path("/nowhere/at/all"),
    "True": True, "a list": ["a", None], "a scalar tensor": torch.tensor(1.0), "a long tensor": torch.arange(3),
    "an empty tensor": torch.zeros(0, 6), "a matrix of NaN": torch.full((4, 6), math.nan), "a class": dict,
    "complex": torch.zeros(2, 2, dtype=torch.complex64), "meta": torch.zeros(4, 6, device="meta"), "len": len,
    "five dimensions": torch.zeros(1, 1, 1, 1, 1), "a dict": {"no such": 1}, "gpu": "gpu", "a tuple": (1, 2, 3),
}  # fmt: skip
GOOD = ["training arguments", "train", "EvalImages.for_model, vit_nano", "ImageViews.for_model, vit_nano"]


def calls():
    """Yield (name, function that returns what is called with its arguments)."""
    for room, table in ROOMS.items():
        for name, given in table.items():
            found = getattr(importlib.import_module(f"hfproj.{room}" if room else "hfproj"), name, None)
            if found is None:
                places = ("backbones", "features", "regularizers", "reporting", "results", "data", "studies")
                parts = (getattr(importlib.import_module(f"hfproj.{p}"), name, None) for p in places)
                found = next(part for part in parts if part is not None)
            yield name, lambda found=found, given=given: (found, *given())
    yield from METHODS.items()


def all_tries(seed=0, count=None):
    """Yield (what, function, arguments): every argument of every call with every wrong value, or `count` of them."""
    tries = [(f"{name}, a good call", try_good, (METHODS[name],)) for name in GOOD]
    for name, make in calls():
        _, args, kwargs = make()
        for place in [*range(len(args)), *kwargs]:
            # What a callable of the user's own raises is the user's.
            own = callable(args[place] if isinstance(place, int) else kwargs[place])
            wrongs = [wrong for wrong in WRONG if not (own and callable(WRONG[wrong]))]
            tries += [(f"{name}({place}={wrong})", try_call, (make, place, wrong)) for wrong in wrongs]
    return tries if count is None else random.Random(seed).sample(tries, count)


def try_good(make):
    """Return what went wrong with a call that is good: tries of its arguments would say nothing."""
    function, args, kwargs = make()
    function(*args, **kwargs)


def try_call(make, place, wrong):
    """Return what went wrong, or None."""
    function, args, kwargs = make()
    if isinstance(place, int):
        args = (*args[:place], WRONG[wrong], *args[place + 1 :])
    else:
        kwargs = {**kwargs, place: WRONG[wrong]}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), limited():
        warnings.simplefilter("ignore")
        try:
            found = function(*args, **kwargs)
            if hasattr(found, "savefig"):
                importlib.import_module("matplotlib.pyplot").close(found)
        except hfproj.HfprojError as error:
            return "several lines" if "\n" in str(error) else None
        except BaseException as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
    return None


@contextlib.contextmanager
def limited():
    """Return a context that ends in TimeoutError; C code that does not return is not interrupted."""

    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
