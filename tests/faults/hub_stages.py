"""A fault at every request of a push and of a pull, and hostile adapters that a Hub serves.

What a whole push (or pull) asks of the Hub is recorded first. Then each of these requests fails in every way that the
loopback Hub knows, once and for ever, and so does everything from that request on. `pushes`, `pulls` and `served` do
all of it or a sample, and return how many tries there were and what is wrong about those that failed. By hand:

    python tests/faults/hub_stages.py [pushes|pulls|served] [tries]
"""

import contextlib
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE.parent / "hub"), str(HERE.parent)) if p not in sys.path]

from client import Client, RemoteError
from loopback import Hub

REPO = "me/heads"
SLOW, PATIENCE = 0.3, 0.15  # seconds of a slow answer, and how long a pull waits for it
MEASURED = {"measured": 0.75}
TWO = {"adapters": ["default", "b"]}


@dataclass
class Push:
    """A kind of push: what was pushed before, with which arguments it is called, and where its commit arrives."""

    options: dict[str, Any]
    before: list[dict[str, Any]] = field(default_factory=list)
    revision: str = "main"
    chunk: int | None = None


PUSHES = {
    "new": Push({}),
    "new and private, with everything": Push({**MEASURED, "queue": 4, "private": True, "eval_results": True}),
    "existing": Push({"seed": 1}, [{**MEASURED, "queue": 4}]),
    "unchanged": Push(MEASURED, [MEASURED]),
    "large, in parts": Push({"queue": 200_000}, chunk=5 << 20),
    "several": Push({**TWO, "active": "b", "measured": 0.5}, [{**TWO, **MEASURED}]),
    "one beside another": Push({**TWO, "only": ["b"], "active": "b"}, [{}]),
    "pull request": Push({"seed": 1, "create_pr": True}, [{}, {"seed": 2, "create_pr": True}], "refs/pr/2"),
    "new branch": Push({"seed": 1, "revision": "dev"}, [{}], "dev"),
    "branch": Push({"seed": 2, "revision": "dev"}, [{}, {"seed": 1, "revision": "dev"}], "dev"),
}
PULLS: dict[str, dict[str, Any]] = {
    "head": {"repo": "me/all", "door": "load_head"},
    "named": {"repo": "me/all", "door": "load_head", "adapter": "b"},
    "revision": {"repo": "me/all", "door": "load_head", "revision": "dev"},
    "header first": {"repo": "me/all", "door": "all", "adapter": "b", "header_first": True},
    "everything": {"repo": "me/all", "door": "all", "revision": "dev"},
    "everything of a named one": {"repo": "me/all", "door": "all", "adapter": "b"},
    "with a backbone without images": {"repo": "me/on-bare", "door": "from_pretrained"},
    "with its backbone": {"repo": "me/on-backbone", "door": "from_pretrained"},
    "with a bundled backbone": {"repo": "me/all", "door": "from_pretrained"},
    "list": {"repo": "me/all", "door": "list"},
}


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
    return {**found, "of": sum(map(len, records.values())), "kinds": dict(kinds), "took": _since(begun)}


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


@contextlib.contextmanager
def _place(folder: Path | Place):
    """A place in a folder, or the one that is there already, empty."""
    if isinstance(folder, Place):
        folder.hub.reset()
        shutil.rmtree(folder.folder / "kept", ignore_errors=True)
        yield folder
    else:
        with Place(folder) as place:
            yield place


def _wrong_words(error: RemoteError, hub: Hub) -> str | None:
    """Return what is wrong about an error of a push or a pull."""
    if error.type not in ("HubError", "UnreachableError", "AdapterFileError", "UsageError"):
        return f"{error.type}: {error.message}\n{error.traceback}"
    for part in ("\n", "Traceback", hub.token, "Request ID", "signature="):
        if part in error.message:
            return f"{part!r} in {error.message!r}"
    return None if error.message.endswith((".", ")")) else f"no sentence: {error.message!r}"


# Pushes


class Pushed:
    """What a push of a kind starts from and what it leaves, found out without a fault."""

    def __init__(self, place: Place, name: str):
        self.place, self.push, hub = place, PUSHES[name], place.hub
        hub.reset()
        for options in self.push.before:
            place.client("scripts_stages:push", repo_id=REPO, **options)
        self.kept = place.keep(f"{len(list((place.folder / 'kept').glob('*')))}")
        self.before, self.old = hub.state(), self._all()
        hub.chunk = self.push.chunk
        self.stages = place.record(self.do)
        self.files, self.commits = hub.files(REPO, self.push.revision), len(hub.commits(REPO, self.push.revision))

    def do(self):
        return self.place.client("scripts_stages:push", repo_id=REPO, **self.push.options)

    def _all(self) -> dict[str, dict[str, bytes]]:
        """The files of every branch and pull request."""
        hub = self.place.hub
        return {ref: hub.files(REPO, ref) for ref in hub.refs(REPO)} if hub.exists(REPO) else {}

    def start(self) -> None:
        self.place.restore(self.kept)
        self.place.hub.chunk = self.push.chunk

    def arrived(self, back, *, commits: bool) -> str | None:
        """Return what is wrong with what a push that said it succeeded has left."""
        hub, where = self.place.hub, self.push.revision
        if self.push.options.get("create_pr"):
            where = f"refs/pr/{back['pr'].rpartition('/')[2]}"
        if hub.files(REPO, where) != self.files:
            return f"other files in {where} than were pushed"
        if hub.commits(REPO, where)[0].sha != back["oid"]:
            return f"the commit said is not that of {where}"
        more = set(hub.refs(REPO)) - set(self.old) - {"refs/heads/main", where, f"refs/heads/{where}"}
        if commits and (more or len(hub.commits(REPO, where)) != self.commits):
            return f"more than once: {len(hub.commits(REPO, where))} commits, and {sorted(more)}"
        return None

    def left(self, said: str) -> str | None:
        """Return what is wrong with what a push that failed has left, or says of it."""
        now, made = self._all(), "was made and could not be deleted again" in said
        whole = (self.files, self.old.get("refs/heads/main"), {".gitattributes": now and self._first()})
        for ref, files in now.items():
            if files != self.old.get(ref) and files not in whole:
                return f"{ref} is half-written: {sorted(files)}; said: {said}"
        if set(self.old) - set(now) or len(set(now) - set(self.old)) > 1:
            return f"there was {sorted(self.old)}, there is {sorted(now)}; said: {said}"
        unsure = any(words in said for words in ("could not be seen", "look at", "left as it is"))
        if self.place.hub.state() != self.before and not unsure and not made:
            return f"changed, but said: {said}"
        return f"as it was, but said: {said}" if made and self.place.hub.state() == self.before else None

    def _first(self) -> bytes:
        hub = self.place.hub
        first = hub.commits(REPO)[-1].sha
        return hub.files(REPO, first)[".gitattributes"]


def _try_push(pushed: Pushed, stage: Stage, fault: Fault) -> str | None:
    place, back = pushed.place, None
    pushed.start()
    struck = place.fail(stage, fault)
    try:
        back = pushed.do()
        problem = pushed.arrived(back, commits=True)
    except RemoteError as error:
        problem = _wrong_words(error, place.hub) or pushed.left(error.message)
    problem = problem or (None if struck.hits else "nothing ran into it") or place.heal()
    if problem or back:
        return problem
    return pushed.arrived(pushed.do(), commits=False) or place.heal()


def pushes(folder: Path | Place, wanted: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Let pushes fail: whatever happens, it succeeds and all is there, or one line says what there is now.

    Args:
        folder: An empty one.
        wanted: How many tries. None: all.
        seed: Which ones.
    """
    with _place(folder) as place:
        found = {name: Pushed(place, name) for name in PUSHES}
        records = {name: pushed.stages for name, pushed in found.items()}
        return count(records, lambda kind, *fault: _try_push(found[kind], *fault), wanted, seed)


# Pulls


def _fill(place: Place) -> None:
    """Put what is pulled into the Hub."""
    folder, hub = place.folder / "pulled", place.hub
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    place.client("scripts_stages:save_for_pulls", folder=str(folder))
    for part in folder.iterdir():
        repo = f"me/{part.name.removesuffix('-default').removesuffix('-b')}"
        if not hub.exists(repo):
            hub.create(repo)
        files = {p.relative_to(part).as_posix(): p.read_bytes() for p in sorted(part.rglob("*")) if p.is_file()}
        hub.put(repo, {name: data for name, data in files.items() if part.name != "all-b" or "/" in name})
    hub.put("me/all", {"notes.txt": b"of a branch"}, "dev")


def _is_right(kind: str, back: dict[str, Any], expected: Any, *, offline: bool = False) -> bool:
    """Whether a pull gave what it has to: z to the last bit, and what else it did not give was said."""
    found = back["found"]
    if PULLS[kind]["door"] == "all":  # a file that the cache does not have is none
        return found == expected or (
            offline and found[:2] == expected[:2] and all(f in (None, e) for f, e in zip(found, expected))
        )
    if PULLS[kind]["door"] == "from_pretrained":
        return found == expected or (found[0] == expected[0] and (offline or bool(back["warnings"])))
    return found == expected or (kind == "list" and bool(back["warnings"]))


def _try_pull(place: Place, kind: str, expected: Any, stage: Stage, fault: Fault) -> str | None:
    def pull(**options):
        back = place.client("scripts_stages:pull", **PULLS[kind], **options)
        right = _is_right(kind, back, expected, offline=options.get("offline", False))
        return None if right else f"other values with {options or 'no fault'}; warned: {back['warnings']}"

    place.client.clear_cache()
    struck = place.fail(stage, fault)
    try:
        problem = pull(patience=PATIENCE if fault.what == "slow" else None)
    except RemoteError as error:
        problem = _wrong_words(error, place.hub)
    problem = problem or (None if struck.hits else "nothing ran into it") or place.heal()
    if problem:
        return problem
    try:
        problem = pull(offline=True)
    except RemoteError as error:
        problem = _wrong_words(error, place.hub)
    return problem or pull()


def pulls(folder: Path | Place, wanted: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Let pulls fail: the same values or one line, and nothing in the cache that gives others. Arguments of `pushes`."""
    with _place(folder) as place:
        _fill(place)
        expected, records = {}, {}
        for name, options in PULLS.items():
            place.client.clear_cache()
            records[name] = place.record(
                lambda: expected.update({name: place.client("scripts_stages:pull", **options)["found"]})
            )

        def run(kind, stage, fault):
            try:
                return _try_pull(place, kind, expected[kind], stage, fault)
            finally:
                place.heal()

        return count(records, run, wanted, seed)


# Hostile adapters


def served(folder: Path | Place, wanted: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Open the hostile adapters of `hostile_files` from the Hub: refused as from a folder. Arguments of `pushes`."""
    begun, tried, failures, step = time.monotonic(), 0, [], 1 if wanted is None else 1800 // wanted
    with _place(folder) as place, tempfile.TemporaryDirectory() as files:
        hub, ports = place.hub, [server.server_port for server in place.hub.servers]
        hub.create(REPO)
        place.client("scripts_stages:hostile", folder=files, ports=ports)
        while case := place.client("scripts_stages:next_hostile", step=step):
            name, here = case
            hub.put(REPO, {p.name: p.read_bytes() for p in Path(files).iterdir()})
            place.client.clear_cache()
            there, elsewhere = place.client("scripts_stages:open_served", repo=REPO)
            tried += 1
            if problem := _differs(here, there, files) or (elsewhere and f"it reached for {elsewhere}") or place.heal():
                failures.append(f"{name}: {problem}")
    return {"tried": tried, "failed": len(failures), "failures": failures, "took": _since(begun)}


def _differs(here, there, folder: str) -> str | None:
    """Return how what is said of a repository differs from what is said of the same files in a folder."""
    if (here is None) != (there is None):
        return f"from the folder {here}, from the Hub {there}"
    if here is None:
        return None
    if there[0] != here[0] or "\n" in there[1]:
        return f"from the folder {here}, from the Hub {there}"
    return None if there[1].replace(REPO, folder) == here[1] else f"said otherwise: {here[1]} | {there[1]}"


def main() -> None:
    names = sys.argv[1:2] or ["pushes", "pulls", "served"]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = globals()[name](Path(folder), int(sys.argv[2]) if len(sys.argv) > 2 else None)
        print(name, json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
