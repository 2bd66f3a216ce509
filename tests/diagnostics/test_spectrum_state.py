"""Streams give what all rows at once give; over processes: tests/distributed/diagnostics.py."""

import copy
import re

import pytest
import torch
from diagnostics.features import KINDS, MEASURES, decaying, difference, disagreements, normal

from hfproj import diagnostics
from hfproj.diagnostics import SpectrumState, rankme, singular_values
from hfproj.errors import UsageError

ODD = (1, 7, 2, 50, 3, 60, 29, 1, 13)


def streamed(f, sizes=ODD, **options):
    state, start = SpectrumState(**options), 0
    while start < len(f):
        for size in sizes:
            state.update(f[start : start + size])
            start += size
    return state


@pytest.mark.parametrize("sizes", [ODD, (5,), (1000,)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_what_all_rows_at_once_give(kind, sizes):
    f = KINDS[kind](301, 24)
    states = {normalize: streamed(f, sizes, normalize=normalize) for normalize in (False, True)}
    assert not (wrong := disagreements(f, states)), wrong


@pytest.mark.parametrize("kind", KINDS)
def test_merged_states_give_what_all_rows_at_once_give(kind):
    f = KINDS[kind](301, 24)
    states = {}
    for normalize in (False, True):
        parts = [streamed(part, normalize=normalize) for part in (f[:1], f[1:2], f[2:200], f[200:])]
        states[normalize] = (parts[3] + parts[0]) + (parts[1] + SpectrumState(normalize=normalize)) + parts[2]
    assert not (wrong := disagreements(f, states)), wrong


@pytest.mark.parametrize("kind", KINDS)
def test_singular_values_are_those_of_an_svd(kind):
    f = KINDS[kind](301, 24)
    for center in (False, True):
        expected = torch.linalg.svdvals(f - f.mean(0) if center else f)
        found = streamed(f).singular_values(center=center)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * max(f.norm().item(), 1))


def test_small_singular_values_survive_a_stream():
    """Sixteen orders of magnitude in the squares: a Gram matrix would have lost the last ones."""
    left = torch.linalg.qr(normal(500, 9)).Q
    f = left * torch.logspace(0, -10, 9, dtype=torch.float64) @ torch.linalg.qr(normal(9, 9, seed=1)).Q
    found = streamed(f).singular_values()
    torch.testing.assert_close(found, torch.logspace(0, -10, 9, dtype=torch.float64), rtol=1e-5, atol=0)
    assert streamed(f).numerical_rank() == 7
    assert streamed(f).numerical_rank(tol=1e-11) == 9


def test_an_offset_costs_no_digits():
    f = decaying(400, 12, 0.5)
    far = f + 2.0**30  # exact: the spread is rounded to 2e-7 of itself by this sum, not by the state
    exact = far - 2.0**30
    assert difference(streamed(far).singular_values(center=True), singular_values(exact, center=True)) < 1e-12
    assert torch.equal((streamed(far).mean() - 2.0**30).round(decimals=6), exact.mean(0).round(decimals=6))


def test_the_state_stays_small():
    f = normal(2000, 8)
    state = streamed(f)
    assert (state.count, state.dim) == (2000, 8)
    sizes = {name: tensor.numel() for name, tensor in state.state_dict().items()}
    assert sizes == {"count": 1, "normalize": 1, "eps": 1, "origin": 8, "offset": 8, "factor": 64}
    assert repr(state) == "SpectrumState(count=2000, dim=8, normalize=False)"


def test_read_outs_between_updates_and_later_writes_to_the_rows():
    f = normal(60, 30)
    rows, state = f.clone(), SpectrumState()
    for part in rows.split(7):
        state.update(part)
        part.fill_(torch.nan)  # a trainer may reuse its buffer
        if state.count > 20:
            assert state.rankme() == pytest.approx(rankme(f[: state.count]), rel=1e-10)


def test_any_floating_type_without_a_gradient():
    f = torch.randn(50, 6, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        state = streamed(f.to(dtype))
        assert not state.covariance().requires_grad
        assert state.rankme() == pytest.approx(rankme(f.to(dtype)), rel=1e-10)
    assert state.update(torch.empty(0, 6)).count == 50
    with torch.autocast("cpu", torch.bfloat16):
        assert streamed(f).rankme() == pytest.approx(rankme(f), rel=1e-10)


def test_a_copy_and_a_sum_leave_their_parts_alone():
    f = normal(40, 5)
    a, b = streamed(f[:10]), streamed(f[10:])
    total, twin = a + b, copy.deepcopy(a)
    total.update(f)
    twin.update(f)
    assert (a.count, b.count, total.count, twin.count) == (10, 30, 80, 50)
    assert a.rankme() == pytest.approx(rankme(f[:10]), rel=1e-10)


@pytest.mark.parametrize("rows", [0, 3, 100])
def test_saving_and_loading_goes_on_where_it_was(rows):
    f = normal(150, 6)
    first = streamed(f[:rows], normalize=True)
    second = SpectrumState(normalize=True)
    second.update(normal(9, 4)).load_state_dict(first.state_dict())
    assert second.count == rows
    whole = streamed(f, normalize=True)
    assert difference(second.update(f[rows:]).singular_values(), whole.singular_values()) < 1e-13


def test_reduce_on_one_process_is_a_copy():
    state = streamed(normal(20, 4))
    joint = state.reduce()
    joint.update(normal(5, 4))
    assert (state.count, joint.count) == (20, 25)
    assert SpectrumState().reduce().count == 0


def test_every_read_out_has_a_function_of_its_name():
    own = {"update", "merge", "reduce", "state_dict", "load_state_dict", "mean", "covariance", "count", "dim"}
    names = {name for name in vars(SpectrumState) if not name.startswith("_")} - own
    assert names <= set(diagnostics.__all__)
    assert names == {re.split(r"[, ]", measure)[0] for measure in MEASURES} - {"mean"}  # and is compared with it


def test_rows_that_are_not_finite_are_numbered_over_the_stream():
    state = streamed(normal(33, 4))
    bad = normal(10, 4)
    bad[2, 0], bad[7, 3] = torch.nan, -torch.inf
    with pytest.raises(UsageError, match=r"2 of 10 rows .* rows 35, 40 of the stream"):
        state.update(bad)
    assert state.count == 33  # as before
    assert state.update(normal(1, 4)).count == 34


def test_refusals():
    state = streamed(normal(9, 4))
    with pytest.raises(UsageError, match="4 dimensions, as this state holds, got 3"):
        state.update(normal(9, 3))
    with pytest.raises(UsageError, match="4 and 3 dimensions"):
        state.merge(streamed(normal(9, 3)))
    with pytest.raises(UsageError, match="One of these states normalises"):
        state.merge(SpectrumState(normalize=True))
    with pytest.raises(UsageError, match="at least 2 rows, this state holds 1"):
        SpectrumState().update(normal(1, 4)).rankme()
    with pytest.raises(UsageError, match="holds 0"):
        SpectrumState().mean()
    for name in ("representation_std", "wasserstein_uniformity", "matrix_entropy", "self_cluster"):
        with pytest.raises(UsageError, match=rf"{name} is of unit rows; .*normalize=True"):
            getattr(state, name)()
    with pytest.raises(UsageError, match="normalize=True, this one False"):
        state.load_state_dict(SpectrumState(normalize=True).state_dict())
    with pytest.raises(UsageError, match=r"got the entries \['count'\]"):
        state.load_state_dict({"count": torch.tensor(1)})
    with pytest.raises(UsageError, match="only 4 above rounding"):
        state.alpha_req()
    with pytest.raises(TypeError):
        state + 1
