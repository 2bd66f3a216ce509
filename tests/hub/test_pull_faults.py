"""Pulling from a Hub that fails: a retry that works or one clear error, and never half a file that later loads."""

import pytest
import torch
from cases import make_backbone, make_config, perturb
from client import RemoteError
from peft import get_peft_model
from thinned import thinned

STAGES = {
    "the commit": ("GET", r"/api/models/me/x"),
    "the size of the config": ("HEAD", r"/resolve/.*/adapter_config.json"),
    "the config": ("GET", r"/resolve/.*/adapter_config.json"),
    "the size of the tensors": ("HEAD", r"/resolve/.*/adapter_model.safetensors"),
    "the tensors": ("GET", r"/storage/"),
}
PASSING = (429, 500, 503, "slow", "cut")
LASTING = (401, 403, 404, 429, 500, "slow", "cut")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(make_backbone("vit"), make_config("vit"))
    perturb(model)
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        z = model.get_base_model().hfproj.projection_head_modules["default"].head(torch.ones(2, 16)).tolist()
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".md"}, z


@pytest.fixture
def repo(hub, saved):
    hub.create("me/x")
    hub.put("me/x", saved[0])
    return "me/x"


def pull(client, repo, function="impatient", **options):
    return client(f"scripts_pull:{function}", repo=repo, **options)["found"]


@pytest.mark.parametrize("stage", thinned(STAGES))
def test_a_failure_that_passes(client, hub, repo, saved, stage):
    for what in PASSING:
        client.clear_cache()
        hub.fail(*STAGES[stage], what, seconds=0.6, after_bytes=100 if stage.endswith("s") else None)
        assert pull(client, repo) == saved[1], what
        assert sum(client.waits) < 20
        assert pull(client, repo, "pull_offline") == saved[1]


@pytest.mark.parametrize("stage", thinned(STAGES, 4))
def test_a_failure_that_lasts(client, hub, repo, saved, stage):
    for what in LASTING:
        client.clear_cache()
        hub.fail(*STAGES[stage], what, times=None, seconds=0.6)
        with pytest.raises(RemoteError) as caught:
            pull(client, repo)
        assert caught.value.type in ("HubError", "UnreachableError", "AdapterFileError")
        for part in ("\n", "Traceback", hub.token, "Request ID"):
            assert part not in caught.value.message
        with pytest.raises(RemoteError):
            pull(client, repo, "pull_offline")
        hub.faults.clear()
        assert pull(client, repo) == saved[1], what


def test_a_server_that_asks_for_an_hour(client, hub, repo):
    hub.fail("GET", "/api/models/me/x", 429, headers={"Retry-After": "3600"})
    with pytest.raises(RemoteError, match="try again in 3600 seconds"):
        pull(client, repo)
    assert not client.waits


def test_a_damaged_cache_is_mended(client, hub, repo, saved):
    assert pull(client, repo) == saved[1]
    for keep in (0, 100, 2000):
        [tensors] = client.cache.glob("models--me--x/snapshots/*/adapter_model.safetensors")
        blob = tensors.resolve()
        assert blob != tensors
        blob.write_bytes(blob.read_bytes()[:keep])
        with pytest.raises(RemoteError, match="damaged or cut short"):
            pull(client, repo, "pull_offline")
        assert pull(client, repo) == saved[1]


def test_a_file_of_another_size_than_the_hub_says(client, hub, repo, saved):
    """Such as a proxy's page in place of the tensors: nothing of it stays in the cache."""
    hub.put(repo, {"adapter_model.safetensors": b"<html>" * 500})
    said = client("scripts_pull:pull_from_a_liar", repo=repo, size=len(saved[0]["adapter_model.safetensors"]))
    assert said[0] == "HubError"
    assert "arrived with 3,000 bytes instead of 2,552" in said[1]
    assert not list(client.cache.rglob("adapter_model.safetensors"))
    assert {p.stat().st_size for p in client.cache.glob("models--me--x/blobs/*")} == {
        len(saved[0]["adapter_config.json"])
    }


def test_the_header_of_large_tensors_is_read_first(client, hub, repo, saved):
    assert pull(client, repo, "pull_header_first") == saved[1]
    tensors = saved[0]["adapter_model.safetensors"]
    for data, said in (
        (tensors.replace(b"head.last.linear.weight", b"head.last.linear.wEIGHT"), "missing head.last.linear.weight"),
        (tensors.replace(b'"F32"', b'"F99"'), "does not begin with the header"),
        (b"\xff" * 7 + b"\0" + tensors[8:], "does not begin with the header"),
    ):
        client.clear_cache()
        hub.put(repo, {"adapter_model.safetensors": data})
        hub.requests.clear()
        with pytest.raises(RemoteError, match=said) as caught:
            pull(client, repo, "pull_header_first")
        assert caught.value.type == "AdapterFileError"
        assert all("range" in {name.lower() for name in r.headers} for r in hub.requests if "/storage/" in r.path)
        assert not list(client.cache.rglob("adapter_model.safetensors"))
