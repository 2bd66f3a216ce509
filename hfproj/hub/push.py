"""Pushing adapters to the Hub: one folder, validated before anything is sent, in one commit.

The commit is made by ``HfApi.create_commit``: ``upload_folder`` may split a folder over several commits, and opens a
pull request before it knows that its files arrive.
"""

import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo
from torch import nn

import hfproj
from hfproj import filenames
from hfproj.checking import checked
from hfproj.errors import HfprojError, HubError, UsageError
from hfproj.hub.failures import FAILURES, explain, retry
from hfproj.hub.sources import is_repo_id
from hfproj.hub.staging import ROOT, SavesItself, Staged, check_outgoing, folder_of, stage
from hfproj.redaction import remember
from hfproj.results import Results

# What an earlier push may have left beside an adapter, and what would be wrong beside the new one.
_STALE = (
    filenames.RESULTS, filenames.PICTURE, filenames.TRAINING_PICTURE, filenames.PREPROCESSING, filenames.OBJECTIVE,
    filenames.EMA,
)  # fmt: skip


@checked
def push_to_hub(
    model: nn.Module, repo_id: str, *, results: Results | None = None, adapters: Sequence[str] | None = None,
    objective: nn.Module | None = None, ema: SavesItself | None = None, commit_message: str | None = None,
    commit_description: str | None = None, private: bool | None = None, token: str | bool | None = None,
    revision: str | None = None, create_pr: bool = False, eval_results: bool = False, license: str | None = None,
) -> CommitInfo:  # fmt: skip
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
        ema: The EMA teacher that goes along (``trainer.ema``).
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
        UsageError: If something about the model, the target or the contents can't be pushed; nothing was sent.
        HubError: If the Hub refused or could not be reached; it says what the repository is like now.
    """
    target = Target(repo_id, token=token, revision=revision, create_pr=create_pr, private=private)
    with tempfile.TemporaryDirectory(prefix="hfproj-") as folder:
        staged = stage(
            model, Path(folder), repo_id, results=results, adapters=adapters, objective=objective, ema=ema,
            license=license, eval_results=eval_results,
        )  # fmt: skip
        return send(staged, target, commit_message=commit_message, commit_description=commit_description)


@dataclass
class Target:
    """Where a push goes; arguments and errors are those of `push_to_hub`."""

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
            raise UsageError(f"create_pr=True opens a pull request against main; drop revision={self.revision!r}.")
        remember(self.token)
        self.token = usable_token(self.token)


def usable_token(token: str | bool | None) -> str:
    """Return the token to write with; without one, or offline, a `UsageError` says what to do."""
    if constants.is_offline_mode():
        raise UsageError("HF_HUB_OFFLINE=1 keeps this process from reaching the Hub; unset it to push.")
    found = token if isinstance(token, str) else None if token is False else get_token()
    if not found:
        what = "There is no access token: log in with `hf auth login`, set HF_TOKEN, or pass token=…"
        raise UsageError(f"{what}; it needs the right to write (https://huggingface.co/settings/tokens).")
    return found


def check_repo_id(repo_id: Any) -> None:
    """Refuse what is no ``owner/name``, by a `UsageError`."""
    if not isinstance(repo_id, str) or repo_id.count("/") != 1 or not is_repo_id(repo_id):
        raise UsageError(f"Expected repo_id to be 'user/name', of letters, digits, '-', '_' and '.', got {repo_id!r}.")


def send(
    staged: Staged, target: Target, *, commit_message: str | None = None, commit_description: str | None = None
) -> CommitInfo:
    """Validate a staged folder and push it; errors are those of `push_to_hub`."""
    named = "" if staged.adapters == [ROOT] else f" {', '.join(staged.adapters)}"
    message = commit_message or f"Projection head{'s' if len(staged.adapters) > 1 else ''}{named}"
    if not message.strip():
        raise UsageError("commit_message is empty; leave it out, or say what is new.")
    texts = {"commit_message": message, "commit_description": commit_description or ""}
    assert isinstance(target.token, str)
    owner = target.repo_id.split("/")[0]
    check_outgoing(staged.folder, adapters=staged.adapters, owner=owner, token=target.token, texts=texts)
    return _Push(staged, target).run(message, commit_description)


class _Push:
    """One push: what it found, what it made, and how to take that back."""

    def __init__(self, staged: Staged, target: Target):
        self.staged, self.target, self.repo_id = staged, target, target.repo_id
        self.revision = None if target.revision == "main" else target.revision
        self.api = HfApi(token=target.token, library_name="hfproj", library_version=hfproj.__version__)
        self.made_repo: bool | None = False  # None: the Hub was asked to and did not answer
        self.made_branch: bool | None = False
        self.before: str | None = None  # commit that the branch pointed to
        self.pulls: set[str] | None = None  # pull requests that there were, where one is to be opened

    def run(self, message: str, description: str | None) -> CommitInfo:
        try:
            self._open()
            operations = self._operations()
            return retry(
                lambda: self.api.create_commit(
                    self.repo_id, operations, commit_message=message, commit_description=description,
                    revision=self.revision, create_pr=self.target.create_pr,
                ),
                lost=lambda: self._arrived(operations, message, description),
            )  # fmt: skip
        except BaseException as error:
            state = self._undo()
            if isinstance(error, HfprojError) or not isinstance(error, FAILURES):
                raise
            raise HubError(f"Pushing to {self.repo_id} failed: {explain(error, self.repo_id)}. {state}") from error

    def _open(self) -> None:
        """Find the repository and the branch, or make them."""
        try:
            info = self._info()
        except RepositoryNotFoundError:
            self._make("made_repo", lambda: self.api.create_repo(self.repo_id, private=self.target.private))
            info = self._info()
        if self.target.private and not info.private:
            raise UsageError(f"private=True, but {self.repo_id} exists and is public; change that in its settings.")
        if self.revision is not None:
            info = self._branch(self.revision, info.sha)
        self.before, self.there = info.sha, {sibling.rfilename for sibling in info.siblings or ()}
        if self.target.create_pr:
            self.pulls = retry(self._pulls)

    def _make(self, made: str, call: Callable[[], Any]) -> None:
        """Make the repository or the branch, and note so in `made`: an attribute."""

        def unanswered() -> None:
            setattr(self, made, None)

        try:
            retry(call, lost=unanswered)
            setattr(self, made, True)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:  # it exists all the same: by a try without an answer, or by others
                raise

    def _info(self, revision: str | None = None) -> ModelInfo:
        return retry(lambda: self.api.model_info(self.repo_id, revision=revision))

    def _branch(self, name: str, main: str | None) -> ModelInfo:
        try:
            return self._info(name)
        except RevisionNotFoundError:
            if name.startswith("refs/"):
                raise
            self.before = main
            self._make("made_branch", lambda: self.api.create_branch(self.repo_id, branch=name, revision=main))
            return self._info(name)

    def _operations(self) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Return what to add and to delete; an adapter whose tensors are there already keeps its card and results."""
        folder, adapters = self.staged.folder, self.staged.adapters
        sent = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        weights = {name: folder_of(Path(), name).joinpath(filenames.ADAPTER_WEIGHTS).as_posix() for name in adapters}
        unchanged = {
            name
            for name, path in weights.items()
            if name != self.staged.subject and path in self.there and self._same({path: sent[path]}, self.revision)
        }

        def owner(path: str) -> str:
            first = path.split("/")[0]
            return first if "/" in path and first in adapters else ROOT

        sent = {path: file for path, file in sent.items() if owner(path) not in unchanged}
        if ROOT not in adapters and filenames.ADAPTER_CONFIG in self.there:  # of another adapter, whose card it shows
            sent = {path: file for path, file in sent.items() if "/" in path}
        places = [folder_of(Path(), name) for name in adapters if name not in unchanged]
        gone = {(place / stale).as_posix() for place in places for stale in _STALE} & self.there - set(sent)
        added = [CommitOperationAdd(path, str(file)) for path, file in sorted(sent.items())]
        return [*added, *(CommitOperationDelete(path) for path in sorted(gone))]

    def _same(self, files: dict[str, Path], revision: str | None) -> bool:
        found = retry(lambda: self.api.get_paths_info(self.repo_id, list(files), revision=revision))
        kept = {info.path: info for info in found}
        return all(name in kept and _is_content(kept[name], path.read_bytes()) for name, path in files.items())

    def _pulls(self) -> set[str]:
        refs = self.api.list_repo_refs(self.repo_id, include_pull_requests=True).pull_requests
        return {pull.ref for pull in refs or ()}

    def _arrived(self, operations: list[Any], message: str, description: str | None) -> CommitInfo | None:
        """Return the commit if it was made and only the Hub's answer got lost.

        Whether a pull request was opened has to be known, as another try would open another one: failing to see it is
        the error of the push. A commit that is made again has the same contents.
        """
        added = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        sent = {operation.path_in_repo: Path(str(operation.path_or_fileobj)) for operation in added}
        with suppress(*(() if self.target.create_pr else FAILURES)):
            pulls = sorted(retry(self._pulls) - (self.pulls or set())) if self.target.create_pr else [None]
            for pull in pulls:
                revision = pull or self.revision
                head = self._info(revision) if pull else self.api.model_info(self.repo_id, revision=revision)
                if head.sha not in (None, self.before) and self._same(sent, revision):
                    url = f"{self.api.endpoint}/{self.repo_id}"
                    discussion = f"{url}/discussions/{pull.rpartition('/')[2]}" if pull else None
                    return CommitInfo(
                        commit_url=f"{url}/commit/{head.sha}", commit_message=message, oid=head.sha, pr_url=discussion,
                        commit_description=description or "", _endpoint=self.api.endpoint,
                    )  # fmt: skip
        return None

    def _undo(self) -> str:
        """Take back what was made, and return a sentence on what there is now."""
        branch = f"branch {self.revision} of {self.repo_id}"
        try:
            if self.made_repo is not False:
                return self._undo_repo()
            return "Nothing was sent." if self.before is None else self._undo_branch()
        except FAILURES:
            if self.made_repo is None:
                return f"Whether {self.repo_id} was made could not be seen: push again, or delete it yourself."
            if self.made_repo:
                return f"{self.repo_id} was made and could not be deleted again: push again, or delete it yourself."
            if self.made_branch is None:
                return f"Whether the {branch} was made could not be seen: push again, or delete it yourself."
            if self.made_branch:
                return f"The {branch} was made and could not be deleted again."
            return f"What {self.repo_id} is like now could not be seen."

    def _undo_repo(self) -> str:
        try:
            files = self.api.list_repo_files(self.repo_id)
        except RepositoryNotFoundError:
            if self.made_repo:
                raise
            return "Nothing was sent."
        if set(files) - {".gitattributes"}:
            return f"{self.repo_id} is new and was left as it is."
        self.api.delete_repo(self.repo_id)
        return f"{self.repo_id} was new and empty, and is deleted again."

    def _undo_branch(self) -> str:
        try:
            head = self.api.model_info(self.repo_id, revision=self.revision).sha
        except RevisionNotFoundError:
            if self.made_branch:
                raise
            return "Nothing was sent."
        if head != self.before:
            return f"{self.repo_id} has changed meanwhile, look at it."
        if self.pulls is not None and self._pulls() != self.pulls:
            return f"{self.repo_id} has another pull request than before, look at it."
        if self.made_branch is not False:
            self.api.delete_branch(self.repo_id, branch=str(self.revision))
            return f"The branch {self.revision} was new and is deleted again; {self.repo_id} is as it was."
        return f"{self.repo_id} is as it was."


def _is_content(info: Any, data: bytes) -> bool:
    if getattr(info, "lfs", None) is not None:
        return info.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return getattr(info, "blob_id", None) == hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
