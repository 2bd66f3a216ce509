"""One run in a folder, rotation by step, signals, and the place in the data when the batch or the data is another."""

import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import time

import forked
import pytest
import runs
import torch
from small import images
from transformers import TrainerCallback

import hfproj
from hfproj.saving import locks
from hfproj.saving.folders import checkpoints, rotate
from hfproj.saving.position import Course
from hfproj.saving.signals import StopSignals


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return runs.train(folder, resume=None), folder


def same(run, expected):
    tensors = runs.weights(run)
    return all(torch.equal(tensors[n], t) for n, t in runs.weights(expected).items())


def log(run):
    """Return what was measured, without times and what is summed over one call of train."""
    left = ("runtime", "second", "train_loss", "total_flos")
    return [{n: v for n, v in row.items() if not any(part in n for part in left)} for row in run.state.log_history]


# --- the lock ---


def test_a_second_run_is_refused_and_named(tmp_path):
    with locks.locked(tmp_path), pytest.raises(hfproj.UsageError) as caught:
        runs.train(tmp_path, max_steps=2)
    assert f"Another run writes into {tmp_path}: process {os.getpid()} on " in str(caught.value)
    assert "give this run another output_dir" in str(caught.value)
    runs.train(tmp_path, max_steps=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]  # lock and hidden folders are gone


def locked_until_killed(folder):
    with locks.locked(folder):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_lock_dies_with_its_process_and_not_with_workers_of_it(tmp_path):
    codes = forked.wait(forked.start(locked_until_killed, tmp_path, log=tmp_path / "log"))
    assert codes == [-signal.SIGKILL]
    assert (tmp_path / locks.LOCK).exists()
    start = time.monotonic()
    with locks.locked(tmp_path):
        assert time.monotonic() - start < 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, caplog, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locks.locked(tmp_path), locks.locked(tmp_path / "b"):
        pass
    assert [
        f"The file system of {folder} has no locks" in m
        for folder, m in zip([tmp_path, tmp_path / "b"], caplog.messages)
    ]
    assert len(caplog.messages) == 2


# --- rotation ---


def folders_of(tmp_path, *steps):
    for i, step in enumerate(steps):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        os.utime(folder, (1e9 - i, 1e9 - i))  # a clock that runs backwards


@pytest.mark.parametrize(
    ("limit", "keep", "broken", "left"),
    [
        (2, {"checkpoint-12"}, (), [8, 12]),
        (1, {"checkpoint-12"}, (), [12]),
        (2, {"checkpoint-12", "checkpoint-2"}, (), [2, 12]),
        (1, {"checkpoint-12", "checkpoint-2"}, (), [2, 12]),
        (1, {"checkpoint-2"}, (), [2, 12]),  # a fresh run beside an older, longer one
        (1, {"checkpoint-12"}, (12,), [8, 12]),
        (None, {"checkpoint-12"}, (), [2, 4, 8, 12]),
    ],
)
def test_rotation_goes_by_step(tmp_path, monkeypatch, limit, keep, broken, left):
    folders_of(tmp_path, 2, 4, 8, 12)
    monkeypatch.setattr(
        "hfproj.saving.folders.flaw", lambda path, digests: "…" if int(path.name[11:]) in broken else None
    )
    rotate(tmp_path, limit, keep)
    assert sorted(checkpoints(tmp_path)) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_a_run_keeps_the_newest_and_the_best(tmp_path):
    """Where the clock was set back, and where transformers would drop the newest when it loads the best at the end."""
    run = runs.make(
        tmp_path, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="std_h", eval_strategy="steps",
        eval_steps=2, greater_is_better=False, eval_dataset=images(8),
    )  # fmt: skip
    run.train()
    best = int(run.state.best_model_checkpoint.rpartition("-")[2])
    assert sorted(checkpoints(tmp_path)) == sorted({best, 8})
    assert run.args.save_total_limit == 1
    assert os.path.samefile(run.state.best_model_checkpoint, tmp_path / f"checkpoint-{best}")


# --- signals ---


class Signal(TrainerCallback):
    """Sends a signal to this process in a step."""

    def __init__(self, at, number):
        self.at, self.number = at, number

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("at", "options"),
    [
        (3, {}),
        pytest.param(4, {}, marks=pytest.mark.long),  # where a checkpoint is written anyway
        pytest.param(8, {}, marks=pytest.mark.long),  # the last step
        pytest.param(6, {"eval_strategy": "epoch", "save_strategy": "epoch"}, marks=pytest.mark.long),
        pytest.param(6, {"eval_strategy": "epoch"}, marks=pytest.mark.long),
        pytest.param(5, {"save_strategy": "no"}, marks=pytest.mark.long),
        (4, {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "metric_for_best_model": "std_h"}),
    ],
)
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, at, options, caplog):
    number = signal.SIGTERM if at % 2 else signal.SIGUSR1
    if "eval_strategy" in options:
        options = {**options, "eval_dataset": images(8)}
    expected = runs.train(tmp_path / "whole", resume=None, **options)
    run = runs.make(tmp_path / "run", seed=7, **options)
    run.add_callback(Signal(at, number))
    with pytest.raises(SystemExit) as caught:
        run.train(resume_from_checkpoint="auto")
    assert caught.value.code == 75
    assert f"{signal.Signals(number).name}: the checkpoint of step {at} is written" in caplog.text
    assert max(checkpoints(tmp_path / "run")) == at
    assert signal.getsignal(number) == signal.SIG_DFL
    again = runs.train(tmp_path / "run", **options)
    assert same(again, expected)
    assert log(again) == log(expected)


def test_a_signal_without_an_optimizer_to_go_on_from(tmp_path, caplog):
    run = runs.make(tmp_path, save_only_model=True)
    run.add_callback(Signal(3, signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        run.train()
    assert caught.value.code == 128 + signal.SIGTERM
    assert "continue_from= goes on from its adapter" in caplog.text
    assert "'auto' goes on" not in caplog.text


def test_handlers_of_others_are_left_alone(tmp_path):
    got = []
    before = signal.signal(signal.SIGUSR1, lambda *args: got.append(args))
    try:
        run = runs.make(tmp_path, max_steps=2)
        run.add_callback(Signal(1, signal.SIGUSR1))
        run.train()
        assert len(got) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_workers_leave_signals_to_the_main_process(tmp_path):
    """A scheduler may send them to every process of a job; a worker that died of it would end the run."""
    loader = iter(runs.make(tmp_path, dataloader_num_workers=1).get_train_dataloader())
    next(loader)
    for worker in multiprocessing.active_children():
        for name in ("TERM", "USR1"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(loader)) == 5


def test_a_signal_when_all_is_done_is_said(caplog):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed(torch.device("cpu")) == "SIGTERM"
    assert "SIGTERM came when the training was over" in caplog.text


def test_transformers_own_way_is_refused(tmp_path):
    with pytest.raises(hfproj.UsageError, match="SIGTERM and SIGUSR1 end in a checkpoint anyway"):
        runs.make(tmp_path, enable_jit_checkpoint=True)


# --- the place in the data ---

BEFORE = Course(length=24, batch=4, images=4, steps=6, seed=0, shuffle=True)


@pytest.mark.parametrize(
    ("step", "change", "new"),
    [
        (4, {}, 4),
        (4, {"images": 8, "batch": 8, "steps": 3}, 2),
        (10, {"images": 8, "batch": 8, "steps": 3}, 5),
        (3, {"images": 2, "batch": 2, "steps": 12}, 6),
        (6, {"images": 5, "batch": 5, "steps": 4}, 4),
        (12, {"length": 40, "steps": 10}, 20),
        (6, {"seed": 1}, 6),
        (4, {"batch": 2}, 4),
        (3, {"images": 8, "batch": 8, "steps": 3}, "12 images into an epoch, in steps of 4; .* steps of 8 images"),
        (4, {"length": 40, "steps": 10}, "16 images into an epoch of 24 images .* 40 images"),
        (4, {"seed": 1}, "order of seed 0; this run's has 24 images in the order of seed 1"),
    ],
)
def test_steps_are_counted_in_images(step, change, new):
    own = Course(**{**vars(BEFORE), **change})
    if isinstance(new, int):
        assert own.at(step, BEFORE) == new
    else:
        with pytest.raises(hfproj.UsageError, match=new):
            own.at(step, BEFORE)


def test_another_batch_sees_every_image_once(tmp_path, whole, caplog):
    run, folder = whole
    resume = folder / "checkpoint-4"
    with pytest.raises(hfproj.UsageError, match=r"holds checkpoints of later steps \(8\).*another output_dir"):
        runs.train(folder, resume=resume, per_device_train_batch_size=8)
    with pytest.raises(hfproj.UsageError, match=r"skipped or seen twice.*× processes 4 "):
        runs.train(tmp_path / "a", resume=resume, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    again = runs.train(tmp_path / "b", resume=resume, per_device_train_batch_size=8, max_steps=-1, num_train_epochs=2)
    assert again.state.global_step == 6
    assert "step 4 is counted as 2" in caplog.text
    assert [i for e, i, _ in run.seen[:16] + again.seen if e == 0] == [i for e, i, _ in run.seen[:24]]
    assert len({i for e, i, _ in again.seen if e == 1}) == 24
    assert sorted(checkpoints(tmp_path / "b")) == [4, 6]
    rates = [row["learning_rate"] for row in again.state.log_history if "learning_rate" in row]
    assert rates[-3:] == sorted(rates[-3:], reverse=True)
    assert rates[-1] < 0.2 * rates[-3]  # the schedule ends where this run does
    small = runs.train(tmp_path / "c", resume=resume, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert [i for _, i, _ in small.seen] == [i for _, i, _ in run.seen[16:]]


def test_the_same_run_in_later_train_calls(tmp_path, whole):
    """Steps that were done are not done again; more epochs go on."""
    run = runs.train(tmp_path, resume=None, max_steps=4)
    longer = runs.train(tmp_path, max_steps=8, lr_scheduler_type="constant")
    assert [i for _, i, _ in run.seen + longer.seen] == [i for _, i, _ in whole[0].seen]


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.WARNING, "hfproj.training")
