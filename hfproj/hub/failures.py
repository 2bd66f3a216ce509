"""Requests to the Hub: what may pass is tried again, and what does not becomes one clause on what to do.

Pushing and pulling share the list of transient statuses, the waits between tries and the explanations. A pull tries
less often than a push, because the cache may serve in its place.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from huggingface_hub import constants, errors

from hfproj.errors import one_line

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # statuses that the same request may not get again
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between two tries, at least
LONGEST_WAIT = 60.0  # a server that asks for more gets no further try: the user is told instead
# Of huggingface_hub and what it uses:
FAILURES = (errors.HTTPError, OSError, ValueError, RuntimeError, errors.XetDownloadError)
_RETRIED = ("/preupload/", "/info/lfs/", "/lfs-complete/")  # huggingface_hub itself tries these again
T = TypeVar("T")


def retry(call: Callable[[], T], *, tries: int = 1 + len(WAITS), lost: Callable[[], T | None] = lambda: None) -> T:
    """Return what `call` returns, which is called again after a failure that may pass.

    Args:
        call: A request that huggingface_hub sends only once.
        tries: How often it is called at most.
        lost: Asked after such a failure; what it returns, if anything, is the answer that got lost on its way.
    """
    for wait in (*WAITS[: tries - 1], None):
        try:
            return call()
        except FAILURES as error:
            asked = _asked_wait(origin(error))
            if asked is None:
                raise
            if (found := lost()) is not None:
                return found
            if wait is None:
                raise
        time.sleep(max(wait, asked))
    raise AssertionError("the last try returns or raises")


def _asked_wait(error: BaseException) -> float | None:
    """Return the seconds that the Hub asks to wait before another try, or None where none will help."""
    if not is_transient(error) or isinstance(error, errors.OfflineModeIsEnabled):
        return None
    with suppress(AttributeError, RuntimeError):  # httpx raises the latter where it does not know the request
        asked: Any = error if _response(error) is None else _response(error)
        if any(part in str(asked.request.url) for part in _RETRIED):
            return None
    wait = _retry_after(error)
    return wait if wait <= LONGEST_WAIT else None


def is_transient(error: BaseException) -> bool:
    """Return whether the Hub could not be reached or could not serve, which may be otherwise the next time."""
    if (response := _response(error)) is not None:
        return response.status_code in TRANSIENT
    if isinstance(error, ValueError | KeyError | TypeError | errors.EntryNotFoundError):
        return False
    disk = isinstance(error, OSError) and error.errno is not None
    return not disk or isinstance(error, ConnectionError | errors.HTTPError)


def origin(error: BaseException) -> BaseException:
    """Return the failure behind huggingface_hub's "not in the cache" and "error while uploading"."""
    wraps = isinstance(error, errors.LocalEntryNotFoundError | RuntimeError)
    return error.__cause__ if wraps and error.__cause__ else error


def _response(error: BaseException) -> Any:
    return getattr(error, "response", None)


def _retry_after(error: BaseException) -> float:
    response = _response(error)
    value = response.headers.get("Retry-After", "").strip() if response is not None else ""
    return float(value) if value.isdigit() else 0.0


def explain(error: BaseException, repo_id: str) -> str:
    """Return one clause, without a full stop, on why the Hub did not do what was asked of `repo_id` and what helps."""
    chain, hub, owner = list(_chain(error)), constants.ENDPOINT, repo_id.split("/")[0]
    if type(error) is ValueError:  # of huggingface_hub itself, about what it was given
        return one_line(error, 300)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: ask for access at {hub}/{repo_id}, then pass token=… or run `hf auth login`"
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return f"{repo_id} has no such revision (404); name a branch, a tag, a whole commit or refs/pr/<number>"
    response = next((r for e in chain if (r := _response(e)) is not None), None)
    if response is None:
        if any("Timeout" in type(e).__name__ for e in chain):
            return f"{hub} can't be reached: it did not answer in time; check the connection and try again"
        if any(isinstance(e, errors.HTTPError | ConnectionError) for e in chain):
            return f"{hub} can't be reached: the connection broke ({one_line(error)}); check it and try again"
        if isinstance(error, KeyError | TypeError | json.JSONDecodeError):
            return f"{hub} does not answer as a Hub does ({one_line(error)}); check HF_ENDPOINT"
        return one_line(error, 300)
    status = response.status_code
    if isinstance(error, errors.RepositoryNotFoundError) and status == 401:
        status = 404  # the Hub's answer for what a caller without a token may not see
    wait = _retry_after(error)
    words = {
        401: "the Hub does not accept the access token; it may be mistyped, expired or revoked: check token=… and "
        "HF_TOKEN, or run `hf auth login`",
        403: f"the access token does not have the right to do this; use one that may read {repo_id}, to push one with "
        f"the right to write to {owner}, or propose the change by create_pr=True",
        404: f"there is no {repo_id} at {hub}, or the access token may not see it; check the name, and for a private "
        "repository pass token=…, set HF_TOKEN or run `hf auth login`",
        **dict.fromkeys((409, 412), f"somebody else is changing {repo_id} at the same time; try again"),
        413: "the upload is too large for the Hub; push fewer adapters at once, or without objective= and ema=",
        429: f"the Hub was asked too often; try again in {f'{wait:.0f} seconds' if wait else 'a few minutes'}",
    }.get(status)
    if words is None and status >= 500:
        words = "the Hub has a problem of its own; try again later (https://status.huggingface.co)"
    said = response.headers.get("X-Error-Message") or response.text[:200]
    reason, _, todo = (words or f"the Hub answered: {' '.join(said.split()).rstrip('.')}").partition("; ")
    return f"{reason} ({status})" + (f"; {todo}" if todo else "")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
