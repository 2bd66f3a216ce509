"""`push_to_hub` against the loopback Hub: one commit, nothing private, and a failure leaves the Hub as it was."""

import base64
import json
import os
import re
from pathlib import Path

import pytest
from client import RemoteError
from huggingface_hub import ModelCard
from safetensors.torch import load
from thinned import thinned

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
MEASURED = {"results.json", "spectrum.png"}


@pytest.fixture
def push(client):
    def call(repo_id="me/heads", **options):
        return client("scripts_push:push", repo_id=repo_id, **options)

    return call


def refused(call, type, *said):
    """The error of a call in the client's process, which is one line."""
    with pytest.raises(RemoteError) as caught:
        call()
    error = caught.value
    assert error.type == type, f"{error.type}: {error.message}\n{error.traceback}"
    assert "\n" not in error.message
    for part in said:
        assert part in error.message, error.message
    return error.message


def sent(hub):
    """Everything that reached the server: bodies, with the files inside commits decoded."""
    found = []
    for body in hub.bodies:
        found.append(body)
        for content in re.findall(rb'"content": ?"([A-Za-z0-9+/=]+)"', body):
            found.append(base64.b64decode(content))
    return found


def test_one_commit_with_everything(hub, push):
    back = push(measured=0.75, state=True, commit_message="A head", commit_description="Why\n\nand how", license="mit")
    files = hub.files("me/heads")
    assert set(files) == ADAPTER | MEASURED | {".gitattributes", "objective.safetensors", "ema.safetensors"}
    commit, first = hub.commits("me/heads")
    assert (commit.sha, commit.title, commit.author) == (back["oid"], "A head", "me")
    assert commit.description == "Why\n\nand how"
    assert first.title == "initial commit"
    assert back["url"] == f"{hub.url}/me/heads/commit/{commit.sha}"

    assert {"adapter_model.safetensors": files["adapter_model.safetensors"].hex()} == back["saved"]
    assert load(files["objective.safetensors"])["queue"].unique().tolist() == [1.0]
    assert load(files["ema.safetensors"])["average"].unique().tolist() == [2.0]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.license, card.data.model_name) == ("peft", "mit", "heads")
    assert "import hfproj" in card.text
    assert "75.0" in card.text or "0.75" in card.text
    assert json.loads(files["results.json"])["measurements"][0]["value"] == 0.75


def test_nothing_private_is_sent(hub, push):
    push(measured=0.75, state=True)
    names = {os.environ.get("USER", ""), Path.home().name} - {"", "me", "root"}
    for body in sent(hub):
        for secret in (hub.token, hub.other_token, "/tmp", str(Path.home()), str(Path.cwd()), *names):
            assert secret.encode() not in body
    assert not any(body.startswith((b"\x80\x04", b"PK")) for body in sent(hub))
    tokens = {request.path.partition("?")[0] for request in hub.requests if "Authorization" not in request.headers}
    assert all(path.startswith("/storage/") for path in tokens)


@pytest.mark.parametrize(("text", "where", "said"), [
    ("/home/somebody/data", "notes", None),  # a path becomes its last part
    ("seen by jdoe-laptop", "notes", "user"),
    ("python a.py --hub_token TOKEN", "command", None),  # a token becomes $HF_TOKEN
    ("../../jdoe-laptop/data", "config", "user"),
    ("key-0123456789abcdef", "config", None),  # a value of the environment its name
])  # fmt: skip
def test_what_is_private_is_taken_out_or_refused(hub, client, text, where, said):
    text = text.replace("TOKEN", hub.token)
    environment = {"LOGNAME": "jdoe-laptop", "WANDB_API_KEY": "key-0123456789abcdef"}

    def call():
        return client("scripts_push:push_results", repo_id="me/heads", text=text, where=where, **environment)

    if said is None:
        call()
        everything = b"\n".join(hub.files("me/heads").values())
        assert b"/home/somebody" not in everything
        assert hub.token.encode() not in everything
        assert b"0123456789" not in everything
        assert where != "command" or b"--hub_token $HF_TOKEN" in hub.files("me/heads")["README.md"]
    else:
        message = refused(call, "UsageError", "Nothing was sent", said)
        assert "0123456789" not in message
        assert not hub.requests


def test_an_unchanged_push_is_no_commit_and_a_changed_one_leaves_nothing_stale(hub, push):
    first = push(measured=0.75, state=True)
    assert push(measured=0.75, state=True)["oid"] == first["oid"]
    assert len(hub.commits("me/heads")) == 2
    hub.put("me/heads", {"notes/mine.txt": b"mine", "figure.png": b"mine"})
    push(seed=1)
    files = hub.files("me/heads")
    assert set(files) == ADAPTER | {".gitattributes", "notes/mine.txt", "figure.png"}
    assert "Nothing was measured" in files["README.md"].decode()


def test_several_adapters(hub, push):
    push(measured=0.75)
    alone = hub.files("me/heads")
    push(adapters=["second", "third"], measured=0.5, only=["second"], seed=1)
    files = hub.files("me/heads")
    assert {name: files[name] for name in alone} == alone  # the one in the root keeps its card
    assert {n for n in files if n.startswith("second/")} == {f"second/{n}" for n in ADAPTER | MEASURED}
    assert not any(n.startswith("third/") for n in files)

    # All at once: those that did not change keep their results, the active one gets new ones.
    push("me/many", adapters=["default", "b"], measured=0.75)
    before = hub.files("me/many")
    push("me/many", adapters=["default", "b"], active="b", measured=0.5)
    after = hub.files("me/many")
    assert {n: after[n] for n in before if not n.startswith("b/")} == {n: before[n] for n in before if "b/" not in n}
    assert json.loads(after["b/results.json"])["measurements"][0]["value"] == 0.5
    assert 'adapter="b"' in after["README.md"].decode()


def test_a_repository_without_default_shows_the_adapter_that_it_has(hub, push):
    push(name="vit_nano", adapters=["simclr"], measured=0.5)
    files = hub.files("me/heads")
    shown = {"README.md", "preprocessor_config.json", ".gitattributes"}
    assert {n for n in files if "/" not in n} == shown
    assert "spectrum.png" not in files["README.md"].decode()
    assert "spectrum.png" in files["simclr/README.md"].decode()


def test_images_are_prepared_as_for_the_backbone(hub, client, push):
    push(name="vit_nano")
    assert client("scripts_push:processor", repo_id="me/heads") < 1e-5
    push("me/text", name="bert")
    assert "preprocessor_config.json" not in hub.files("me/text")


def test_private_repositories(hub, client, push):
    push(private=True)
    other = {"account": hub.other_token, "repo_id": "me/heads"}
    before = hub.state()
    refused(lambda: client("scripts_push:as_other", **other), "HubError", "(403)", "right to write to me")
    assert hub.state() == before
    hub.create("me/open")
    refused(lambda: push("me/open", private=True), "UsageError", "me/open exists and is public", "private=True")
    assert len(hub.commits("me/open")) == 1


def test_pull_requests(hub, client, push):
    push()
    main = hub.files("me/heads")
    back = push(seed=1, create_pr=True, commit_message="Better")
    assert back["pr_url"] == f"{hub.url}/me/heads/discussions/1"
    assert hub.files("me/heads") == main
    proposed = hub.files("me/heads", revision="refs/pr/1")
    assert proposed["adapter_model.safetensors"].hex() == back["saved"]["adapter_model.safetensors"]
    push(seed=2, revision="refs/pr/1")
    assert [c.title for c in hub.commits("me/heads", "refs/pr/1")][:2] == ["Projection head", "Better"]
    other = {"account": hub.other_token, "repo_id": "me/heads", "seed": 3, "create_pr": True}
    assert client("scripts_push:as_other", **other)["pr_url"].endswith("/2")
    assert hub.files("me/heads") == main


def test_branches(hub, push):
    push()
    main = hub.files("me/heads")
    push(seed=1, revision="dev")
    push(seed=2, revision="dev")
    assert len(hub.commits("me/heads", "dev")) == len(hub.commits("me/heads")) + 2
    assert hub.files("me/heads") == main
    before = hub.state()
    refused(lambda: push(revision="refs/pr/9"), "HubError", "no such revision", "Nothing was sent")
    hub.fail("POST", "/commit/", 413)
    refused(lambda: push(seed=3, revision="new"), "HubError", "(413)", "branch new was new and is deleted again")
    assert hub.state() == before


PASSING = [
    ("GET", "/api/models/", 503),
    ("POST", "/api/repos/create", 429),
    ("POST", "/api/validate-yaml", 500),
    ("POST", "/preupload/", 429),
    ("POST", "/info/lfs/objects/batch", 500),
    ("PUT", "/storage/", 500),
    ("PUT", "/storage/", "cut"),
    ("POST", "/verify", 502),
    ("POST", "/commit/", 429),
    ("POST", "/commit/", 500),
    ("POST", "/commit/", "cut"),
    ("POST", "/commit/", "lost"),
    ("POST", "/api/repos/create", "lost"),
    ("POST", "/commit/", "slow"),
]


@pytest.mark.parametrize(("method", "path", "what"), thinned(PASSING))
def test_failures_that_pass(hub, push, method, path, what):
    hub.fail(method, path, what, seconds=0.2)
    back = push()
    assert len(hub.commits("me/heads")) == 2  # the commit whose answer got lost is not made again
    assert hub.commits("me/heads")[0].sha == back["oid"]
    assert set(hub.files("me/heads")) == ADAPTER | {".gitattributes"}


LASTING = [
    ("GET", "/api/models/me/heads", 401, "does not accept the access token (401)"),
    ("POST", "/api/validate-yaml", 401, "(401)"),
    ("POST", "/preupload/", 403, "right to write to me, or propose"),
    ("POST", "/preupload/", 404, "or the access token may not see it (404); check the name"),
    ("POST", "/preupload/", 500, "problem of its own (500)"),
    ("POST", "/info/lfs/objects/batch", 413, "too large for the Hub (413)"),
    ("PUT", "/storage/", 403, "(403)"),
    ("PUT", "/storage/", "cut", "the connection broke ("),
    ("POST", "/commit/", 401, "(401)"),
    ("POST", "/commit/", 409, "somebody else is changing me/heads at the same time (409)"),
    ("POST", "/commit/", 412, "(412); try again"),
    ("POST", "/commit/", 413, "(413)"),
    ("POST", "/commit/", 429, "asked too often (429); try again in 1 s"),
    ("POST", "/commit/", 503, "problem of its own (503)"),
    ("POST", "/commit/", "cut", "the connection broke ("),
]


@pytest.mark.parametrize(("method", "path", "what", "said"), thinned(LASTING))
def test_failures_that_last_leave_the_repository_as_it_was(hub, push, method, path, what, said):
    hub.create("me/heads")
    hub.put("me/heads", {"README.md": b"---\nlicense: mit\n---\nmine", "adapter_model.safetensors": b"mine"})
    before = hub.state()
    hub.fail(method, path, what, times=None)
    message = refused(push, "HubError", "Pushing to me/heads failed", said)
    assert hub.state() == before
    assert "GET" in method or "me/heads is as it was." in message


@pytest.mark.parametrize(("method", "path", "what", "said"), [
    ("POST", "/api/repos/create", 403, "Nothing was sent."),
    ("POST", "/commit/", 500, "me/heads was new and empty, and is deleted again."),
    ("PUT", "/storage/", 403, "me/heads was new and empty, and is deleted again."),
])  # fmt: skip
def test_a_repository_that_a_failed_push_made_is_deleted_again(hub, push, method, path, what, said):
    hub.fail(method, path, what, times=None)
    refused(push, "HubError", said)
    assert not hub.exists("me/heads")


def test_one_that_cannot_be_deleted_is_named(hub, push):
    hub.fail("POST", "/commit/", 409)
    hub.fail("DELETE", "/api/repos/delete", 403)
    refused(push, "HubError", "me/heads was made and could not be deleted again: push again")
    assert list(hub.files("me/heads")) == [".gitattributes"]
    push()
    assert set(hub.files("me/heads")) >= ADAPTER


@pytest.mark.parametrize("what", ["lost", 503])
def test_a_repository_that_was_perhaps_made_is_looked_for(hub, push, what):
    before = hub.state()
    hub.fail("POST", "/api/repos/create", what, times=None)
    wanted = "me/heads was new and empty, and is deleted again." if what == "lost" else "Nothing was sent."
    refused(push, "HubError", wanted)
    assert hub.state() == before
    hub.fail("GET", "/api/models/me/heads", 401, times=None, skip=1)
    refused(push, "HubError", "Whether me/heads was made could not be seen: push again, or delete it yourself.")


def test_a_repository_whose_answer_got_lost_is_deleted_again(hub, push):
    hub.fail("POST", "/api/repos/create", "lost")
    hub.fail("POST", "/commit/", 403)
    refused(push, "HubError", "me/heads was new and empty, and is deleted again.")
    assert not hub.exists("me/heads")


@pytest.mark.parametrize(("method", "path", "what", "times", "skip"), [
    ("GET", "/revision/dev", 401, 1, 1),  # the branch is there, and can't be looked at
    ("POST", "/branch/dev", "lost", None, 0),
])  # fmt: skip
def test_a_branch_that_was_perhaps_made_is_looked_for(hub, push, method, path, what, times, skip):
    push()
    before = hub.state()
    hub.fail(method, path, what, times=times, skip=skip)
    refused(lambda: push(seed=1, revision="dev"), "HubError", "The branch dev was new and is deleted again")
    assert hub.state() == before


def test_a_branch_that_is_said_to_exist_and_does_not(hub, push):
    push()
    before = hub.state()
    hub.fail("POST", "/branch/dev", 409)
    said = refused(lambda: push(seed=1, revision="dev"), "HubError", "no such revision (404)", "Nothing was sent.")
    assert "was made" not in said
    assert hub.state() == before


def test_a_branch_that_was_not_made(hub, push):
    push()
    before = hub.state()
    hub.fail("POST", "/branch/dev", 503, times=None)
    refused(lambda: push(seed=1, revision="dev"), "HubError", "(503)", "Nothing was sent.")
    hub.fail("GET", "/revision/dev", 500, times=None, skip=1)
    refused(
        lambda: push(seed=1, revision="dev"), "HubError", "Whether the branch dev of me/heads was made could not be"
    )
    assert hub.state() == before


def test_no_second_pull_request_where_the_first_could_not_be_seen(hub, push):
    push()
    hub.fail("POST", "/commit/", "lost")
    hub.fail("GET", "/refs", 500, times=5, skip=1)
    said = refused(lambda: push(seed=1, create_pr=True), "HubError", "has another pull request than before, look at it")
    assert "as it was" not in said
    assert set(hub.refs("me/heads")) == {"refs/heads/main", "refs/pr/1"}


@pytest.mark.parametrize("what", ["lost", "cut", 429])
def test_a_pull_request_is_opened_once(hub, push, what):
    push()
    push(seed=1, create_pr=True)
    hub.fail("POST", "/commit/", what)
    back = push(seed=2, create_pr=True)
    assert back["pr_url"].endswith("/discussions/2")
    assert back["oid"] == hub.refs("me/heads")["refs/pr/2"]
    assert set(hub.refs("me/heads")) == {"refs/heads/main", "refs/pr/1", "refs/pr/2"}


def test_a_token_that_does_not_write(hub, client, push):
    hub.create("me/heads")
    before = hub.state()
    refused(lambda: push(token="hf_" + 34 * "x"), "HubError", "does not accept the access token (401)")
    refused(lambda: push(token=False), "UsageError", "There is no access token", "hf auth login")
    refused(lambda: push("other-lab/heads"), "HubError", "(403)", "other-lab", "Nothing was sent.")
    assert hub.state() == before


def test_the_command_sends_what_lies_in_a_folder(hub, client, tmp_path):
    flags = ["--license", "mit", "--message", "From a shell"]
    printed = client("scripts_push:push_command", repo_id="me/heads", folder=str(tmp_path / "run"), flags=flags)
    files = hub.files("me/heads")
    assert {"adapter_model.safetensors", "objective.safetensors", "results.json", "README.md"} <= set(files)
    assert load(files["objective.safetensors"])["queue"].unique().tolist() == [1.0]
    assert hub.commits("me/heads")[0].title == "From a shell"
    assert b"license: mit" in files["README.md"]
    own = {"views.png", "neighbours.png", "map.png"}  # they lie in the folder, and show the user's images
    assert own <= {file.name for file in (tmp_path / "run").iterdir()}
    assert not own & set(files)
    assert not any(name.encode() in files["README.md"] for name in own)
    assert printed == f"Pushed to {hub.url}/me/heads.\n"
