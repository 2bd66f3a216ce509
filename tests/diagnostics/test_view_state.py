"""Streams of views give what all samples at once give; over processes: tests/distributed/diagnostics.py."""

import warnings

import pytest
import torch
from diagnostics.features import KINDS, normal

from hfproj.diagnostics import ViewState, alignment, lidar_of_views, positive_cosine
from hfproj.errors import UsageError

ODD = (1, 7, 2, 50, 3, 29)


def views_of(kind, samples=120, dim=10, views=3):
    """Views that differ from a kind of features by noise of a fifth of their size."""
    f = KINDS[kind](samples, dim)
    noise = torch.stack([normal(len(f), dim, seed=view + 9) for view in range(views)])
    return f + 0.2 * f.std() * noise


def streamed(z, sizes=ODD, **options):
    state, start = ViewState(**options), 0
    while start < z.shape[1]:
        for size in sizes:
            state.update(z[:, start : start + size])
            start += size
    return state


@pytest.mark.parametrize("sizes", [ODD, (1000,)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_what_all_samples_at_once_give(kind, sizes):
    z = views_of(kind)
    for state in (streamed(z, sizes), streamed(z[:, :2]) + streamed(z[:, 2:]) + ViewState()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one kind has few samples
            assert state.lidar() == pytest.approx(lidar_of_views(z), rel=1e-10)
            assert state.lidar(ridge=1.0) == pytest.approx(lidar_of_views(z, ridge=1.0), rel=1e-10)
        assert state.positive_cosine() == pytest.approx(positive_cosine(z), rel=1e-10)
        assert state.alignment() == pytest.approx(alignment(z), rel=1e-10)
    assert streamed(z, alpha=1.0).alignment() == pytest.approx(alignment(z, alpha=1.0), rel=1e-10)


def test_collapsed_views():
    z = normal(1, 6).expand(2, 40, 6)
    state = streamed(z)
    assert (state.lidar(), state.alignment()) == (0, 0)
    assert state.positive_cosine() == pytest.approx(1)


def test_saving_loading_and_copies():
    z = views_of("decaying")
    first, second = streamed(z[:, :50]), ViewState()
    assert ViewState().update(z[:, :0]).count == 0
    second.load_state_dict(ViewState().state_dict())
    second.load_state_dict(first.state_dict())
    total = first + streamed(z[:, 50:])
    assert (first.count, total.count) == (50, 120)
    second.update(z[:, 50:])
    for name in ("lidar", "alignment", "positive_cosine"):
        assert getattr(second, name)() == pytest.approx(getattr(total, name)(), rel=1e-12)
    assert first.reduce().update(z).count == 170
    assert first.count == 50
    assert ViewState().reduce().count == 0
    assert repr(total) == "ViewState(count=120, alpha=2.0)"


def test_rows_that_are_not_finite_are_numbered_over_the_stream():
    state = streamed(views_of("decaying"))
    bad = views_of("decaying")[:, :10].clone()
    bad[1, 4, 0] = torch.nan
    with pytest.raises(UsageError, match=r"features of view 1 .* row 124 of the stream"):
        state.update(bad)
    assert state.count == 120


def test_refusals():
    z = views_of("decaying")
    state = streamed(z)
    with pytest.raises(UsageError, match="3 views of 10 dimensions, as this state holds, got 2 of 10"):
        state.update(z[:2])
    with pytest.raises(UsageError, match="3 views of 10 dimensions, as this state holds, got 3 of 9"):
        state.merge(streamed(z[:, :, :9]))
    with pytest.raises(UsageError, match=r"alpha 2\.0 and 1\.0"):
        state.merge(ViewState(alpha=1.0))
    with pytest.raises(UsageError, match="two views"):
        state.update(z[:1])
    with pytest.raises(UsageError, match="at least 2 samples, this state holds 1"):
        ViewState().update(z[:, :1]).alignment()
    with pytest.raises(UsageError, match=r"alpha=1\.0, this one 2\.0"):
        state.load_state_dict(ViewState(alpha=1.0).state_dict())
    with pytest.raises(UsageError, match="got the entries"):
        state.load_state_dict({})
    with pytest.raises(UsageError, match="exponent"):
        ViewState(alpha=-1.0)
    with pytest.raises(UsageError, match="positive ridge"):
        state.lidar(ridge=-1.0)
