"""Caches of features: the same as without, the same bytes however they came about, and never a stale or damaged one."""

import json
import os
import signal
from pathlib import Path

import extracting
import forked
import pytest
import torch
from extracting import BATCH, ROWS, Collator, Net, Rows, extract, files
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hfproj.errors import UsageError
from hfproj.features import cache_features, extract_features
from hfproj.features.store import FeatureStore


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Run `extracting.main` in a process of its own; return its folder and what it returned."""
    folder = tmp_path_factory.mktemp("processes")
    (results,) = forked.returned(extracting.main, folder)
    return folder, results


def only(folder, pattern):
    (found,) = Path(folder).glob(f"*/{pattern}")
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bytes of the cache of an extraction that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    extract(folder)
    return files(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_cached_features_are_those_in_memory(tmp_path, dtype):
    options = {"layers": ["first"], "dtype": dtype, "batch_size": BATCH}
    expected = extract_features(Net(), Rows(), collator=Collator(), **options)
    for _ in range(2):
        cached = extract(tmp_path, **options)
        assert cached.by_name().keys() == expected.by_name().keys()
        for name, f in expected.by_name().items():
            assert cached.by_name()[name].equal(f)
        assert cached.labels.tolist() == [i % 5 for i in range(ROWS)]
        assert cached.index.tolist() == list(range(ROWS))
        assert cached.z is None


def test_the_second_call_runs_nothing_and_probes_can_use_what_it_maps(tmp_path):
    model = Net()
    extract(tmp_path, model)
    assert sum(model.seen) == ROWS
    again = extract(tmp_path, model)
    assert sum(model.seen) == ROWS
    loss = torch.nn.Linear(24, 1)(again.h[10:20]).sum()
    loss.backward()
    before = files(tmp_path)
    again.h.zero_()
    assert files(tmp_path) == before
    assert extract(tmp_path, model).h.abs().sum() > 0


def test_the_file_is_plain_safetensors_without_pickle(tmp_path):
    features = extract(tmp_path)
    file = only(tmp_path, "features.safetensors")
    assert load_file(file)["layers.first"].equal(features.layers["first"])
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata()["key"] == file.parent.name
    assert {path.name for path in file.parent.iterdir()} == {"features.safetensors", "manifest.json"}
    made_of = json.loads(only(tmp_path, "manifest.json").read_text())["made_of"]
    assert {"model", "data", "preprocessing", "read", "hfproj"} == made_of.keys()


def test_another_batch_size_reads_the_same_cache(tmp_path):
    model = Net()
    first = extract(tmp_path, model)
    second = extract(tmp_path, model, batch_size=7)
    assert sum(model.seen) == ROWS
    assert second.h.equal(first.h)


@pytest.mark.parametrize("part", ["weight", "data", "preprocessing", "layers", "dtype"])
def test_whatever_changes_makes_another_cache(tmp_path, part):
    model, data, options = Net(), Rows(), {"collator": Collator()}
    first = extract(tmp_path, model, data, **options)
    if part == "weight":
        with torch.no_grad():
            model.second.weight[3, 5] += 1e-3
    elif part == "data":
        options["data_key"] = "other rows"
    elif part == "preprocessing":
        options["preprocessing_key"] = "another way"
    elif part == "layers":
        options["layers"] = []
    else:
        options["dtype"] = torch.float16
    second = extract(tmp_path, model, data, **options)
    assert sum(model.seen) == 2 * ROWS
    assert second.h.equal(first.h) == (part in ("data", "preprocessing", "layers"))
    assert len(list(tmp_path.glob("*/manifest.json"))) == 2


def test_an_extraction_killed_half_way_goes_on_to_the_same_bytes(processes, whole):
    folder, results = processes
    assert results["killed"] == (-signal.SIGKILL, None)
    folder = folder / "killed"
    left = files(folder)
    assert not any(name.endswith("manifest.json") for name in left)
    assert len(next(text for name, text in left.items() if name.endswith("-0.jsonl")).split()) == 4  # 2 shards
    with open(only(folder, "progress-0.jsonl"), "a") as journal:
        journal.write('\n[2, "a90')  # as if it had been killed while it wrote
    model = Net()
    extract(folder, model)
    assert sum(model.seen) == ROWS - 2 * 256
    assert files(folder) == whole


def interrupted(folder):
    """Stop after two and a half shards."""
    model = Net().train()
    with pytest.raises(OSError, match="batch 11"):
        extract(folder, model, collator=Collator(stop_at=11))
    assert model.training
    assert not model.first._forward_hooks


def test_an_extraction_stopped_by_an_error_goes_on(tmp_path, whole):
    interrupted(tmp_path)
    model = Net()
    extract(tmp_path, model)
    assert sum(model.seen) == ROWS - 2 * 256
    assert files(tmp_path) == whole


def test_shards_that_were_damaged_before_it_goes_on_are_extracted_again(tmp_path, whole):
    interrupted(tmp_path)
    flip(only(tmp_path, "features.safetensors"), 10 - ROWS * 4 * (24 + 16))  # row 0 of h
    model = Net()
    with pytest.warns(UserWarning, match="damaged"):
        extract(tmp_path, model)
    assert sum(model.seen) == ROWS - 256
    assert files(tmp_path) == whole


def test_an_unfinished_extraction_under_other_settings_begins_anew(tmp_path, whole):
    interrupted(tmp_path)
    model = Net()
    extract(tmp_path, model, batch_size=100)
    assert sum(model.seen) == ROWS
    assert {name.split("/")[1] for name in files(tmp_path)} == {"features.safetensors", "manifest.json"}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(folder):
    file = only(folder, "features.safetensors")
    os.truncate(file, file.stat().st_size - 5)


def foreign(folder):
    save_file({"h": torch.zeros(ROWS, 24)}, only(folder, "features.safetensors"))


def of_another_key(folder):
    file = only(folder, "features.safetensors")
    model = Net()
    model.first.weight.data += 1
    extract(folder, model)
    (other,) = set(Path(folder).glob("*/features.safetensors")) - {file}
    file.write_bytes(other.read_bytes())
    for part in other.parent.iterdir():
        part.unlink()


def symlink(folder):
    file = only(folder, "features.safetensors")
    outside = Path(folder, "outside")
    file.rename(outside)
    file.symlink_to(outside)


def edit(**changes):
    def change(folder):
        file = only(folder, "manifest.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


DAMAGE = {
    "truncated": (truncate, "bytes instead of", ROWS),
    "one bit": (lambda f: flip(only(f, "features.safetensors"), -100), "1 of 5 shards has changed", 76),
    "header": (lambda f: flip(only(f, "features.safetensors"), 20), "another file", ROWS),
    "foreign": (foreign, "another file", ROWS),
    "empty": (lambda f: os.truncate(only(f, "features.safetensors"), 0), "another file", ROWS),
    "of another key": (of_another_key, "belongs to other features", ROWS),
    "missing": (lambda f: only(f, "features.safetensors").unlink(), "is missing", ROWS),
    "symlink": (symlink, "is missing", ROWS),
    "manifest cut off": (lambda f: os.truncate(only(f, "manifest.json"), 50), "cannot be read", ROWS),
    "manifest a list": (lambda f: only(f, "manifest.json").write_text("[1]"), "cannot be read", ROWS),
    "manifest of another key": (edit(key="ab"), "manifest belongs to other", ROWS),
    "manifest without shards": (edit(shards=[]), "incomplete", ROWS),
    "manifest with odd shards": (edit(shards=[None, 1, "x", {}, []]), "5 of 5 shards", ROWS),
    "manifest with odd settings": (edit(settings={"shard_rows": 256.0}), "cannot be read", ROWS),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_mended(tmp_path, whole, kind):
    extract(tmp_path)
    damage, message, rows = DAMAGE[kind]
    damage(tmp_path)
    model = Net()
    with pytest.warns(UserWarning, match=message):
        features = extract(tmp_path, model)
    assert sum(model.seen) == rows
    assert features.h.equal(extract(tmp_path).h)
    assert {n: b for n, b in files(tmp_path).items() if n in whole} == whole
    assert not only(tmp_path, "features.safetensors").is_symlink()


def test_who_maps_a_file_that_is_replaced_keeps_the_old_one(tmp_path):
    features = extract(tmp_path)
    expected = features.h.clone()
    mapped = extract(tmp_path)
    os.rename(only(tmp_path, "features.safetensors"), tmp_path / "kept")
    foreign_file = only(tmp_path, "manifest.json").with_name("features.safetensors")
    foreign_file.write_bytes(b"something else")
    with pytest.warns(UserWarning, match="another file"):
        extract(tmp_path)
    assert mapped.h.equal(expected)


def test_two_processes_at_once_do_the_work_once(processes, whole):
    folder, results = processes
    (code_a, a), (code_b, b) = results["together"]
    assert (code_a, code_b) == (0, 0), (a, b)
    assert {a["rows"], b["rows"]} == {ROWS, 0}
    assert a["h"] == b["h"]
    (told,) = a["told"] + b["told"]
    assert "waiting for it" in told
    assert files(folder / "together/cache") == whole


def test_memory_does_not_grow_with_the_rows(processes):
    code, peaks = processes[1]["memory"]
    assert code == 0, peaks
    small, large, read = peaks
    assert large - small < 24  # MiB; the features take 112 MiB more
    assert read - large < 24


def test_features_that_change_their_width_are_refused(tmp_path):
    class Uneven(Net):
        def forward(self, x):
            return super().forward(x)[:, : 24 if len(self.seen) < 6 else 23]

    with pytest.raises(UsageError, match=r"'h' of rows 1280 to 1535 has shape \(256, 23\), expected \(256, 24\)"):
        extract(tmp_path, Uneven(), batch_size=256, layers=[], data=Rows(2000), collator=Collator())


def test_keys_and_folders_are_checked(tmp_path):
    options = {"made_of": {}, "rows": 1, "shard_rows": 1, "settings": {}, "names": ["h"]}
    for key in ("../outside", "", "AB", "/tmp/x"):
        with pytest.raises(UsageError, match="hexadecimal"):
            FeatureStore(tmp_path, key, **options)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="no folder"):
        extract(tmp_path / "file")
    with pytest.raises(UsageError, match="preprocessing_key"):
        extract(tmp_path, collator=lambda items: Collator()(items))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_same_bytes(tmp_path, whole, workers):
    extract(tmp_path, num_workers=workers)
    assert files(tmp_path) == whole


class Views:
    """Three views of each item, which depend on its index and epoch."""

    cache_key = "views"

    def __call__(self, items):
        key = torch.tensor([item["index"] + 100 * item["epoch"] for item in items])
        x = torch.stack([item["x"] for item in items])
        return {"views": [x * (key + view)[:, None].cos() for view in range(3)], "labels": key % 7}


def test_cached_views_are_kept_in_the_same_files(tmp_path):
    model, options = Net(), {"passes": 2, "batch_size": BATCH}
    expected = cache_features(model, Rows(), Views(), **options)
    assert expected.features.shape == (ROWS, 6, 24)
    views = Views()([{"x": Rows()[3]["x"], "index": 3, "epoch": 1}])["views"]
    torch.testing.assert_close(expected.features[3, 3:], torch.cat([model(view) for view in views]).detach())
    for _ in range(2):
        cached = cache_features(model, Rows(), Views(), **options, cache_dir=tmp_path)
        assert cached.features.equal(expected.features)
        assert cached.labels.equal(expected.labels)
    assert sum(model.seen) == 2 * 6 * ROWS + 3
    assert {path.name for path in only(tmp_path, "manifest.json").parent.iterdir()} == {
        "features.safetensors",
        "manifest.json",
    }
    cache_features(model, Rows(), Views(), **options | {"passes": 1}, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*/manifest.json"))) == 2


def test_an_interrupted_cache_of_views_goes_on(tmp_path):
    class Stopping(Views):
        batches = 0

        def __call__(self, items):
            Stopping.batches += 1
            if Stopping.batches == 11:  # each of the shards has four batches a pass
                raise OSError("batch 11")
            return super().__call__(items)

    model, options = Net(), {"passes": 2, "batch_size": BATCH, "preprocessing_key": "views", "cache_dir": tmp_path}
    with pytest.raises(OSError, match="batch 11"):
        cache_features(Net(), Rows(), Stopping(), **options)
    found = cache_features(model, Rows(), Views(), **options)
    assert sum(model.seen) == 6 * (ROWS - 256)
    assert found.features.equal(cache_features(Net(), Rows(), Views(), passes=2, batch_size=BATCH).features)
