"""The loopback Hub told to fail, as the real client sees it, and the process that the client runs in."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from client import CLIENT, ROOT, Client, RemoteError
from loopback import Hub

WEIGHTS = bytes(range(256)) * 100
COMMIT = "/api/models/me/x/commit/main"
PUT = {"method": "PUT", "path": "/storage/"}


newer_client = pytest.mark.skipif(CLIENT < (1, 21), reason="older clients do not retry by themselves what was cut")


@pytest.fixture
def push(hub, client, tmp_path):
    """Push a small and a large file to me/x; returns the commit's name."""
    hub.create("me/x")
    (tmp_path / "small.txt").write_text("small")
    (tmp_path / "large.bin").write_bytes(WEIGHTS)
    return lambda: client("scripts_loopback:upload", repo_id="me/x", folder=str(tmp_path))["oid"]


@pytest.fixture
def pull(hub, client):
    """Download large.bin of me/x."""
    hub.create("me/x")
    hub.put("me/x", {"large.bin": WEIGHTS, "small.txt": b"small"})

    def pull(filename="large.bin"):
        return client("scripts_loopback:download", repo_id="me/x", filename=filename).encode("latin-1")

    return pull


def left_in_cache(client):
    """Files of the client's cache that could be loaded, or that a download has left behind."""
    found = [p for p in client.cache.rglob("*") if {"blobs", "snapshots"} & set(p.parts) and p.is_file()]
    return [p.name for p in found]


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 413, 429, 500, 503])
def test_a_refused_commit_changes_nothing(hub, push, status):
    before = hub.state()
    fault = hub.fail("POST", COMMIT, status)
    with pytest.raises(RemoteError, match=str(status)) as error:
        push()
    assert error.value.type == ("RepositoryNotFoundError" if status == 404 else "HfHubHTTPError")
    assert hub.state() == before
    assert fault.hits == 1
    sha = push()
    assert hub.commits("me/x")[0].sha == sha


@newer_client
@pytest.mark.parametrize(("status", "wait"), [(429, 8), (500, 1), (502, 1), (503, 1)])
def test_what_the_client_tries_again(hub, client, push, status, wait):
    headers = {"Retry-After": "7"} if status == 429 else {}
    for method, path in (("POST", "/preupload/"), ("POST", "/objects/batch"), ("PUT", "/storage/")):
        hub.fail(method, path, status, headers=headers)
    push()
    assert client.waits == [wait] * 3
    assert hub.files("me/x")["large.bin"] == WEIGHTS


@newer_client
def test_an_upload_cut_half_way_is_sent_again(hub, client, push):
    fault = hub.fail(**PUT, what="cut", times=2)
    push()
    assert fault.hits == 2
    assert client.waits == [1, 2]
    assert [r.size for r in hub.requests if r.method == "PUT"] == [len(WEIGHTS) // 2] * 2 + [len(WEIGHTS)]
    assert hub.files("me/x")["large.bin"] == WEIGHTS


@newer_client
def test_an_upload_that_is_always_cut_changes_nothing(hub, client, push):
    before = hub.state()
    fault = hub.fail(**PUT, what="cut", times=None, after_bytes=100)
    with pytest.raises(RemoteError, match="Error while uploading 'large"):
        push()
    assert (fault.hits, client.waits) == (6, [1, 2, 4, 8, 8])
    assert hub.state() == before


def test_a_commit_cut_or_unanswered(hub, push):
    before = hub.state()
    hub.fail("POST", COMMIT, "cut")
    with pytest.raises(RemoteError, match=r"ReadError|WriteError|RemoteProtocolError"):
        push()
    assert hub.state() == before
    hub.fail("POST", COMMIT, "lost")
    with pytest.raises(RemoteError, match=r"ReadError|RemoteProtocolError"):
        push()
    assert hub.files("me/x")["small.txt"] == b"small"  # the client cannot know that it was done
    assert push() == hub.commits("me/x")[0].sha
    assert len(hub.commits("me/x")) == 2


@newer_client
@pytest.mark.parametrize(("name", "path"), [("large.bin", "/storage/"), ("small.txt", "/resolve/")])
def test_a_download_cut_half_way_is_tried_again(hub, client, pull, name, path):
    hub.fail("GET", path, "cut")
    assert pull(name) == hub.files("me/x")[name]
    assert client.waits == [1]


@newer_client
def test_a_long_download_goes_on_where_it_was_cut(hub, client):
    hub.create("me/x")
    data = WEIGHTS * 450
    hub.put("me/x", {"large.bin": data})
    hub.fail("GET", "/storage/", "cut", after_bytes=len(data) - 5)
    found = client("scripts_loopback:digest", repo_id="me/x", filename="large.bin")
    assert found == hashlib.sha256(data).hexdigest()
    assert hub.requests[-1].headers["Range"] == f"bytes={10 << 20}-"  # the client writes in steps of 10 MB


@newer_client
def test_a_download_that_is_always_cut_leaves_nothing(hub, client, pull):
    fault = hub.fail("GET", "/storage/", "cut", times=None, after_bytes=0)
    with pytest.raises(RemoteError, match="RemoteProtocolError"):
        pull()
    assert fault.hits == 6
    assert left_in_cache(client) == []


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_refused_download(hub, client, pull, status):
    hub.fail("HEAD", "/resolve/", status, times=None)
    with pytest.raises(RemoteError) as error:
        pull()
    expected = {401: "HfHubHTTPError", 404: "RepositoryNotFoundError"}
    assert error.value.type == expected.get(status, "LocalEntryNotFoundError")
    assert left_in_cache(client) == []


def test_late_answers(hub, client, pull):
    hub.fail("HEAD", "/resolve/", "slow")  # later than the client waits at first
    hub.fail("GET", "/storage/", "slow", seconds=0.3)
    start = time.monotonic()
    assert pull() == WEIGHTS
    assert time.monotonic() - start > 2
    assert sum(r.method == "HEAD" for r in hub.requests) == 2


def test_faults_are_told_apart(hub, client, pull):
    with pytest.raises(ValueError, match="'slow', 'cut' or 'lost'"):
        hub.fail("GET", "/", "broken")
    fault = hub.fail("GET|HEAD", "large", 404, headers={"X-Error-Code": "EntryNotFound"})
    assert pull("small.txt") == b"small"
    assert fault.hits == 0
    with pytest.raises(RemoteError, match="RemoteEntryNotFoundError"):
        pull()
    assert pull() == WEIGHTS


# The client's process


def test_errors_come_across(client):
    with pytest.raises(RemoteError) as error:
        client("scripts_loopback:fail", message="gone")
    assert (error.value.type, error.value.message) == ("LookupError", "gone")
    assert "in fail" in error.value.traceback
    with pytest.raises(RemoteError, match="AttributeError"):
        client("scripts_loopback:nothing")


@pytest.mark.parametrize("host", ["192.0.2.1", "huggingface.co"])
def test_no_other_machine_is_reached(client, host):
    with pytest.raises(RemoteError, match="PermissionError: A test tried to"):
        client("scripts_loopback:reach", host=host)


def test_the_cache_is_fresh(hub, client, pull):
    assert list(client.cache.rglob("large.bin")) == []
    pull()
    assert len(list(client.cache.rglob("large.bin"))) == 1
    client.clear_cache()
    assert list(client.cache.rglob("large.bin")) == []


def test_a_process_that_hangs_or_ends(hub, tmp_path):
    with Client(hub, tmp_path, preload=False) as other:
        first = other("scripts_loopback:pid")
        with pytest.raises(RemoteError) as error:
            other("scripts_loopback:leave")
        assert error.value.type == "ProcessDied"
        second = other("scripts_loopback:pid")
        other.timeout = 0.3
        with pytest.raises(RemoteError) as error:
            other("scripts_loopback:hang")
        assert error.value.type == "TimeoutError"
        assert first != second
        assert not alive(first)
        assert not alive(second)


def test_offline(hub, pull, tmp_path):
    with Client(hub, tmp_path, preload=False, HF_HUB_OFFLINE="1") as other:
        hub.requests.clear()
        with pytest.raises(RemoteError, match="offline mode is enabled") as error:
            other("scripts_loopback:download", repo_id="me/x", filename="large.bin")
        assert error.value.type == "LocalEntryNotFoundError"
        assert hub.requests == []


def test_the_process_ends_with_the_one_that_started_it(tmp_path):
    code = f"""
import sys, time; sys.path.insert(0, {str(ROOT / "tests" / "hub")!r})
from client import Client; from loopback import Hub
client = Client(Hub({str(tmp_path / "hub")!r}).start(), {str(tmp_path)!r}, preload=False)
print(client("scripts_loopback:pid"), flush=True); time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")  # of a process that ended, but that nobody waited for
    return not status.exists() or "\tZ" not in status.read_text()


# By hand


def test_by_hand(tmp_path):
    command = [sys.executable, "-m", "tests.hub.loopback", "--port", "0", "--folder", str(tmp_path), "--token", "hf_a"]
    Hub(tmp_path).create("me/kept")
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with server:
        exported = {}
        for line in server.stdout:
            if line.startswith("export "):
                name, _, value = line.removeprefix("export ").strip().partition("=")
                exported[name] = value
            elif exported:
                break
        code = "from huggingface_hub import HfApi as A; print(A().whoami()['name'], A().repo_info('me/kept').sha)"
        environment = {"PATH": os.environ["PATH"], **exported}
        run = [sys.executable, "-c", code]
        output = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.split()
        server.terminate()
        assert server.wait(timeout=20) == 0
    assert output == ["me", Hub(tmp_path).commits("me/kept")[0].sha]
    assert not Path(exported["HF_HOME"]).exists()
