"""Talking to the Hub while pushing: patience with what passes, one clear error for what does not."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RevisionNotFoundError

from hfproj.errors import HubError, UsageError

FAILURES = (HTTPError, OSError, ValueError, RuntimeError)  # of huggingface_hub, its HTTP client and hf_xet
_PASSING = (408, 429, 500, 502, 503, 504)
_TRIES = 5
_LONGEST = 60.0  # seconds that are waited because the Hub asks for it
_PATIENT = ("/preupload/", "/info/lfs/", "/lfs-complete/")  # huggingface_hub itself tries these again
T = TypeVar("T")


def usable_token(token: str | bool | None) -> str:
    """Return the token to write with.

    Raises:
        UsageError: there is none, or the process is offline.
    """
    if constants.is_offline_mode():
        raise UsageError("HF_HUB_OFFLINE=1 keeps this process from reaching the Hub; unset it to push.")
    found = token if isinstance(token, str) else None if token is False else get_token()
    if not found:
        raise UsageError(
            "There is no access token: log in with `hf auth login`, set HF_TOKEN, or pass token=…; it needs the right "
            "to write (https://huggingface.co/settings/tokens)."
        )
    return found


def patiently(call: Callable[[], T], *, lost: Callable[[], T | None] = lambda: None) -> T:
    """Return what `call` returns, which is tried again after a failure that may pass.

    Args:
        call: A request that huggingface_hub sends only once.
        lost: Asked after such a failure; what it returns, if anything, is the answer that got lost on its way.
    """
    for attempt in range(_TRIES):
        try:
            return call()
        except HTTPError as error:
            wait = _pause(error)
            if wait is None:
                raise
            found = lost()
            if found is not None:
                return found
            if attempt + 1 == _TRIES:
                raise
        time.sleep(max(wait, 2.0**attempt))
    raise AssertionError("the last try returns or raises")


def _pause(error: HTTPError) -> float | None:
    """Return the seconds to wait before another try, or None where there is no use in one."""
    if any(part in _url(error) for part in _PATIENT):
        return None
    if not isinstance(error, HfHubHTTPError):
        return 0.0  # the connection broke, or took too long
    if error.response.status_code not in _PASSING:
        return None
    value = error.response.headers.get("Retry-After", "")
    wait = float(value) if value.isdigit() else 0.0
    return wait if wait <= _LONGEST else None


def _url(error: HTTPError) -> str:
    with suppress(AttributeError, RuntimeError):  # httpx raises the latter where it does not know the request
        return str((error.response if isinstance(error, HfHubHTTPError) else error).request.url)
    return ""


def explain(error: BaseException, what: str, repo_id: str, state: str) -> HubError:
    """Return the error for a failure of the Hub or of the way to it.

    Args:
        error: What huggingface_hub raised.
        what: What was tried, as in "Pushing to me/heads".
        repo_id: The repository.
        state: A sentence on what the failure left behind.
    """
    response = next((r for e in _chain(error) if (r := getattr(e, "response", None)) is not None), None)
    if type(error) is ValueError:  # of huggingface_hub itself, about what it was given or told
        reason = _one_line(error)
    elif response is not None:
        missing = any(isinstance(e, RevisionNotFoundError) for e in _chain(error))
        reason = _status(response, repo_id, missing)
    elif any("Timeout" in type(e).__name__ for e in _chain(error)):
        reason = "the Hub did not answer in time; look at the connection and try again"
    elif any(isinstance(e, HTTPError | ConnectionError) for e in _chain(error)):
        reason = f"the connection to {constants.ENDPOINT} broke ({_one_line(error)}); look at it and try again"
    else:
        reason = _one_line(error)
    return HubError(f"{what} failed: {reason}. {state}".rstrip())


def _status(response: Any, repo_id: str, missing_revision: bool) -> str:
    status, owner = response.status_code, repo_id.split("/")[0]
    if missing_revision:
        return f"{repo_id} has no such revision (404); name a branch"
    if status == 401:
        return "the Hub does not know this access token (401): it is mistyped, expired or revoked; log in again"
    if status == 403:
        return (
            f"the access token may not do this (403); use one with the right to write to {owner}, or create_pr=True to "
            "propose it to a repository of others"
        )
    if status == 404:
        return f"there is no {repo_id}, or the access token may not see it (404); check the name"
    if status in (409, 412):
        return f"somebody else is changing {repo_id} at the same time ({status}); try again"
    if status == 413:
        return "the upload is too large for the Hub (413); push fewer adapters at once, or without objective= and ema="
    if status == 429:
        wait = response.headers.get("Retry-After", "")
        return f"the Hub was asked too often (429); try again in {wait + ' s' if wait.isdigit() else 'a few minutes'}"
    if status >= 500:
        return f"the Hub has a problem of its own ({status}); try again later (https://status.huggingface.co)"
    message = response.headers.get("X-Error-Message") or response.text[:200]
    return f"the Hub answered {status}: {' '.join(message.split()).rstrip('.')}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) < 300 else f"{text[:299]}…").rstrip(".") or type(error).__name__
