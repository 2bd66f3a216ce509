"""Push to the loopback Hub, pull from it by every door: what comes back is bit for bit what was trained."""

import pytest
import timm
import torch
from cases import make_backbone
from client import RemoteError
from timm.models import save_for_hf
from transformers import ViTImageProcessor

LORA, BLOCKS, FULL, HEAD = "lora", "two_blocks", "full", "head"
CASES = [
    *(("me/tiny-vit", trained) for trained in (HEAD, LORA, BLOCKS, FULL)),
    *(("me/tiny-bert", trained) for trained in (HEAD, LORA, BLOCKS, FULL)),
    *(("timm/test_vit.r160_in1k", trained) for trained in (HEAD, LORA, BLOCKS, FULL)),
    ("me/tiny-dinov2", LORA),
    ("timm/test_efficientnet.r160_in1k", FULL),
    ("timm/test_efficientnet.r160_in1k", LORA),
]
KWARGS = {"timm/test_vit.r160_in1k": {"img_size": 32}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of each backbone's repository."""
    made = {}
    for name in ("vit", "bert", "dinov2"):
        folder = tmp_path_factory.mktemp(name)
        make_backbone(name).save_pretrained(folder)
        if name == "dinov2":
            ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
        made[f"me/tiny-{name}"] = folder
    for name in ("test_vit", "test_efficientnet"):
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            save_for_hf(timm.create_model(name), folder, safe_serialization=True)
        made[f"timm/{name}.r160_in1k"] = folder
    return {repo: {p.name: p.read_bytes() for p in folder.iterdir()} for repo, folder in made.items()}


@pytest.fixture
def backbones(hub, files):
    for repo, content in files.items():
        hub.create(repo)
        hub.put(repo, content)
    return list(files)


def call(client, function, **arguments):
    return client(f"scripts_pull:{function}", **arguments)


def asked(hub, method="GET"):
    """The files that were downloaded."""
    return [r.path for r in hub.requests if r.method == method and "/resolve/" in r.path]


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.long)])
def test_what_is_pulled_is_what_was_trained(client, backbones, every):
    cases = [
        {"backbone": name, "trained": trained, "repo": f"me/{i}", "kwargs": KWARGS.get(name), "auto": name[:2] == "me"}
        for i, (name, trained) in enumerate(CASES[::every])
    ]
    for case, (differences, changed) in zip(cases, call(client, "round_trips", cases=cases), strict=True):
        assert set(differences.values()) == {0.0}, (case, differences)
        assert changed > 0.01
        assert ("auto" in differences) == case["auto"]


def test_several_adapters(client, hub, backbones):
    z, _ = call(client, "push", backbone="me/tiny-vit", repo="me/three", names=["default", "other", "head"])
    assert set(call(client, "pull", repo="me/three", door="list")["found"].items()) == {(n, 6) for n in z}
    for name in z:
        assert call(client, "pull", repo="me/three", door="from_pretrained", adapter=name)["found"] == z[name]
        options = {} if name == "default" else {"subfolder": name}
        assert call(client, "pull", repo="me/three", door="peft", given="me/tiny-vit", **options)["found"] == z[name]
    client.clear_cache()
    hub.requests.clear()
    head = call(client, "pull", repo="me/three", adapter="other")["found"]
    assert head != call(client, "pull", repo="me/three")["found"]
    names = {path.partition("/resolve/")[2].partition("/")[2] for path in asked(hub)}
    assert names <= {
        f"{folder}adapter_{name}" for folder in ("", "other/") for name in ("config.json", "model.safetensors")
    }
    [said] = call(client, "errors", calls=[["pull", {"repo": "me/three", "adapter": "third"}]])
    assert said[0] == "AdapterFileError"
    assert "there are: default, head, other" in said[1]


def test_only_what_is_needed_is_downloaded(client, hub, backbones):
    for name in ("default", "student"):
        repo = f"me/{name}"
        first, everything, same = call(client, "push_with_everything", backbone="me/tiny-dinov2", repo=repo, name=name)
        assert first == ["adapter_config.json", "adapter_model.safetensors"]
        assert everything == sorted(
            [*first, "ema.safetensors", "objective.safetensors", "preprocessor_config.json", "results.json"]
        )
        assert same
    client.clear_cache()
    hub.requests.clear()
    call(client, "pull", repo="me/default")
    assert len(hub.requests) <= 8


def test_private(client, hub, backbones):
    z, _ = call(client, "push", backbone="me/tiny-vit", repo="me/secret", private=True)
    assert call(client, "pull", repo="me/secret", door="from_pretrained")["found"] == z["default"]
    client.clear_cache()
    refused = [
        ["pull_without_token", {"repo": "me/secret"}],
        ["pull_without_token", {"repo": "me/secret", "door": "list"}],
        ["pull", {"repo": "me/secret", "token": hub.other_token}],
        ["pull", {"repo": "me/secret", "token": False}],
        ["pull", {"repo": "me/secret", "token": "hf_wrong"}],
    ]
    said = call(client, "errors", calls=refused)
    assert [kind for kind, _ in said] == ["AdapterFileError"] * 4 + ["HubError"]
    for _, message in said:
        assert "token" in message
        assert "\n" not in message
        assert hub.other_token not in message
    assert "does not accept the access token" in said[-1][1]
    assert not list(client.cache.glob("models--me--secret/snapshots/*/*"))
    call(client, "pull_without_token", repo="me/secret", token=hub.token)


def test_revisions(client, hub, backbones):
    old, commit = call(client, "push", backbone="me/tiny-vit", repo="me/x")
    new, _ = call(client, "push", backbone="me/tiny-vit", repo="me/x", seed=1)
    branch, _ = call(client, "push", backbone="me/tiny-vit", repo="me/x", seed=2, revision="wide/heads")
    proposed, _ = call(client, "push", backbone="me/tiny-vit", repo="me/x", seed=3, create_pr=True)
    client("scripts_loopback:call", method="create_tag", repo_id="me/x", tag="v1.0", revision=commit)
    wanted = {None: new, "main": new, commit: old, "v1.0": old, "wide/heads": branch, "refs/pr/1": proposed}
    assert len({str(z) for z in wanted.values()}) == 4
    for revision, z in wanted.items():
        found = call(client, "pull", repo="me/x", door="from_pretrained", revision=revision)["found"]
        assert found == z["default"]
        assert call(client, "pull_offline", repo="me/x", door="from_pretrained", revision=revision)["found"] == found
    calls = [["pull", {"repo": "me/x", "revision": name}] for name in ("no-such", commit[:7], "0" * 40, "../../x", "")]
    said = call(client, "errors", calls=calls)
    assert [kind for kind, _ in said] == ["AdapterFileError"] * 3 + ["UsageError"] * 2
    assert all("a branch, a tag" in message for _, message in said)


def test_all_files_of_a_pull_are_of_one_commit(client, backbones):
    old, _ = call(client, "push", backbone="me/tiny-vit", repo="me/x")
    found, new = call(client, "pull_while_pushed", repo="me/x", backbone="me/tiny-vit")
    assert found == old["default"] != new
    assert call(client, "pull", repo="me/x", door="from_pretrained")["found"] == new


def test_offline(client, hub, backbones):
    call(client, "push", backbone="me/tiny-vit", repo="me/x")
    calls = [["pull_offline", {"repo": "me/x"}], ["pull_offline", {"repo": "me/x", "door": "list"}]]
    for kind, message in call(client, "errors", calls=calls):
        assert kind == "UnreachableError"
        assert "HF_HUB_OFFLINE is set" in message
        assert "the cache" in message
    warm = call(client, "pull", repo="me/x", door="from_pretrained")["found"]
    hub.requests.clear()
    assert call(client, "pull_offline", repo="me/x", door="from_pretrained", warned=True) == {
        "found": warm,
        "warnings": [],
    }
    assert call(client, "pull_offline", repo="me/x", door="list")["found"] == {"default": 6}
    assert not hub.requests
    [said] = call(client, "errors", calls=[["pull_offline", {"repo": "me/x", "adapter": "other"}]])
    assert "there are: default" in said[1]


def test_a_cache_of_the_users_choice(client, backbones, tmp_path):
    z, _ = call(client, "push", backbone="me/tiny-vit", repo="me/x")
    options = {"repo": "me/x", "door": "from_pretrained", "cache_dir": str(tmp_path)}
    assert call(client, "pull", **options)["found"] == z["default"]
    assert call(client, "pull_offline", **options)["found"] == z["default"]
    assert [p.name for p in tmp_path.glob("models--*")] == ["models--me--x"]
    assert not list(client.cache.glob("models--me--x"))


def test_an_unreachable_hub_with_a_warm_cache(client, hub, backbones):
    call(client, "push", backbone="me/tiny-vit", repo="me/x")
    warm = call(client, "pull", repo="me/x")["found"]
    for what in (503, "cut"):
        hub.fail("GET", "/api/models/me/x", what, times=3, after_bytes=0)
        found = call(client, "pull", repo="me/x", warned=True)
        assert found["found"] == warm
        [message] = found["warnings"]
        assert "comes from the cache, at commit" in message


def test_preprocessing_of_the_adapter_where_the_backbone_has_none(client, hub, backbones):
    for name in ("vit", "dinov2"):
        call(client, "push", backbone=f"me/tiny-{name}", repo=f"me/{name}")
        content = b'{"image_mean": [0.9, 0.8, 0.7], "image_std": [1, 2, 3], "size": {"height": 24}, "resample": 2}'
        hub.put(f"me/{name}", {"preprocessor_config.json": content})
    assert call(client, "preprocessing", repo="me/vit") == [24, [0.9, 0.8, 0.7], [1, 2, 3], "bilinear", []]
    assert call(client, "preprocessing", repo="me/dinov2")[:2] == [32, [0.1, 0.2, 0.3]]
    hub.put("me/vit", {"preprocessor_config.json": None})
    assert "no preprocessor_config.json" in call(client, "preprocessing", repo="me/vit")[4][0]
    hub.put("me/vit", {"preprocessor_config.json": b'{"image_mean": ["0.9", 0.8, 0.7], "size": 24}'})
    with pytest.raises(RemoteError, match="image_mean"):
        call(client, "preprocessing", repo="me/vit")


@pytest.mark.parametrize("what", [403, 500, "cut", "lost"])
def test_preprocessing_that_the_hub_does_not_tell(client, hub, backbones, what):
    """Images would be prepared otherwise, without a word."""
    call(client, "push", backbone="me/tiny-dinov2", repo="me/x")
    wanted = call(client, "preprocessing", repo="me/x")
    client.clear_cache()
    hub.fail("HEAD", "preprocessor_config.json", what, times=None)
    with pytest.raises(RemoteError) as caught:
        call(client, "preprocessing", repo="me/x")
    assert caught.value.type == "HubError"
    assert "Whether me/tiny-dinov2 has preprocessor_config.json is not known" in caught.value.message
    assert "HF_HUB_OFFLINE=1" in caught.value.message
    assert not {"\n", "Request ID"} & {part for part in ("\n", "Request ID") if part in caught.value.message}
    hub.faults[0].times = 0
    assert call(client, "preprocessing", repo="me/x") == wanted
    hub.faults[0].times = None
    assert call(client, "preprocessing", repo="me/x") == wanted  # the cache has it


def test_no_preprocessing_is_remembered(client, hub, backbones):
    call(client, "push", backbone="me/tiny-vit", repo="me/x")
    wanted = call(client, "preprocessing", repo="me/x")
    hub.fail("HEAD", "/me/tiny-vit/resolve/.*processor_config.json", "cut", times=None)
    assert call(client, "preprocessing", repo="me/x") == wanted


def test_pooling_that_the_hub_does_not_tell(client, hub, backbones):
    hub.fail("HEAD", "modules.json", 500, times=None)
    said = call(client, "errors", calls=[["pooling", {"backbone": "me/tiny-bert"}]])
    assert said == [["UserWarning", said[0][1]]]
    assert "Whether me/tiny-bert has modules.json is not known" in said[0][1]
