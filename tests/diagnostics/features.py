"""Features that are hard to measure, and the table of measures that stream: direct, and from a state."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfproj import diagnostics as d
from hfproj.diagnostics import SpectrumState
from hfproj.errors import UsageError

TOLERANCE = 1e-10


def normal(rows, dim, seed=0):
    return torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decaying(rows, dim, power=1.0, seed=0):
    return normal(rows, dim, seed) * torch.arange(1, dim + 1, dtype=torch.float64) ** -power


def constant(rows, dim):
    return (1e3 * normal(1, dim)).expand(rows, dim).contiguous()


def heavy_tailed(rows, dim):
    return normal(rows, dim) / normal(rows, dim, seed=1)  # a quotient of normals is Cauchy


def rank_deficient(rows, dim):
    return normal(rows, 5) @ normal(5, dim, seed=1) + 10


def with_zero_rows(rows, dim):
    f = decaying(rows, dim, 0.5)
    f[:: max(1, rows // 4)] = 0
    return f


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "decaying": lambda rows, dim: decaying(rows, dim) + 3,
    "rank-deficient": rank_deficient,
    "fewer rows than dimensions": lambda rows, dim: normal(dim // 2, dim) + 1,
    "constant": constant,
    "heavy-tailed": heavy_tailed,
    "far from zero": lambda rows, dim: decaying(rows, dim, 0.5) + 1e5,
    "zero rows": with_zero_rows,
    "all zero": lambda rows, dim: torch.zeros(rows, dim, dtype=torch.float64),
}


class Measure(NamedTuple):
    """One number of features, on all rows at once and from a `SpectrumState(normalize=…)`."""

    normalize: bool
    direct: Callable[[Tensor], Any]
    streamed: Callable[[SpectrumState], Any]


def same_name(name, normalize=False, direct_options=None, **options):
    return Measure(
        normalize,
        lambda f: getattr(d, name)(f, **(direct_options or {}), **options),
        lambda state: getattr(state, name)(**options),
    )


MEASURES: dict[str, Measure] = {
    **{
        name: same_name(name)
        for name in (
            "singular_values",
            "rankme",
            "effective_rank",
            "stable_rank",
            "nesum",
            "participation_ratio",
            "numerical_rank",
            "pseudo_condition_number",
            "covariance_offdiag_energy",
            "correlation_offdiag_energy",
            "whiteness",
            "vicreg_covariance",
        )
    },
    **{
        f"{name}, centred": same_name(name, center=True)
        for name in ("singular_values", "effective_rank", "numerical_rank")
    },
    "effective_rank of eigenvalues": same_name("effective_rank", on="eigenvalues"),
    "effective_rank of eigenvalues, centred": same_name("effective_rank", on="eigenvalues", center=True),
    "participation_ratio, uncentred": same_name("participation_ratio", center=False),
    "alpha_req": same_name("alpha_req", fit_range=(2, 9)),
    "mean": Measure(False, lambda f: f.mean(0), lambda state: state.mean()),
    **{
        f"{name}{', unit rows' * normalize}": same_name(name, normalize, {"normalize": normalize})
        for name in ("covariance_spectrum", "covariance_condition_number")
        for normalize in (False, True)
    },
    "covariance_spectrum, uncentred": same_name("covariance_spectrum", True, {"normalize": True}, center=False),
    **{
        name: same_name(name, True)
        for name in ("representation_std", "wasserstein_uniformity", "matrix_entropy", "self_cluster")
    },
    **{f"matrix_entropy, alpha={alpha}": same_name("matrix_entropy", True, alpha=alpha) for alpha in (0.5, 1.0, 3.0)},
}


def numbers(read: Callable[[], Any]) -> Tensor:
    """Return what a measure says as one vector; nothing where it refuses the features."""
    try:
        value = read()
    except UsageError:
        return torch.empty(0, dtype=torch.float64)
    return torch.as_tensor(value, dtype=torch.float64).flatten()


def difference(value: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of vectors and to each of several numbers."""
    if value.shape != expected.shape:
        return math.inf
    if not value.numel() or torch.equal(value, expected):
        return 0.0
    scale = expected.abs() if len(expected) <= 4 else expected.abs().max()
    apart = (value - expected).abs()
    return torch.where(apart == 0, 0.0, apart / scale).nan_to_num(nan=0.0, posinf=math.inf).max().item()


def disagreements(f: Tensor, states: dict[bool, SpectrumState]) -> dict[str, float]:
    """Return measures → difference where a state is further from the direct value than the tolerance."""
    found = {}
    for name, measure in MEASURES.items():
        value = numbers(lambda: measure.streamed(states[measure.normalize]))
        apart = difference(value, numbers(lambda: measure.direct(f)))
        if not apart <= TOLERANCE:
            found[name] = apart
    return found
