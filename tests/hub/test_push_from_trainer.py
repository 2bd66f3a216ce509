"""The trainer against the loopback Hub: what it pushes and when, what it refuses at once, and going on from there."""

import pytest
from client import RemoteError
from safetensors import safe_open
from test_push import refused

PUSHED = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "ema.safetensors",
          "objective.safetensors", "preprocessor_config.json"}  # fmt: skip


@pytest.fixture
def train(client, tmp_path):
    def call(function="train_and_push", folder="run", **options):
        return client(f"scripts_push:{function}", folder=str(tmp_path / folder), **options)

    return call


def test_every_save_is_a_commit_and_any_of_them_goes_on(hub, client, train, tmp_path):
    back = train(call={}, measured=0.5, hub_model_id="me/heads", hub_private_repo=True, hub_always_push=True)
    assert back["log"] == []
    last, fourth, second, _ = commits = hub.commits("me/heads")
    assert [c.title for c in commits] == [
        "End of training", "Training in progress, step 4", "Training in progress, step 2", "initial commit",
    ]  # fmt: skip
    assert last.sha == back["oid"]
    assert set(hub.files("me/heads")) == PUSHED | {"results.json", "spectrum.png"}
    for commit, step in ((second, 2), (fourth, 4)):
        files = hub.files("me/heads", revision=commit.sha)
        assert set(files) == PUSHED
        for name in ("adapter_model.safetensors", "objective.safetensors", "ema.safetensors"):
            assert files[name] == (tmp_path / f"run/checkpoint-{step}" / name).read_bytes()
    assert "training_args.bin" not in back["files"]
    assert not any(b"training_args" in body or body.startswith(b"PK") for body in hub.bodies)

    on = {"repo": "me/heads", "revision": second.sha}
    earlier = train("go_on", folder="b", source=on)
    assert earlier["started"] == [2, 2 / 3]
    with safe_open(tmp_path / "run/checkpoint-2/objective.safetensors", "pt") as file:
        assert earlier["queue"] == file.get_tensor("queues.0.rows").sum().item()
    final = train("go_on", folder="c", source="me/heads")
    assert (final["started"], final["total"]) == ([4, 4 / 3], back["total"])
    assert final["total"] != earlier["total"]


def test_the_end_alone(hub, train, tmp_path):
    train(hub_strategy="end", save_strategy="no", call=None, folder="my-run")
    assert not hub.exists("me/my-run")
    call = {"commit_message": "Now", "state": False, "license": "mit", "create_pr": False, "revision": "dev"}
    back = train(hub_strategy="end", save_strategy="no", call=call, folder="my-run", push_to_hub=False)
    assert (back["repo"], back["oid"]) == ("me/my-run", hub.branches("me/my-run")["dev"])
    files = hub.files("me/my-run", revision="dev")
    assert set(files) == PUSHED - {"ema.safetensors", "objective.safetensors"}
    card = files["README.md"].decode()
    assert "license: mit" in card
    assert "Nothing was measured" in card
    assert list(hub.files("me/my-run")) == [".gitattributes"]


def test_training_goes_on_without_a_push_that_fails(hub, train, tmp_path):
    hub.fail("POST", "/commit/", 413, times=2)
    back = train(call={}, hub_model_id="me/heads", hub_always_push=True)
    begins = [line.partition(". ")[0] for line in back["log"]]
    assert begins == [f"Training went on without its push at step {step}" for step in (2, 4)]
    assert "too large" in back["log"][0]
    assert [c.title for c in hub.commits("me/heads")] == ["End of training", "initial commit"]

    hub.fail("POST", "/commit/", 403, times=None)
    refused(lambda: train(call={}, folder="b", hub_model_id="me/other"), "HubError", "(403)")
    assert not hub.exists("me/other")
    assert (tmp_path / "b/adapter_model.safetensors").is_file()


def test_what_cannot_work_is_said_before_training(hub, client, train):
    def fails(type, *said, **options):
        before = hub.state()
        refused(lambda: train("make_trainer", **options), type, *said)
        assert hub.state() == before

    fails("UsageError", "is that of me, who can't write to someone-else", hub_model_id="someone-else/x")
    fails("UsageError", "to be 'user/name'", hub_model_id="me/x/y")
    fails("HubError", "does not accept the access token (401)", hub_token="hf_" + 34 * "x")
    hub.fail("GET", "/api/whoami-v2", 503, times=None)
    fails("HubError", "Asking the Hub whose access token this is failed", "(503)", hub_model_id="me/x")
    with pytest.raises(RemoteError) as caught:
        train("make_trainer", hub_strategy="checkpoint")
    assert "nothing pickled is pushed" in caught.value.message
