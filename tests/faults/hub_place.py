"""A Hub and a client in which each request of a record fails in every way, and the count of what became of it."""

import contextlib
import random
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE.parent / "hub"), str(HERE.parent)) if p not in sys.path]

from client import Client, RemoteError
from loopback import Hub

SLOW, PATIENCE = 0.3, 0.15  # seconds of a slow answer, and how long a pull waits for it
ERRORS = ("HubError", "UnreachableError", "AdapterFileError", "UsageError")


class Stage(NamedTuple):
    """A request of a record: the nth of this method and path, the kth of all; ``size`` is that of its body."""

    method: str
    path: str
    nth: int
    kth: int
    size: int


class Fault(NamedTuple):
    """What happens at a stage: to one request, to all like it from then on, or to all requests from then on."""

    what: int | str
    lasts: str  # "once", "on" or "all"
    after: int | None = None


class Place:
    """A loopback Hub and a client, for all tries."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.hub = Hub(folder / "hub").start()
        self.client = Client(self.hub, folder / "client", preload=False)
        self.client.timeout = 60.0

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_) -> None:
        self.client.close()
        self.hub.stop()

    def keep(self, name: str) -> Path:
        """Keep the repositories as they are, for `restore`."""
        kept = self.folder / "kept" / name
        shutil.copytree(self.hub.folder, kept)
        return kept

    def restore(self, kept: Path) -> None:
        self.hub.reset()
        shutil.copytree(kept, self.hub.folder, dirs_exist_ok=True)

    def record(self, call) -> list[Stage]:
        """Return the requests that a call makes."""
        with self.hub.lock:
            self.hub.requests.clear()
        call()
        found, seen = [], Counter()
        for kth, request in enumerate(self.hub.requests):
            path = _pattern(request.path)
            found.append(Stage(request.method, path, seen[request.method, path], kth, request.size))
            seen[request.method, path] += 1
        return found

    def fail(self, stage: Stage, fault: Fault):
        times, every = 1 if fault.lasts == "once" else None, fault.lasts == "all"
        method, path, skip = (".*", "", stage.kth) if every else (stage.method, stage.path, stage.nth)
        options = {"times": times, "after_bytes": fault.after, "seconds": SLOW, "skip": skip}
        return self.hub.fail(method, path, fault.what, **options)

    def heal(self) -> str | None:
        """End all faults; returns what is wrong with the Hub itself."""
        with self.hub.lock:
            self.hub.faults.clear()
            errors, self.hub.errors = self.hub.errors, []
        return f"the loopback Hub is at fault: {errors[0]}" if errors else None


def _pattern(path: str) -> str:
    """A regular expression for a path whose commits, contents and signatures may be others."""
    return "^" + re.sub(r"[0-9a-f]{64}|[0-9a-f]{40}", "[0-9a-f]+", re.escape(path.partition("?")[0])) + r"(\?|$)"


def faults_of(stage: Stage) -> list[Fault]:
    """Return the faults that a request may meet."""
    statuses = [401, 403, 404, 429, 500, 502, 503]
    changes = stage.method not in ("GET", "HEAD")
    statuses += [409] * changes + [412] * ("commit" in stage.path) + [413] * bool(stage.size)
    cuts = [None] if stage.method in ("HEAD", "DELETE") else [0, 1, 200, None, 1 << 40]
    each = [*[(s, None) for s in statuses], ("slow", None), ("lost", None), *[("cut", at) for at in cuts]]
    found = [Fault(what, lasts, after) for what, after in each for lasts in ("once", "on")]
    return found + [Fault(what, "all") for what in (500, "cut", "lost")]


def tries_of(records: dict[str, list[Stage]], wanted: int | None, seed: int) -> list[tuple[str, Stage, Fault]]:
    """Return every kind, stage and fault; or that many, of as many stages as can be."""
    found = [(kind, stage, fault) for kind, stages in records.items() for stage in stages for fault in faults_of(stage)]
    if wanted is None:
        return found
    random.Random(seed).shuffle(found)
    seen, ranked = Counter(), []
    for one in found:
        seen[one[:2]] += 1
        ranked.append((seen[one[:2]], one))
    return [one for _, one in sorted(ranked, key=lambda r: r[0])[:wanted]]


def count(records, run, wanted, seed) -> dict[str, Any]:
    """Run tries and return how many failed, why, and how many there were of each kind of fault."""
    begun, kinds, failures = time.monotonic(), Counter(), []
    for kind, stage, fault in (chosen := tries_of(records, wanted, seed)):
        kinds[f"{fault.what} {fault.lasts}"] += 1
        try:
            problem = run(kind, stage, fault)
        except Exception as error:  # of the test itself, which is a failure as well
            problem = f"{type(error).__name__}: {error}"
        if problem:
            name = f"{kind}: {stage.method} {stage.path} {stage.nth}, {fault.what} {fault.after or ''} {fault.lasts}"
            failures.append(f"{name}: {problem}")
    reached = len({one[:2] for one in chosen})
    found = {"tried": len(chosen), "failed": len(failures), "failures": failures, "stages": reached}
    return {**found, "of": sum(map(len, records.values())), "kinds": dict(kinds), "took": since(begun)}


def since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


@contextlib.contextmanager
def place_in(folder: Path | Place):
    """A place in a folder, or the one that is there already, empty."""
    if isinstance(folder, Place):
        folder.hub.reset()
        shutil.rmtree(folder.folder / "kept", ignore_errors=True)
        yield folder
    else:
        with Place(folder) as place:
            yield place


def wrong_words(error: RemoteError, hub: Hub) -> str | None:
    """Return what is wrong about an error of a push or a pull."""
    if error.type not in ERRORS:
        return f"{error.type}: {error.message}\n{error.traceback}"
    for part in ("\n", "Traceback", hub.token, "Request ID", "signature="):
        if part in error.message:
            return f"{part!r} in {error.message!r}"
    return None if error.message.endswith((".", ")")) else f"no sentence: {error.message!r}"
