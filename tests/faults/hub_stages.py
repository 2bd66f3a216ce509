"""A fault at every request of a push and of a pull, and hostile adapters that a Hub serves.

What a whole push (or pull) asks of the Hub is recorded first. Then each of these requests fails in every way that the
loopback Hub knows, once and for ever, and so does everything from that request on. `pushes`, `pulls` and `served` take
a sample of these tries, or all, and return how many there were and what is wrong about those that failed. By hand:

    python tests/faults/hub_stages.py [pushes [tries] | pulls [tries] | served [one of how many]]
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hub_place import ERRORS, PATIENCE, Fault, Place, RemoteError, Stage, count, place_in, since, wrong_words

REPO = "me/heads"
HOSTILE = ("fields", "bytes_of_files", "large_adapters")
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


def try_push(pushed: Pushed, stage: Stage, fault: Fault) -> str | None:
    place, back = pushed.place, None
    pushed.start()
    struck = place.fail(stage, fault)
    try:
        back = pushed.do()
        problem = pushed.arrived(back, commits=True)
    except RemoteError as error:
        problem = wrong_words(error, place.hub) or pushed.left(error.message)
    problem = problem or (None if struck.hits else "nothing ran into it") or place.heal()
    if problem or back:
        return problem
    return pushed.arrived(pushed.do(), commits=False) or place.heal()


def pushes(
    folder: Path | Place, wanted: int | None = 620, seed: int = 0, kinds: Collection[str] = tuple(PUSHES)
) -> dict[str, Any]:
    """Let pushes fail: whatever happens, it succeeds and all is there, or one line says what there is now.

    Args:
        folder: An empty one.
        wanted: How many tries. None: all.
        seed: Which ones.
        kinds: Of which pushes.
    """
    with place_in(folder) as place:
        found = {name: Pushed(place, name) for name in kinds}
        records = {name: pushed.stages for name, pushed in found.items()}
        return count(records, lambda kind, *fault: try_push(found[kind], *fault), wanted, seed)


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
        problem = wrong_words(error, place.hub)
    problem = problem or (None if struck.hits else "nothing ran into it") or place.heal()
    if problem:
        return problem
    try:
        problem = pull(offline=True)
    except RemoteError as error:
        problem = wrong_words(error, place.hub)
    return problem or pull()


def pulls(
    folder: Path | Place, wanted: int | None = 800, seed: int = 0, kinds: Collection[str] = tuple(PULLS)
) -> dict[str, Any]:
    """Let pulls fail: the same values or one line, and nothing in the cache that gives others.

    Arguments are those of `pushes`.
    """
    with place_in(folder) as place:
        _fill(place)
        expected, records = {}, {}
        for name in kinds:
            options = PULLS[name]
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


def served(folder: Path | Place, every: int = 5, kinds: Collection[str] = HOSTILE) -> dict[str, Any]:
    """Open hostile adapters of `hostile_files` from the Hub: what is said has to be what is said of a folder.

    Args:
        folder: An empty one.
        every: One of how many cases is opened.
        kinds: Which functions of `hostile_files` make them.
    """
    begun, tried, refused, failures = time.monotonic(), 0, 0, []
    with place_in(folder) as place, tempfile.TemporaryDirectory() as files:
        hub, ports = place.hub, [server.server_port for server in place.hub.servers]
        hub.create(REPO)
        place.client("scripts_stages:hostile", folder=files, ports=ports, kinds=list(kinds))
        while case := place.client("scripts_stages:next_hostile", step=every):
            name, here = case
            hub.put(REPO, {p.name: p.read_bytes() for p in Path(files).iterdir()})
            place.client.clear_cache()
            there, elsewhere = place.client("scripts_stages:open_served", repo=REPO)
            tried, refused = tried + 1, refused + (there is not None)
            if problem := _differs(here, there, files) or (elsewhere and f"it reached for {elsewhere}") or place.heal():
                failures.append(f"{name}: {problem}")
    found = {"tried": tried, "failed": len(failures), "failures": failures, "refused": refused}
    return {**found, "took": since(begun)}


def _differs(here, there, folder: str) -> str | None:
    """Return how what is said of a repository differs from what is said of the same files in a folder.

    A file whose size its config does not allow is refused before it is downloaded, in other words.
    """
    if there is not None and ("\n" in there[1] or there[0] not in ERRORS):
        return f"{there[0]}: {there[1]}"
    by_size = here and there and here[0] == there[0] and "asks for at " in there[1]
    same = by_size or here == (there and [there[0], there[1].replace(REPO, folder)])
    return None if same else f"from the folder {here}, from the Hub {there}"


def main() -> None:
    for name in sys.argv[1:2] or ["pushes", "pulls", "served"]:
        options = list(map(int, sys.argv[2:3]))
        with tempfile.TemporaryDirectory() as folder:
            found = {"pushes": pushes, "pulls": pulls, "served": served}[name](Path(folder), *options)
        print(name, json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
