"""What is tried again and how long that takes, one list and one backoff for pushing and pulling, and what is said."""

import json

import pytest
from huggingface_hub import errors

from hfproj.hub import failures
from hfproj.hub.failures import FAILURES, LONGEST_WAIT, TRANSIENT, WAITS, explain, is_transient, retry
from hfproj.hub.sources import TRIES


@pytest.fixture
def waits(monkeypatch):
    found = []
    monkeypatch.setattr(failures.time, "sleep", found.append)
    return found


class Response:
    """The parts of an answer that are looked at."""

    def __init__(self, status, url="https://hub/api/models/me/x", text="", **headers):
        self.status_code, self.text, self.headers = status, text, headers
        self.request = type("Request", (), {"url": url, "method": "GET"})()


def answer(status, kind=errors.HfHubHTTPError, **response):
    return kind(f"{status}", response=Response(status, **response))


def failing(*errors_):
    """A call that fails so, one after the other, and then returns how often it was called."""
    calls = []

    def call():
        calls.append(1)
        if len(calls) <= len(errors_):
            raise errors_[len(calls) - 1]
        return len(calls)

    return call


@pytest.mark.parametrize(
    "error", [*map(answer, TRANSIENT), ConnectionError("cut"), TimeoutError(), errors.HTTPError("cut")]
)
def test_what_may_pass_is_tried_again(waits, error):
    assert is_transient(error)
    assert retry(failing(error, error)) == 3
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize("error", [
    *map(answer, (400, 401, 403, 404, 409, 412, 413, 501)), ValueError("a"), OSError(28, "No space left on device"),
    errors.OfflineModeIsEnabled("offline"), errors.LocalEntryNotFoundError("not in the cache"),
    answer(503, url="https://hub/me/x.git/info/lfs/objects/batch"), answer(500, url="https://hub/api/x/preupload/main"),
])  # fmt: skip
def test_what_will_not_pass_is_not(waits, error):
    with pytest.raises(type(error)) as caught:
        retry(failing(error))
    assert caught.value is error
    assert waits == []


def test_it_is_given_up_after_all_waits(waits):
    with pytest.raises(errors.HfHubHTTPError):
        retry(failing(*[answer(503)] * 9))
    assert tuple(waits) == WAITS
    waits.clear()
    with pytest.raises(errors.HfHubHTTPError):
        retry(failing(*[answer(503)] * 9), tries=TRIES)
    assert tuple(waits) == WAITS[: TRIES - 1]


def test_as_long_as_the_hub_asks_for_but_no_longer_than_anybody_would_sit(waits):
    assert retry(failing(answer(429, **{"Retry-After": "7"}))) == 2
    assert waits == [7.0]
    with pytest.raises(errors.HfHubHTTPError):
        retry(failing(answer(429, **{"Retry-After": str(int(LONGEST_WAIT) + 1)})))
    assert waits == [7.0]
    assert retry(failing(answer(429, **{"Retry-After": "soon"}))) == 2


def test_an_answer_that_got_lost_is_not_asked_for_again(waits):
    assert retry(failing(ConnectionError()), lost=lambda: 10) == 10
    assert retry(failing(answer(500)), lost=lambda: None) == 2
    assert waits == [1.0]


def test_the_failure_behind_huggingface_hubs_own_counts(waits):
    for kind in (errors.LocalEntryNotFoundError, RuntimeError):
        for cause, calls in ((answer(503), 2), (answer(403), None)):
            error = kind("wrapped")
            error.__cause__ = cause
            if calls:
                assert retry(failing(error)) == calls
            else:
                with pytest.raises(kind):
                    retry(failing(error))


@pytest.mark.parametrize(("error", "said"), [
    (answer(401), "does not accept the access token (401); it may be mistyped"),
    (answer(403), "does not have the right to do this (403); use one that may read me/x"),
    (answer(404), "or the access token may not see it (404); check the name"),
    (answer(401, errors.RepositoryNotFoundError), "or the access token may not see it (404); check the name"),
    (answer(403, errors.GatedRepoError), "me/x is gated: ask for access at"),
    (answer(404, errors.RevisionNotFoundError), "me/x has no such revision (404); name a branch, a tag"),
    (answer(409), "somebody else is changing me/x at the same time (409); try again"),
    (answer(413), "the upload is too large for the Hub (413); push fewer"),
    (answer(429, **{"Retry-After": "90"}), "asked too often (429); try again in 90 seconds"),
    (answer(429), "asked too often (429); try again in a few minutes"),
    (answer(502), "the Hub has a problem of its own (502); try again later"),
    (answer(418, text="I am\na teapot."), "the Hub answered: I am a teapot (418)"),
    (TimeoutError("no answer"), "did not answer in time; check the connection"),
    (ConnectionError("reset\nby peer"), "the connection broke (reset); check it"),
    (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
    (json.JSONDecodeError("Expecting value", "<html>", 0), "does not answer as a Hub does (Expecting value"),
    (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    (ValueError("Both a and b."), "Both a and b"),
])  # fmt: skip
def test_what_is_said(error, said):
    assert isinstance(error, FAILURES)
    reason = explain(error, "me/x")
    assert said in reason
    assert "\n" not in reason
    assert not reason.endswith(".")
