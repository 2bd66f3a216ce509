"""A Hub on this machine: a small server with the Hub's HTTP API as huggingface_hub uses it, which fails when told to.

In tests the fixtures ``hub`` and ``client`` start it. By hand, from the root of the repository:

    python -m tests.hub.loopback --port 8000 --folder /tmp/hub --token hf_loopback

which prints the environment variables that make any program use it.
"""

import argparse
import contextlib
import hashlib
import hmac
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # run as a module as well as by pytest

from loopback_api import Call
from loopback_http import MESSAGES, Fault, Request, Server
from loopback_repo import LARGE, REGULAR_LIMIT, Commit, Entry, Refusal, Repository


@dataclass
class Hub:
    """The server and its repositories. Use as a context manager, or ``start`` and ``stop``.

    Attributes:
        url, storage_url: Addresses of the API and of the storage of large files: another origin, which refuses tokens.
        user, token, other_user, other_token: Two accounts. ``orgs`` are those that ``user`` may write to.
        page: Entries per page of a listing.
        chunk: Large files beyond these bytes are uploaded in parts of that size. None: in one.
        requests, bodies: What was asked since the last ``reset``, in order, and the bodies of these requests.
        errors: Tracebacks of this server's own mistakes.
    """

    folder: Path
    port: int = 0
    token: str = field(default_factory=lambda: f"hf_{_letters()}")
    user: str = "me"
    verbose: bool = False

    def __post_init__(self):
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.other_user, self.other_token, self.orgs = "someone-else", f"hf_{_letters()}", ("my-lab",)
        self.lock, self.secret = threading.RLock(), secrets.token_bytes()
        self.servers, self.generation = [], threading.Event()
        self._clear()

    def _clear(self):
        self.page, self.chunk = 1000, None
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.bodies: list[bytes] = []
        self.errors: list[str] = []
        self.parts: dict[Any, bytes] = {}

    # The server

    def start(self) -> "Hub":
        for port in (self.port, 0):
            self.servers.append(server := Server(self, port))
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        return self

    def stop(self) -> None:
        self.generation.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()
        self.servers = []

    def __enter__(self) -> "Hub":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def reset(self) -> None:
        """Forget all repositories, faults and requests; answers that are still being delayed are dropped."""
        with self.lock:
            self.generation.set()
            self.generation = threading.Event()
            self._clear()
            shutil.rmtree(self.folder)
            self.folder.mkdir()

    # For tests: a look at the repositories, past the API

    def create(self, repo_id: str, private: bool = False, *, gated: bool = False, kind: str = "models") -> str:
        """Make a repository with the Hub's first commit (a .gitattributes); returns the commit's name."""
        with self.lock:
            owner = repo_id.split("/")[0]
            return self.add(kind, repo_id, author=owner, private=private, gated=gated).refs["refs/heads/main"]

    def put(self, repo_id: str, files: dict[str, bytes | None], revision: str = "main", *, kind: str = "models") -> str:
        """Write any bytes to any paths (None deletes), without the API's checks; returns the commit's name.

        Large files are those with a suffix of weights or beyond 10 MB. A missing branch starts at main.
        """
        with self.lock:
            repository = self._repository(repo_id, kind)
            ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            changes: dict[str, Entry | None] = dict.fromkeys(files)
            for path, data in files.items():
                if data is not None:
                    is_large = path.endswith(LARGE) or len(data) > REGULAR_LIMIT
                    changes[path] = repository.store(data, as_large=is_large)
            onto = repository.refs.get(ref) or repository.resolve("main")
            return repository.commit(ref, changes, title="Put", author=repo_id.split("/")[0], onto=onto)

    def files(self, repo_id: str, revision: str = "main", *, kind: str = "models") -> dict[str, bytes]:
        with self.lock:
            repository = self._repository(repo_id, kind)
            files = repository.read_commit(repository.resolve(revision)).files
            return {path: repository.read(entry) for path, entry in files.items()}

    def commits(self, repo_id: str, revision: str = "main", *, kind: str = "models") -> list[Commit]:
        """Commits of a revision, the newest first: sha, title, description, author, date, parents, files."""
        with self.lock:
            return self._repository(repo_id, kind).history(revision)

    def branches(self, repo_id: str, *, kind: str = "models") -> dict[str, str]:
        """Branches and the commits they point to."""
        start = "refs/heads/"
        refs = self.refs(repo_id, kind=kind)
        return {ref.removeprefix(start): sha for ref, sha in refs.items() if ref.startswith(start)}

    def refs(self, repo_id: str, *, kind: str = "models") -> dict[str, str]:
        """All of git's refs: branches, tags and pull requests."""
        with self.lock:
            return dict(self._repository(repo_id, kind).refs)

    def exists(self, repo_id: str, *, kind: str = "models") -> bool:
        return self.find(kind, repo_id) is not None

    def state(self) -> dict[str, bytes]:
        """What is kept of all repositories, without contents: equal before and after a push that failed."""
        with self.lock:
            found = {p.relative_to(self.folder): p for p in self.folder.rglob("*") if p.is_file()}
            return {str(name): p.read_bytes() for name, p in found.items() if "objects" not in name.parts}

    def fail(
        self,
        method: str,
        path: str,
        what: int | str,
        *,
        times: int | None = 1,
        headers: dict[str, str] | None = None,
        after_bytes: int | None = None,
        seconds: float = 3.0,
        skip: int = 0,
    ) -> Fault:
        """Let the next requests fail that have this method and path (with its query); both are regular expressions.

        Large files travel by ``/storage/…``, all else by ``/api/…`` and ``/owner/name/resolve/…``.

        Args:
            what: A status, answered without doing anything. "slow": answers after ``seconds``, or not at all once the
                test is over. "cut": the connection ends after ``after_bytes`` bytes (by default half) of what is sent
                here, or of the answer to a GET. "lost": does what it was asked to, then ends the connection unanswered.
            times: Requests to strike, then all is well; None strikes for ever.
            skip: Requests to leave alone first.
            headers: Of the answer. A 404 says RepoNotFound and a 429 "Retry-After: 1" unless told otherwise.
        """
        if isinstance(what, str) and what not in ("slow", "cut", "lost"):
            raise ValueError(f"what is a status, 'slow', 'cut' or 'lost', not {what!r}")
        fault = Fault(method, re.compile(path), what, times, headers or {}, after_bytes, seconds, skip)
        with self.lock:
            self.faults.append(fault)
        return fault

    # For the API

    def strike(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                open_ = fault.times is None or fault.hits < fault.times
                if open_ and re.fullmatch(fault.method, method) and fault.path.search(path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.hits += 1
                    return fault
        return None

    def orgs_of(self, user: str | None) -> tuple[str, ...]:
        return self.orgs if user == self.user else ()

    def owns(self, user: str | None, repo_id: str) -> bool:
        return user is not None and repo_id.split("/")[0] in (user, *self.orgs_of(user))

    def who(self, authorization: str | None) -> str | None:
        if not authorization:
            return None
        users = {f"Bearer {self.token}": self.user, f"Bearer {self.other_token}": self.other_user}
        if authorization not in users:
            raise Refusal(401, MESSAGES[401])
        return users[authorization]

    def signed(self, method: str, path: str, *, cdn: bool = True) -> str:
        path = f"/storage{path}" if cdn else path
        return f"{self.storage_url if cdn else self.url}{path}?signature={self._sign(method, path)}"

    def check_signature(self, call: Call) -> None:
        if call.headers.get("Authorization"):
            raise Refusal(400, "Only one auth mechanism allowed: the storage was sent a token")
        wanted = self._sign("GET" if call.method == "HEAD" else call.method, call.path)
        if not hmac.compare_digest(call.query.get("signature", [""])[0], wanted):
            raise Refusal(403, "SignatureDoesNotMatch")

    def _sign(self, method: str, path: str) -> str:
        return hmac.new(self.secret, f"{method} {path}".encode(), hashlib.sha256).hexdigest()

    def _folder(self, kind: str, repo_id: str) -> Path:
        return self.folder / kind / repo_id

    def find(self, kind: str, repo_id: str) -> Repository | None:
        folder = self._folder(kind, repo_id)
        return Repository(folder) if ".." not in repo_id and (folder / "about.json").is_file() else None

    def _repository(self, repo_id: str, kind: str) -> Repository:
        found = self.find(kind, repo_id)
        if found is None:
            raise KeyError(f"There is no {kind[:-1]} {repo_id}")
        return found

    def add(self, kind: str, repo_id: str, **options) -> Repository:
        return Repository.create(self._folder(kind, repo_id), **options)

    def remove(self, kind: str, repo_id: str) -> None:
        shutil.rmtree(self._folder(kind, repo_id))

    def rename(self, kind: str, old: str, new: str) -> None:
        if self.find(kind, new) is not None:
            raise Refusal(409, f"{new} exists already")
        self._folder(kind, new).parent.mkdir(parents=True, exist_ok=True)
        self._folder(kind, old).rename(self._folder(kind, new))

    def names(self, kind: str) -> list[str]:
        return sorted("/".join(p.parent.parts[-2:]) for p in self.folder.glob(f"{kind}/*/*/about.json"))


def _letters() -> str:
    return "".join(secrets.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(34))


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub.loopback", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--folder", type=Path, help="where repositories are kept; by default a new one, deleted at the end"
    )
    parser.add_argument("--token", default="hf_loopback", help="of the user")
    parser.add_argument("--user", default="me")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a shell's background job gets no Ctrl-C
    folder = options.folder or Path(tempfile.mkdtemp(prefix="hub-"))
    with Hub(folder, options.port, options.token, options.user, verbose=True) as hub:
        cache = tempfile.mkdtemp(prefix="hf-home-")
        print(f"A Hub of {hub.user} at {hub.url}, repositories in {folder}. In another shell:\n")
        for name, value in environment(hub, cache).items():
            print(f"export {name}={value}")
        print("\nIt ends with Ctrl-C.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    shutil.rmtree(cache, ignore_errors=True)
    if options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)


def environment(hub: Hub, home: str | Path) -> dict[str, str]:
    """What makes huggingface_hub use this server and nothing else. It has no Xet storage, only LFS."""
    values = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**values, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}


if __name__ == "__main__":
    main()
