"""Two processes give what one process with the global batch gives, through the trainer.

They have the environment that ``accelerate launch`` gives them; with ``-m long`` it starts them itself.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import forked
import processes
import pytest
import torch
from small import differs

SCRIPT = Path(__file__).with_name("processes.py")
NAMES = ["global batch", "resumed", "workers", "watched", "watched h", "stream", "multi-crop", "multi-crop resumed",
         "multi-crop continued", "skipped", "skipped resumed", "targets", "targets resumed"]  # fmt: skip


@pytest.fixture(scope="module", params=["forked", pytest.param("launched", marks=pytest.mark.long)])
def two(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    if request.param == "forked":
        return forked.returned(processes.cases, folder, world=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, "--main_process_port", str(port), str(SCRIPT), str(folder)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return processes.cases(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_one_process_with_the_joint_batch(one, two, name):
    assert differs(one[name]["start"], one[name]["weights"])
    for rank in range(2):
        weights = two[rank][name]["weights"]
        assert weights.keys() == one[name]["weights"].keys()
        assert any("running_var" in n for n in weights)
        for key, expected in one[name]["weights"].items():
            torch.testing.assert_close(weights[key], expected, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_processes_share_the_images_and_views_of_one(one, two, name):
    ours = [two[rank][name]["seen"] for rank in range(2)]
    assert not set(ours[0]) & set(ours[1])
    joint, size = [], 4
    for start in range(0, len(ours[0]), size):
        joint += ours[0][start : start + size] + ours[1][start : start + size]
    assert joint == one[name]["seen"]
    if name == "global batch":
        epochs = [{(i, pixels) for epoch, i, pixels in joint if epoch == e} for e in (0, 1)]
        assert not epochs[0] & epochs[1]
        assert [len(e) for e in epochs] == [32, 32]


def test_resumed_and_loaded_by_workers_is_the_same_run(one, two):
    for results in (one, *two):
        for name in ("resumed", "workers", "watched", "watched h"):
            for key, expected in results["global batch"]["weights"].items():
                assert torch.equal(results[name]["weights"][key], expected)
        for key, expected in results["multi-crop"]["weights"].items():
            assert torch.equal(results["multi-crop resumed"]["weights"][key], expected)
        assert results["resumed"]["seen"] == results["global batch"]["seen"][-len(results["resumed"]["seen"]) :]


def test_targets_are_those_of_one_process_also_after_a_resume(one, two):
    def found(results, name):
        log = [entry for entry in results[name]["log"] if "bottleneck_weight" in entry]
        (weight,) = (w for n, w in results[name]["weights"].items() if n.endswith("hidden.0.linear.weight"))
        return [(entry["bottleneck_weight"], entry["wasserstein_weight"]) for entry in log], weight.norm(dim=0) == 0

    weights, zeros = found(one, "targets")
    assert zeros.sum() == 8
    assert [len(set(own)) for own in zip(*weights)] == [4, 4]
    for results in (one, *two):
        for name, start in (("targets", 0), ("targets resumed", 3)):
            ours = found(results, name)
            assert ours[0][-1] == pytest.approx(weights[-1], rel=1e-9)
            assert torch.equal(ours[1], zeros)
            assert start == 0 or ours[0] == found(results, "targets")[0][-len(ours[0]) :]
        for key, expected in results["targets"]["weights"].items():
            assert torch.equal(results["targets resumed"]["weights"][key], expected)
    assert found(two[0], "targets")[0] == found(two[1], "targets")[0]


def test_skipped_images_are_those_of_one_process_also_after_a_resume(one, two):
    expected = one["skipped"]["skipped"]
    assert expected["count"] == 4
    assert [index for index, _ in expected["images"]] == [3, 8, 17, 29]
    for results in (one, *two):
        for name in ("skipped", "skipped resumed"):
            assert results[name]["skipped"] == expected
        for key, weights in results["skipped"]["weights"].items():
            assert torch.equal(results["skipped resumed"]["weights"][key], weights)
        assert [entry["skipped_images"] for entry in results["skipped"]["log"] if "loss" in entry][-1] == 4


def test_metrics_and_log_are_those_of_one_process(one, two):
    expected = one["global batch"]["log"]
    assert any("eval_knn_h" in entry for entry in expected)
    assert any("batch_rankme_z" in entry for entry in expected)
    for rank in range(2):
        log = two[rank]["global batch"]["log"]
        assert [entry.keys() for entry in log] == [entry.keys() for entry in expected]
        for entry, other in zip(log, expected):
            assert entry == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("name", ["watched", "watched h"])
def test_what_is_watched_is_that_of_one_process(one, two, name):
    expected = one[name]["history"]
    measured = {key for row in expected for key in row}
    assert "lambda_min" in measured
    assert name == "watched h" or {"rankme_z", "std_h", "positive_cosine_z", "update_ratio_head"} <= measured
    for rank in range(2):
        history = two[rank][name]["history"]
        assert [row.keys() for row in history] == [row.keys() for row in expected]
        for row, other in zip(history, expected):
            # h and z are measured in float32; bounds on errors are rounding where Lanczos ran to its end.
            errors = {n: pytest.approx(v, abs=1e-3) for n, v in other.items() if n.endswith("_error")}
            assert row == {n: pytest.approx(v, rel=1e-5, abs=1e-9) for n, v in other.items()} | errors


def test_all_processes_raise_the_same_alarm(one, two):
    expected = one["watched"]["alarm"]
    assert expected["metric"] == "std_z"
    for rank in range(2):
        alarm = two[rank]["watched"]["alarm"]
        assert (alarm["step"], alarm["cause"]) == (expected["step"], expected["cause"])
