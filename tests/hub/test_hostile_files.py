"""Hostile and damaged files: headers that mislead, pickles, links, and what lies beside an adapter."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from cases import make_backbone
from hostile import MARK, Boom, refusal, save_adapter, write_config
from safetensors.torch import load_file, save_file

import hfproj
from hfproj import filenames
from hfproj.backbones.preprocessing import settings_of
from hfproj.hub.pull import open_adapter
from hfproj.hub.untrusted import read_header


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def with_header(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(("data", "said"), [
    (b"", ""), (b"\0" * 9, ""), (b"\0" * 100, "begin with a header"),
    (with_header({}, length=2**63), "said to have 9,223,372,036,854,775,808 bytes"),
    (with_header({}, length=2**64 - 1), "said to have"), (with_header({}, length=3), ""),
    (with_header({}, b"x" * 20), ""), (with_header(b"[]   "), "begin with a header"),
    (with_header(b" {}"), "begin with a header"), (with_header(b"{} {}"), ""),
    (with_header(b'{"a": NaN}'), "no number"),
    (with_header(b'{"a": 1, "a": 2}'), "comes twice"), (with_header({"a": 1}), ""),
    (with_header({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8), ""),
    (with_header({"a": entry() | {"pickle": "x"}}, b"x" * 8), "no tensor"),
    (with_header({"a": entry(offsets=(0, 9))}, b"x" * 9), ""),
    (with_header({"a": entry(offsets=(8, 0))}, b"x" * 8), ""),
    (with_header({"a": entry(offsets=(-8, 0))}, b"x" * 8), ""),
    (with_header({"a": entry(offsets=(0, 8, 8))}, b"x" * 8), ""),
    (with_header({"a": entry(offsets=(0, 2**56), shape=(2**54,))}, b"x" * 8), ""),
    (with_header({"a": entry(shape=(-2,))}, b"x" * 8), ""), (with_header({"a": entry(shape=(2.0,))}, b"x" * 8), ""),
    (with_header({"a": entry(shape=(True,))}, b"x" * 8), ""), (with_header({"a": entry(shape="22")}, b"x" * 8), ""),
    (with_header({"a": entry(shape=(2**32, 2**32, 2**32))}, b"x" * 8), ""),
    (with_header({"a": entry(shape=(0, 2**56))}, b"x" * 8), ""),
    (with_header({"a": entry(shape=(2**64, 0))}, b"x" * 8), "too large"),
    (with_header({"a": entry(shape=(1,) * 9)}, b"x" * 8), ""),
    (with_header({"a": entry(dtype="F8_E4M3", offsets=(0, 2))}, b"xx"), "has dtype F8_E4M3"),
    (with_header({"a": entry(dtype=["F32"])}, b"x" * 8), ""),
    (with_header({"a": entry(), "b": entry()}, b"x" * 16), ""),
    (with_header({"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12), ""),
    (with_header({"a": entry(), "b": entry(offsets=(16, 24))}, b"x" * 24), ""),
    (with_header({"a": entry(), "b": entry(offsets=(0, 8))}, b"x" * 8), ""),
    (with_header(b'{"a": ' + json.dumps(entry()).encode() + b', "a": ' + json.dumps(entry()).encode() + b"}", b"x" * 8),
     "comes twice"),
    (with_header({"__metadata__": {"a": 1}, "a": entry()}, b"x" * 8), ""),
    (with_header({"__metadata__": "x", "a": entry()}, b"x" * 8), ""), (with_header({"a": entry()}, b"x" * 7), ""),
    (with_header({"a": entry()}, b"x" * 8 + b"PK\x03\x04"), ""),
    (with_header(b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"), ""),
    (with_header({f"t{i}": entry((), (i, i + 1), "U8") for i in range(20_001)}, b"x" * 20_001), "lists 20,001 tensors"),
])  # fmt: skip
def test_headers_that_mislead(copied, data, said):
    (copied / filenames.ADAPTER_WEIGHTS).write_bytes(data)
    for call in (
        lambda: hfproj.load_head(copied),
        lambda: hfproj.from_pretrained(copied, backbone=make_backbone("vit")),
    ):
        refusal(call, "damaged or cut short", said, "download or save it again")


def test_a_header_of_20_megabytes(copied):
    (copied / filenames.ADAPTER_WEIGHTS).write_bytes(with_header(b"{" + b" " * 20 * 2**20 + b"}"))
    refusal(lambda: hfproj.load_head(copied), "its header is said to have 20,971,522 bytes, more than 8,388,608")


def test_a_sound_header_is_read(saved, tmp_path):
    data = (saved / filenames.ADAPTER_WEIGHTS).read_bytes()
    found = read_header(saved / filenames.ADAPTER_WEIGHTS, "x")
    assert {n: i.shape for n, i in found.items()} == {
        n: tuple(t.shape) for n, t in load_file(saved / filenames.ADAPTER_WEIGHTS).items()
    }
    for cut in range(0, len(data), 997):
        (tmp_path / "cut.safetensors").write_bytes(data[:cut])
        refusal(lambda: read_header(tmp_path / "cut.safetensors", "x"), "damaged or cut short")


HEAD = "base_model.model.hfproj.projection_head_modules.head.last.linear.weight"


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.pop(HEAD), ["missing head.last.linear.weight"]),
    (lambda t: t.update({HEAD: t[HEAD].mT.contiguous()}), ["has shape (8, 6), expected (6, 8)"]),
    (lambda t: t.update({HEAD: t[HEAD].long()}), ["has dtype I64, expected F32"]),
    (lambda t: t.update({HEAD.replace("last", "os.system"): t[HEAD] + 1}), ["unexpected head.os.system"]),
    (lambda t: t.update({"evil\x1b[2J\n": t[HEAD] + 1}), ["unexpected evil\\x1b"]),
    (lambda t: t.update({"base_model.model.hfproj.backbone.x": t[HEAD] + 1}), ["unexpected hfproj.backbone.x"]),
    (lambda t: [t.pop(n) for n in list(t) if "predictor" in n], ["missing predictor.", "and 3 more"]),
    (lambda t: t[HEAD].view(-1)[3:4].fill_(torch.nan), ["NaN or infinity in", "diverged"]),
    (lambda t: next(v for n, v in t.items() if "lora" in n).fill_(-torch.inf), ["NaN or infinity in"]),
])  # fmt: skip
def test_tensors_that_are_not_those_of_the_config(copied, change, said):
    tensors = load_file(copied / filenames.ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, copied / filenames.ADAPTER_WEIGHTS)
    for call in (
        lambda: hfproj.load_head(copied),
        lambda: hfproj.from_pretrained(copied, backbone=make_backbone("vit")),
    ):
        refusal(call, *said, str(copied))


def test_half_precision_is_no_other_adapter(copied):
    tensors = load_file(copied / filenames.ADAPTER_WEIGHTS)
    save_file(
        {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}, copied / filenames.ADAPTER_WEIGHTS
    )
    head, h = hfproj.load_head(copied), torch.randn(2, 16)
    assert (head(h) - hfproj.load_head(shutil.copytree(copied, copied.parent / "b"))(h)).abs().max() == 0
    assert next(head.parameters()).dtype == torch.float32


# --- pickles, links, names ---


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.PTH", "head.ckpt", "x.pkl"])
def test_a_pickle_alone(copied, name):
    (copied / filenames.ADAPTER_WEIGHTS).unlink()
    (copied / name).write_bytes(pickle.dumps(Boom()))
    for call in (
        lambda: hfproj.load_head(copied),
        lambda: hfproj.from_pretrained(copied, backbone=make_backbone("vit")),
    ):
        refusal(call, "as a pickle only", name, "never opened")
    assert not os.path.exists(MARK)


def test_a_pickle_beside_safetensors_or_in_their_place(copied, saved):
    (copied / "adapter_model.bin").write_bytes(pickle.dumps(Boom()))
    h = torch.randn(2, 16)
    assert torch.equal(hfproj.load_head(copied)(h), hfproj.load_head(saved)(h))
    (copied / filenames.ADAPTER_WEIGHTS).write_bytes(pickle.dumps(Boom()))
    refusal(lambda: hfproj.load_head(copied), "damaged or cut short")
    assert not os.path.exists(MARK)


def test_links_and_pipes(saved, copied, tmp_path):
    for name in (filenames.ADAPTER_CONFIG, filenames.ADAPTER_WEIGHTS):
        (copied / name).unlink()
        (copied / name).symlink_to(saved / name)
        refusal(lambda: hfproj.load_head(copied), "leads out of the folder")
        (copied / name).unlink()
        os.mkfifo(copied / name)
        refusal(lambda: hfproj.load_head(copied), "no regular file")
        (copied / name).unlink()
        (copied / name).symlink_to("/dev/zero")
        refusal(lambda: hfproj.load_head(copied), "leads out of the folder")
        (copied / name).unlink()
        (copied / name).symlink_to(copied / name)
        refusal(lambda: hfproj.load_head(copied), f"has no {name}")
        (copied / name).unlink()
        shutil.copyfile(saved / name, copied / name)
    (copied / "other").symlink_to(saved)
    refusal(lambda: hfproj.load_head(copied, adapter="other"), "leads out of the folder")
    (tmp_path / "latest").symlink_to(copied)  # a link that the user follows is the user's
    hfproj.load_head(tmp_path / "latest")


def test_snapshots_of_a_cache_are_links(saved, tmp_path):
    cache = tmp_path / "models--me--x"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name in (filenames.ADAPTER_CONFIG, filenames.ADAPTER_WEIGHTS):
        shutil.copyfile(saved / name, cache / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    hfproj.load_head(snapshot)
    (snapshot / filenames.ADAPTER_CONFIG).unlink()
    (snapshot / filenames.ADAPTER_CONFIG).symlink_to(f"../../blobs/../../{saved.name}/{filenames.ADAPTER_CONFIG}")
    refusal(lambda: hfproj.load_head(snapshot))
    (snapshot / filenames.ADAPTER_CONFIG).unlink()
    (snapshot / filenames.ADAPTER_CONFIG).symlink_to(saved / filenames.ADAPTER_CONFIG)
    refusal(lambda: hfproj.load_head(snapshot), "leads out of the folder")


@pytest.mark.parametrize("name", [
    "", ".", "..", "../copy", "a/b", "/etc", "a\\b", "C:x", "x\n", "\0", "x" * 300, ".git", "a*", "x.", 'a"b', None, 3,
])  # fmt: skip
def test_names_that_lead_elsewhere(copied, name):
    for call in (hfproj.load_head, open_adapter, hfproj.from_pretrained):
        with pytest.raises((hfproj.UsageError, TypeError)):
            call(copied, adapter=name)


def test_a_listing_with_adapters_of_every_kind(saved, tmp_path):
    root = shutil.copytree(saved, tmp_path / "repo")
    for name in ("good", "lora", "broken", "empty", ".hidden", "odd name", "huge"):
        shutil.copytree(saved, root / name)
    write_config(root / "lora", {"peft_type": "LORA"})
    write_config(root / "broken", b"{")
    write_config(root / "huge", b" " * (2**20 + 1))
    (root / "empty" / filenames.ADAPTER_CONFIG).unlink()
    (root / "elsewhere").symlink_to(saved)
    with pytest.warns(UserWarning, match="Left out: ") as caught:
        found = hfproj.list_adapters(root)
    messages = sorted(str(w.message).partition("adapter_config.json ")[2] for w in caught)
    assert [m[:30] for m in messages] == [
        "has 1,048,577 bytes, more than",
        "is a link, or lies behind one,",
        "is not JSON as expected (Expec",
    ]
    assert list(found) == ["default", "good", "odd name"]
    assert found["good"].out_dim == 6
    hfproj.load_head(root, adapter="odd name")
    refusal(lambda: hfproj.load_head(root, adapter="goof"), "there are: default, ", "good")
    (root / filenames.ADAPTER_CONFIG).unlink()
    refusal(lambda: hfproj.load_head(root), "there are: ", "Say adapter=")


# --- what lies beside an adapter ---


@pytest.mark.parametrize(("name", "data", "said"), [
    (filenames.RESULTS, b"[]", "results.json"), (filenames.RESULTS, b'{"format": 1, "format": 1}', "comes twice"),
    (filenames.RESULTS, b'{"format": 1, "measurements": [{"name": "x"}]}', "damaged"),
    (filenames.RESULTS, b'{"format": 99}', "damaged"),
    (filenames.PREPROCESSING, b'{"size": 1e9}', "image size"),
    (filenames.PREPROCESSING, b'{"size": {"height": -1}}', "image size"),
    (filenames.PREPROCESSING, b'{"size": 8, "image_std": [0, 1, 1]}', "image_std"),
    (filenames.PREPROCESSING, b'{"size": 8, "image_mean": "abc"}', "image_mean"),
    (filenames.PREPROCESSING, b" " * (2**20 + 1), "more than the 1,048,576"),
    (filenames.OBJECTIVE, b"\x80\x04", "damaged or cut short"), (filenames.EMA, b"\x80\x04", "damaged or cut short"),
])  # fmt: skip
def test_files_beside_an_adapter(copied, name, data, said):
    (copied / name).write_bytes(data)
    refusal(lambda: open_adapter(copied).file(name), said)
    assert open_adapter(copied).folder == copied


def test_results_of_a_gigabyte_and_an_average_of_nan(copied):
    with open(copied / filenames.RESULTS, "wb") as file:
        file.truncate(2**30)
    refusal(lambda: open_adapter(copied).file(filenames.RESULTS), "1,073,741,824 bytes")
    save_file({"a": torch.tensor([torch.nan])}, copied / filenames.EMA)
    refusal(lambda: open_adapter(copied).file(filenames.EMA), "NaN or infinity")
    assert open_adapter(copied).file(filenames.OBJECTIVE) is None


def test_preprocessing_as_transformers_writes_it():
    found = {
        "crop_size": {"height": 24, "width": 24},
        "do_center_crop": True,
        "size": {"shortest_edge": 32},
        "resample": 3,
    }
    assert settings_of(found, "x").size == 24
    assert settings_of(found | {"do_center_crop": False}, "x").size == 32
    assert settings_of({"size": 16, "image_mean": [0.1] * 3, "resample": 2}, "x").mean == (0.1,) * 3
    assert settings_of({}, "x", size=8).interpolation == "bicubic"
