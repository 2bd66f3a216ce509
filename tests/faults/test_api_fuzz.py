"""Public calls with one wrong argument work or end in an HfprojError; a seeded share here, all of them with -m long."""

import functools

import forked
import long
import pytest
import torch
from cases import assert_refused
from small import head_model

import hfproj
from hfproj.checking import checked
from hfproj.training.setup import check_options


def run(**options):
    """Run the fuzz in a process of its own: the type checker of the tests would see the arguments first."""
    (found,) = forked.returned(_stage, options, timeout=3600)
    assert not found["failures"]
    return found["tried"]


def _stage(options):
    return long.run_stage("API fuzz", **options)


def test_a_share_of_all_calls():
    assert run(count=200, seed=7) == 200


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


def test_the_trainer_names_callbacks_and_optimizers(tmp_path):
    args = hfproj.ProjectionTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    check = functools.partial(check_options, head_model(), args, {})  # the trainer's own types are checked by the tests
    check([hfproj.SpectrumCallback(), hfproj.CollapseCallback], (None, None))
    assert_refused(lambda: check(["spectrum"], (None, None)), "callbacks", "hfproj.SpectrumCallback()")
    assert_refused(lambda: check(None, torch.optim.SGD), "optimizers", "SGD")
    assert_refused(lambda: hfproj.extract_features(head_model(), [1], device="gpu"), "device", "'cpu', 'cuda'", "'gpu'")
    assert_refused(lambda: hfproj.extract_features(head_model(), [{}], num_workers=-1), "num_workers", "-1")
