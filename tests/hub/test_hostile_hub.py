"""Hostile repositories on a Hub: nothing is run, and nothing is written outside the cache."""

import json
import os
import pickle
import struct

import pytest
from cases import make_backbone
from hostile import MARK, Boom, save_adapter

from hfproj import filenames


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return {p.name: p.read_bytes() for p in save_adapter(tmp_path_factory.mktemp("adapter")).iterdir()}


def test_hostile_repositories(hub, client, content):
    boom = pickle.dumps(Boom())
    config = json.loads(content[filenames.ADAPTER_CONFIG])
    tensors = content[filenames.ADAPTER_WEIGHTS]
    hub.create("me/x")

    def configured(**values):
        return json.dumps({**config, **values}).encode()

    far = {"library": "transformers", "id": "../../etc", "kwargs": {}}
    repositories = {
        "pickle": ({filenames.ADAPTER_WEIGHTS: None, "adapter_model.bin": boom}, "as a pickle only"),
        "pickle by name": ({filenames.ADAPTER_WEIGHTS: boom}, "bytes"),
        "code": ({filenames.ADAPTER_CONFIG: configured(auto_map={"AutoModel": "evil--x.Y"}), "evil.py": b"1/0"},
                 "names code"),
        "huge config": ({filenames.ADAPTER_CONFIG: b" " * (100 * 2**20)}, "104,857,600 bytes"),
        "huge tensors": ({filenames.ADAPTER_CONFIG: configured(backbone_adapter=None),
                          filenames.ADAPTER_WEIGHTS: tensors + b"\0" * 2**21}, "asks for at most"),
        "header": ({filenames.ADAPTER_WEIGHTS: struct.pack("<Q", 2**63) + tensors[8:]}, "said to have"),
        "cut": ({filenames.ADAPTER_WEIGHTS: tensors[:-8]}, "damaged or cut short"),
        "empty": ({filenames.ADAPTER_WEIGHTS: b""}, "damaged or cut short"),
        "shapes": ({filenames.ADAPTER_CONFIG: configured(out_dim=7)}, "has shape (6, 8), expected (7, 8)"),
        "large backbone": ({filenames.ADAPTER_CONFIG: configured(backbone={
            "library": "timm", "id": "vit_tiny_patch16_224",
            "kwargs": {"pretrained": False, "embed_dim": 2048, "depth": 64, "num_heads": 2, "mlp_ratio": 8},
        })}, None),
        "queue": ({filenames.ADAPTER_CONFIG: configured(objective={"name": "moco", "out_dim": 6, "queue_size": 10**9})},
                  "queues and memories"),
        "a name twice": ({filenames.ADAPTER_WEIGHTS: struct.pack("<Q", 400_003) + b"{" + b'"a":1,' * 66_666
                          + b'"b":1}'},
                         "comes twice"),
        "paths": ({filenames.ADAPTER_CONFIG: configured(backbone=far)}, None),
        "names": ({filenames.ADAPTER_CONFIG: None, "../adapter_config.json": b"{}",
                   "a\\..\\b/adapter_config.json": b"{}",
                   "/etc/adapter_config.json": b"{}", "sub/../../adapter_config.json": b"{}"},
                  "has no adapter_config.json"),
    }  # fmt: skip
    for files, reason in repositories.values():
        client.clear_cache()
        hub.put("me/x", {name: None for name in hub.files("me/x") if name != ".gitattributes"})
        hub.put("me/x", {name: data for name, data in {**content, **files}.items() if data is not None})
        hub.requests.clear()
        said, seen, left = client("scripts_pull:look_at", repo="me/x")
        assert (seen, left) == ([], [])
        for door in said if reason else said[1:2]:
            assert door is not None
            assert door[0] == "AdapterFileError"
            assert reason in door[1] if reason else any(s in door[1] for s in ("no id of a model", "are allowed")), door
        got = [r.path for r in hub.requests if r.method == "GET" and ("/resolve/" in r.path or "/storage/" in r.path)]
        assert not [path for path in got if path.endswith((".bin", ".py"))]
        if reason in ("104,857,600 bytes", "asks for at most"):
            assert len(got) == (reason == "asks for at most")  # nothing of the large file was downloaded


def test_hostile_backbones(hub, client, content, tmp_path):
    """An adapter that is sound may name a backbone that is not."""
    make_backbone("vit").save_pretrained(tmp_path)
    sound = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code = {"evil.py": f"import os\nos.system('touch {MARK}')\n".encode()}
    named = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}

    def configured(**values):
        return {**sound, "config.json": json.dumps({**json.loads(sound["config.json"]), **values}).encode()}

    backbones = {
        "of-a-class-of-its-own": configured(model_type="evil", **named) | code,
        "pickled": {"config.json": sound["config.json"], "pytorch_model.bin": pickle.dumps(Boom())},
        "an-adapter-too": content,
        "with-a-kernel": configured(_attn_implementation="someone/kernel"),
        "sound": configured(**named) | code,
    }
    config = json.loads(content[filenames.ADAPTER_CONFIG])
    for name, files in backbones.items():
        source = {"library": "transformers", "id": f"me/{name}", "kwargs": {}}
        for repo, there in ((f"me/{name}", files), (f"me/on-{name}", {
            **content, filenames.ADAPTER_CONFIG: json.dumps({**config, "backbone": source}).encode(),
        })):  # fmt: skip
            hub.create(repo)
            hub.put(repo, there)
        [head, model, _], seen, left = client("scripts_pull:look_at", repo=f"me/on-{name}")
        assert head is None
        assert (seen, left) == ([], [])
        if name == "sound":
            assert model is None
        else:
            assert model[0] in ("AdapterFileError", "UsageError")
            assert f"me/{name}" in model[1]
            assert "\n" not in model[1]
    assert not os.path.exists(MARK)
