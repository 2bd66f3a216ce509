"""Sending adapters to the Hub: one folder, looked through before anything is sent, in one commit.

The commit is made by ``HfApi.create_commit``: ``upload_folder`` may split a folder over several commits, and opens a
pull request before it knows that its files arrive.
"""

import hashlib
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn

import hfproj
from hfproj import filenames
from hfproj.errors import HfprojError, UsageError
from hfproj.hub.outgoing import check_outgoing
from hfproj.hub.parcel import ROOT, Parcel, pack
from hfproj.hub.sending import FAILURES, explain, patiently, usable_token
from hfproj.results import Results

# What an earlier push may have left beside an adapter, and what would be wrong beside the new one.
_STALE = (
    filenames.RESULTS,
    filenames.PICTURE,
    filenames.TRAINING_PICTURE,
    filenames.PREPROCESSING,
    filenames.OBJECTIVE,
    filenames.EMA,
)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    results: Results | None = None,
    adapters: Sequence[str] | None = None,
    objective: nn.Module | None = None,
    ema: Any = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    eval_results: bool = False,
    license: str | None = None,
) -> CommitInfo:
    """Push adapters of a model to the Hub, in one commit, with their card and what it says.

    Everything is checked first, and nothing is sent that is no file of an adapter or holds a token, a path or a user
    name of this machine. Adapters that lie in the repository already, under other names, stay as they are. If the push
    fails, the repository is left as it was; one that it made is deleted again.

    Args:
        model: A ``PeftModel`` with projection heads. Adapter "default" goes into the root of the repository, another
            one into a folder of its name.
        repo_id: ``"user/name"`` or ``"organisation/name"``; made if it does not exist.
        results: What was measured of the active adapter (`hfproj.evaluate`); None: the card says that nothing was.
        adapters: Names of those to push. None: all.
        objective: The objective whose buffers (queues, centres) go along, for ``continue_from=`` of the trainer.
        ema: The moving-average copy that goes along (``trainer.ema``).
        commit_message: Title of the commit.
        commit_description: Its text.
        private: Whether a repository that is made is private; of one that exists and is public, True is refused.
        token: Access token. Default: the one of `hf auth login`, or ``HF_TOKEN``.
        revision: Branch to push to, made from main if it does not exist, or ``"refs/pr/3"``. Default: main.
        create_pr: Open a pull request instead.
        eval_results: Write the measurements in the newer form of the Hub, too (``.eval_results``).
        license: Of the adapters, as the Hub writes it ("apache-2.0"). None: that of ``results.config["license"]``.

    Returns:
        The commit, with ``oid``, ``commit_url`` and, with `create_pr`, ``pr_url``.

    Raises:
        UsageError: something about the model, the target or the contents cannot work; nothing was sent.
        HubError: the Hub refused or could not be reached; it says what the repository is like now.
    """
    target = Target(repo_id, token=token, revision=revision, create_pr=create_pr, private=private)
    with tempfile.TemporaryDirectory(prefix="hfproj-") as folder:
        parcel = pack(
            model,
            Path(folder),
            repo_id,
            results=results,
            adapters=adapters,
            objective=objective,
            ema=ema,
            license=license,
            eval_results=eval_results,
        )
        return send(parcel, target, commit_message=commit_message, commit_description=commit_description)


@dataclass
class Target:
    """Where a push goes.

    Args:
        repo_id: As in `push_to_hub`, as the others.
        token: None: looked up.
        revision: Branch or pull request.
        create_pr: Whether a pull request is opened.
        private: Whether a new repository is private.

    Raises:
        UsageError: a value that cannot work, no token, or the process is offline.
    """

    repo_id: str
    token: str | bool | None = field(default=None, repr=False)
    revision: str | None = None
    create_pr: bool = False
    private: bool | None = None

    def __post_init__(self) -> None:
        check_repo_id(self.repo_id)
        if self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise UsageError(f"revision={self.revision!r} is a commit, and pushes go to branches; name one.")
        if self.create_pr and self.revision not in (None, "main"):
            raise UsageError(
                f"create_pr=True opens a pull request against main, so revision={self.revision!r} has no meaning; drop "
                "one of the two (a pull request that is open already is revision='refs/pr/<number>')."
            )
        self.token = usable_token(self.token)

    @property
    def owner(self) -> str:
        """User or organisation."""
        return self.repo_id.split("/")[0]


def check_repo_id(repo_id: Any) -> None:
    """Refuse what is no ``owner/name``.

    Raises:
        UsageError: so it is.
    """
    try:
        validate_repo_id(repo_id)
        valid = isinstance(repo_id, str) and repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(
            f"repo_id={repo_id!r}: expected 'user/name' or 'organisation/name', of letters, digits, '-', '_' and '.'."
        )


def send(
    parcel: Parcel, target: Target, *, commit_message: str | None = None, commit_description: str | None = None
) -> CommitInfo:
    """Look through a parcel and push it.

    Raises:
        UsageError: it holds something private; nothing was sent.
        HubError: the Hub refused or could not be reached.
    """
    plural = "s" if len(parcel.adapters) > 1 or parcel.adapters == [ROOT] else ""
    named = "" if parcel.adapters == [ROOT] else f" {', '.join(parcel.adapters)}"
    message = commit_message or f"Projection head{plural if named else ''}{named}"
    if not message.strip():
        raise UsageError("commit_message is empty; leave it out, or say what is new.")
    texts = {"commit_message": message, "commit_description": commit_description or ""}
    assert isinstance(target.token, str)
    check_outgoing(parcel.folder, adapters=parcel.adapters, owner=target.owner, token=target.token, texts=texts)
    return _Push(parcel, target).run(message, commit_description)


class _Push:
    """One push: what it found, what it made, and how to take that back."""

    def __init__(self, parcel: Parcel, target: Target):
        self.parcel, self.target, self.repo_id = parcel, target, target.repo_id
        self.revision = None if target.revision == "main" else target.revision
        self.api = HfApi(token=target.token, library_name="hfproj", library_version=hfproj.__version__)
        self.made_repo = self.made_branch = False
        self.before: str | None = None  # commit that the branch pointed to
        self.pulls: set[str] = set()  # pull requests that there were

    def run(self, message: str, description: str | None) -> CommitInfo:
        try:
            self._open()
            operations = self._operations()
            return patiently(
                lambda: self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision=self.revision,
                    create_pr=self.target.create_pr,
                ),
                lost=lambda: self._arrived(operations, message, description),
            )
        except BaseException as error:
            state = self._undo()
            if isinstance(error, HfprojError) or not isinstance(error, FAILURES):
                raise
            raise explain(error, f"Pushing to {self.repo_id}", self.repo_id, state) from error

    def _open(self) -> None:
        """Find the repository and the branch, or make them."""
        try:
            info = patiently(lambda: self.api.model_info(self.repo_id))
        except RepositoryNotFoundError:
            self._make()
            info = patiently(lambda: self.api.model_info(self.repo_id))
        if self.target.private and not info.private:
            raise UsageError(
                f"{self.repo_id} exists and is public, so that private=True would be without effect. Make it private "
                "in its settings, or leave private= out."
            )
        if self.revision is not None:
            info = self._branch(info.sha)
        self.before, self.there = info.sha, {sibling.rfilename for sibling in info.siblings or ()}
        if self.target.create_pr:
            self.pulls = patiently(self._pulls)

    def _make(self) -> None:
        try:
            patiently(lambda: self.api.create_repo(self.repo_id, private=self.target.private))
            self.made_repo = True
        except HfHubHTTPError as error:
            if error.response.status_code != 409:  # it exists all the same
                raise

    def _branch(self, main: str | None) -> Any:
        try:
            return patiently(lambda: self.api.model_info(self.repo_id, revision=self.revision))
        except RevisionNotFoundError:
            assert self.revision is not None
            if self.revision.startswith("refs/"):
                raise
            branch = self.revision
            patiently(lambda: self.api.create_branch(self.repo_id, branch=branch, revision=main, exist_ok=True))
            self.made_branch = True
            return patiently(lambda: self.api.model_info(self.repo_id, revision=branch))

    # --- what to do ---

    def _operations(self) -> list[Any]:
        files = {p.relative_to(self.parcel.folder).as_posix(): p for p in self.parcel.folder.rglob("*") if p.is_file()}
        others = [name for name in self.parcel.adapters if name != self.parcel.subject]
        unchanged = [name for name in others if self._is_there(name, files)]
        root_is_taken = ROOT not in self.parcel.adapters and filenames.ADAPTER_CONFIG in self.there
        sent = {name: p for name, p in files.items() if self._owner(name) not in unchanged}
        if root_is_taken:  # by another adapter, whose card it shows
            sent = {name: path for name, path in sent.items() if "/" in name}
        gone = {
            path
            for name in self.parcel.adapters
            if name not in unchanged
            for stale in _STALE
            if (path := stale if name == ROOT else f"{name}/{stale}") in self.there and path not in sent
        }
        added = [CommitOperationAdd(name, str(path)) for name, path in sorted(sent.items())]
        return [*added, *(CommitOperationDelete(path) for path in sorted(gone))]

    def _owner(self, path: str) -> str:
        folder = path.split("/")[0]
        return folder if "/" in path and folder in self.parcel.adapters else ROOT

    def _is_there(self, adapter: str, files: dict[str, Path]) -> bool:
        """Whether the repository holds the same tensors: then card and results of that adapter stay, too."""
        path = filenames.ADAPTER_WEIGHTS if adapter == ROOT else f"{adapter}/{filenames.ADAPTER_WEIGHTS}"
        return path in self.there and self._same({path: files[path]}, self.revision)

    def _same(self, files: dict[str, Path], revision: str | None) -> bool:
        found = patiently(lambda: self.api.get_paths_info(self.repo_id, list(files), revision=revision))
        kept = {info.path: info for info in found}
        return all(name in kept and _is_content(kept[name], path.read_bytes()) for name, path in files.items())

    def _pulls(self) -> set[str]:
        refs = self.api.list_repo_refs(self.repo_id, include_pull_requests=True).pull_requests
        return {pull.ref for pull in refs or ()}

    def _arrived(self, operations: list[Any], message: str, description: str | None) -> CommitInfo | None:
        """Return the commit if it was made and only the Hub's answer got lost."""
        added = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        sent = {operation.path_in_repo: Path(str(operation.path_or_fileobj)) for operation in added}
        with suppress(*FAILURES):
            pulls = sorted(self._pulls() - self.pulls) if self.target.create_pr else [None]
            for pull in pulls:
                revision = pull or self.revision
                head = self.api.model_info(self.repo_id, revision=revision)
                if head.sha not in (None, self.before) and self._same(sent, revision):
                    url = f"{self.api.endpoint}/{self.repo_id}"
                    return CommitInfo(
                        commit_url=f"{url}/commit/{head.sha}",
                        commit_message=message,
                        commit_description=description or "",
                        oid=head.sha,
                        pr_url=f"{url}/discussions/{pull.rpartition('/')[2]}" if pull else None,
                        _endpoint=self.api.endpoint,
                    )
        return None

    def _undo(self) -> str:
        """Take back what was made, and return a sentence on what there is now."""
        try:
            if self.made_repo:
                if set(self.api.list_repo_files(self.repo_id)) - {".gitattributes"}:
                    return f"{self.repo_id} is new and was left as it is."
                self.api.delete_repo(self.repo_id)
                return f"{self.repo_id} was new and empty, and is deleted again."
            if self.before is None:
                return "Nothing was sent."
            now = self.api.model_info(self.repo_id, revision=self.revision).sha
            if now != self.before:
                return f"{self.repo_id} has changed meanwhile, look at it."
            if self.made_branch:
                self.api.delete_branch(self.repo_id, branch=str(self.revision))
                return f"The branch {self.revision} was new and is deleted again; {self.repo_id} is as it was."
            return f"{self.repo_id} is as it was."
        except FAILURES:
            if self.made_repo:
                return f"{self.repo_id} was made and could not be deleted again: push again, or delete it yourself."
            if self.made_branch:
                return f"The branch {self.revision} of {self.repo_id} was made and could not be deleted again."
            return f"What {self.repo_id} is like now could not be seen."


def _is_content(info: Any, data: bytes) -> bool:
    if getattr(info, "lfs", None) is not None:
        return info.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return getattr(info, "blob_id", None) == hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
