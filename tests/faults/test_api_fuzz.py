"""Public calls with one wrong argument work or end in an HfprojError; a seeded share here, all of them with -m long."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import forked
import long
import pytest
import torch
from cases import assert_refused
from small import head_model

import hfproj
from hfproj.checking import check_fields, checked, refused_as
from hfproj.training.setup import check_options


def run(**options):
    """Run the fuzz in a process of its own: the type checker of the tests would see the arguments first."""
    (found,) = forked.returned(_stage, options, timeout=3600)
    assert not found["failures"]
    return found["tried"]


def _stage(options):
    return long.run_stage("API fuzz", **options)


def in_own_process(script, *arguments):
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_share_of_all_calls():
    assert run(count=100, seed=7) == 100


@pytest.mark.long
def test_all_calls():
    assert run() > 10_000


@checked
def call(x: torch.Tensor, *, n: int = 1, rate: float | None = None, names: tuple[str, ...] = ()) -> int:
    if n == 7:
        raise hfproj.UsageError("seven is taken")
    assert x.sum() + n**2 + (rate or 0.0) + len("".join(names)) is not None
    return n + (n > 8) // (n != 9)


def test_a_checked_call_names_argument_type_and_value():
    assert call(torch.ones(2), n=3, rate=1, names=["a"]) == 3
    assert_refused(lambda: call([1]), "Expected x of call to be a Tensor, got [1] of type list.")
    assert_refused(lambda: call(torch.ones(2), n="2"), "n of call", "a whole number", "'2' of type str")
    assert_refused(lambda: call(torch.ones(2), rate="0.1"), "a number or None")
    assert_refused(lambda: call(torch.ones(2), names=("a", 3)), "names of call")
    assert_refused(lambda: call(torch.ones(2), n=10**20), "64 bits")
    assert_refused(lambda: call(torch.ones(2), rate=float("nan")), "rate of call", "NaN")
    assert_refused(lambda: call([1], n=7), "seven is taken")  # the function's own refusals come first
    assert call(torch.ones(2), n=2.5) == 2.5  # it works
    with pytest.raises(ZeroDivisionError):  # not of a wrong type: a mistake of the function's own
        call(torch.ones(2), n=9)
    with pytest.raises(TypeError, match="unexpected keyword argument 'm'"):
        call(torch.ones(2), m=3)


@dataclasses.dataclass
class Settings:
    steps: int = 1
    rate: float = None  # of another type than it says
    options: dict | None = None


def test_fields_hold_what_they_say():
    check = functools.partial(check_fields, "the settings", Settings)
    check(Settings(), leave=())
    check(Settings(steps="1"), leave=("steps",))
    check(Settings(steps=3, rate=1, options=Settings()))  # a dataclass may stand for a dict
    assert_refused(lambda: check(Settings(steps="1")), "steps of the settings", "a whole number", "'1' of type str")
    assert_refused(lambda: check(Settings(rate=math.nan)), "rate of the settings", "NaN")
    assert_refused(lambda: check(Settings(options=3)), "a dict or None")


@pytest.mark.long
def test_wrong_arguments_are_named_before_anything_is_done():
    found = in_own_process(Path(__file__).with_name("named_errors.py"))
    assert not found["failures"]
    assert found["tried"] > 40


def test_numbers_of_a_history_have_64_bits(tmp_path):
    write = hfproj.results.write_history
    for row in ({"step": 10**30}, {"step": 1, "seed": -(2**63)}, {"step": 1, "loss": 10**400}, {"step": 1e30}):
        assert_refused(lambda row=row: write([row], tmp_path), "64 bits")
    rows = [{"step": 2**63 - 1, "loss": 1e308}]
    assert hfproj.results.read_history(write(rows, tmp_path)) == rows


def test_the_trainer_names_callbacks_and_optimizers(tmp_path):
    args = hfproj.ProjectionTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    check = functools.partial(check_options, head_model(), args, {})  # the trainer's own types are checked by the tests
    check([hfproj.SpectrumCallback(), hfproj.CollapseCallback], (None, None))
    assert_refused(lambda: check(["spectrum"], (None, None)), "callbacks", "hfproj.SpectrumCallback()")
    assert_refused(lambda: check(None, torch.optim.SGD), "optimizers", "SGD")
    assert_refused(lambda: hfproj.extract_features(head_model(), [1], device="gpu"), "device", "'cpu', 'cuda'", "'gpu'")
    assert_refused(lambda: hfproj.extract_features(head_model(), [{}], num_workers=-1), "num_workers", "-1")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), FileNotFoundError("gone"), KeyboardInterrupt()])
def test_what_is_no_refusal_keeps_its_own_error(error):
    with pytest.raises(type(error)) as caught, refused_as("The arguments are refused"):
        raise error
    assert caught.value is error
