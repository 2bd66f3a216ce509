"""Repositories of the loopback Hub: git's names for blobs, trees and commits, kept as plain files in a folder.

A repository is a folder with ``objects/`` (contents, named by git's SHA-1 of the blob, or by the SHA-256 of a large
file), ``commits/`` (one JSON each: parents, author, date, message and the whole tree) and ``about.json`` (settings,
refs and discussions). The latter is replaced in one step, last: what fails before leaves no more than unused objects.
"""

import hashlib
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

MAIN = "refs/heads/main"
# The large files of the .gitattributes that the Hub writes into a new repository, as far as files of this project go.
LARGE = (".arrow", ".bin", ".ckpt", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".zip")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
REGULAR_LIMIT = 10 << 20  # bytes of a file that goes into the commit itself; beyond it has to be a large one


class Refusal(Exception):
    """An answer other than success, worded as the Hub words it; ``code`` is what the client tells errors apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, *, headers: dict | None = None, **fields):
        super().__init__(message)
        self.status, self.message, self.code, self.headers, self.fields = status, message, code, headers or {}, fields


class Entry(NamedTuple):
    """A file of a tree. ``oid`` is git's: that of the pointer where the content is a large file with a SHA-256."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def content(self) -> str:
        return self.sha256 or self.oid


class Commit(NamedTuple):
    sha: str
    title: str
    description: str
    author: str
    date: str
    parents: list[str]
    files: dict[str, Entry]


def git_object(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def large(sha256: str, size: int) -> Entry:
    return Entry(git_object("blob", pointer(sha256, size)), size, sha256)


def tree_ids(files: dict[str, Entry]) -> dict[str, str]:
    """Git's names of all folders, from their paths; that of the root is ''."""
    folders: dict[str, dict[str, tuple[str, str]]] = {"": {}}
    for path, entry in files.items():
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, {})[name] = ("100644", entry.oid)
        while folder:
            folder = folder.rpartition("/")[0]
            folders.setdefault(folder, {})
    ids = {}
    for folder in sorted(folders, key=lambda f: (f.count("/") + bool(f), f), reverse=True):  # the deepest first
        items = sorted(folders[folder].items(), key=lambda item: (item[0] + "/" * (item[1][0] == "40000")).encode())
        data = b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(oid) for name, (mode, oid) in items)
        ids[folder] = git_object("tree", data)
        if folder:
            parent, _, name = folder.rpartition("/")
            folders[parent][name] = ("40000", ids[folder])
    return ids


def replace(path: Path, data: bytes) -> None:
    """Write a file in one step: a reader sees the old content or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


class Repository:
    """One repository in a folder. Not safe for threads by itself: the Hub's lock guards it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.about = json.loads((folder / "about.json").read_text())

    @classmethod
    def create(cls, folder: Path, *, author: str, private: bool = False, gated: bool = False) -> "Repository":
        for part in ("objects", "commits"):
            (folder / part).mkdir(parents=True)
        about = {"private": private, "gated": gated, "created": _now(), "refs": {}, "discussions": []}
        replace(folder / "about.json", json.dumps(about).encode())
        repository = cls(folder)
        entry = repository.store(ATTRIBUTES.encode())
        repository.commit(MAIN, {".gitattributes": entry}, title="initial commit", author=author)
        return repository

    def save(self) -> None:
        replace(self.folder / "about.json", json.dumps(self.about, indent=1).encode())

    @property
    def refs(self) -> dict[str, str]:
        return self.about["refs"]

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag, a pull request's ref or a commit's own name stands for."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        if len(revision) == 40 and revision.isalnum() and (self.folder / "commits" / f"{revision}.json").is_file():
            return revision
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def read_commit(self, sha: str) -> Commit:
        values = json.loads((self.folder / "commits" / f"{sha}.json").read_text())
        return Commit(sha, *values[:-1], {path: Entry(*entry) for path, entry in values[-1].items()})

    def history(self, revision: str) -> list[Commit]:
        """First parents, the newest first."""
        found = [self.read_commit(self.resolve(revision))]
        while found[-1].parents:
            found.append(self.read_commit(found[-1].parents[0]))
        return found

    def object(self, name: str) -> Path:
        return self.folder / "objects" / name

    def has_large(self, sha256: str) -> bool:
        return len(sha256) == 64 and sha256.isalnum() and self.object(sha256).is_file()

    def store(self, data: bytes, *, as_large: bool = False) -> Entry:
        if as_large:
            entry = large(hashlib.sha256(data).hexdigest(), len(data))
        else:
            entry = Entry(git_object("blob", data), len(data))
        if not self.object(entry.content).exists():
            replace(self.object(entry.content), data)
        return entry

    def read(self, entry: Entry) -> bytes:
        return self.object(entry.content).read_bytes()

    def commit(
        self,
        ref: str,
        changes: dict[str, Entry | None],
        *,
        title: str,
        description: str = "",
        author: str,
        onto: str | None = None,
        also: list[str] | None = None,
    ) -> str:
        """Set (or with None delete) files on top of a commit and let ``ref`` point to the result; returns its name.

        Args:
            onto: The first parent; by default what ``ref`` stands for now.
            also: Further parents, of a merge.
        """
        onto = onto or self.refs.get(ref)
        files = dict(self.read_commit(onto).files) if onto else {}
        for path, entry in changes.items():
            if entry is None:
                del files[path]
            else:
                files[path] = entry
        parents = [onto] if onto else []
        parents += also or []
        date = _now()
        stamp = f"{author} <{author}@loopback> {int(datetime.fromisoformat(date).timestamp())} +0000"
        lines = [
            f"tree {tree_ids(files)['']}",
            *(f"parent {p}" for p in parents),
            f"author {stamp}",
            f"committer {stamp}",
        ]
        text = "\n".join([*lines, "", title, *(["", description] if description else []), ""])
        sha = git_object("commit", text.encode())
        values = [title, description, author, date, parents, files]
        replace(self.folder / "commits" / f"{sha}.json", json.dumps(values).encode())
        self.refs[ref] = sha
        self.save()
        return sha

    def last_changes(self, revision: str) -> dict[str, Commit]:
        """For every file and folder of a revision the commit that changed it last."""
        history = self.history(revision)
        found: dict[str, Commit] = {}
        for commit, parent in zip(history, [*(c.files for c in history[1:]), {}]):
            changed = {p for p in commit.files.keys() | parent.keys() if commit.files.get(p) != parent.get(p)}
            for path in changed:
                found.setdefault(path, commit)
                while path := path.rpartition("/")[0]:
                    found.setdefault(path, commit)
        return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
