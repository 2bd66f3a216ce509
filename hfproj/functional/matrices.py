"""Functions of matrices: eigenvalues, whitening, and the distance from orthonormal rows or columns.

Eigenvalues: LAPACK's float32 routine fails on some symmetric matrices with many equal eigenvalues, such as the
covariance of a collapsed batch, which is rounding alone; in float64 it finds them.

Whitening, after which rows have the identity as covariance. Cholesky: Σ = LLᵀ, rows (z − μ) L⁻ᵀ. ZCA: Σ = U diag(s) Uᵀ,
rows z U diag((s + ε)^−½) Uᵀ.

Orthogonality of W ``[out, fan_in]``: ‖W Wᵀ − I‖_F or ‖Wᵀ W − I‖_F. The two squares differ by a constant,
‖Wᵀ W − I‖_F² = ‖W Wᵀ − I‖_F² + fan_in − out, so that the Gram matrix of the shorter side serves both; its derivative
4 (W Wᵀ − I) W costs one product more.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.errors import UsageError, check_choice
from hfproj.functional.rows import at_least_float32, full_precision
from hfproj.typing import OneOf, Scalar

_Square = Float[Tensor, "*groups dim dim"]
SIDES = ("auto", "WWt", "WtW")
Side = OneOf["auto", "WWt", "WtW"]
_BLOCK = 512  # rows of a Gram block: large enough for full speed, small enough to skip most of the lower triangle


def eigh(matrix: _Square) -> tuple[Float[Tensor, "*groups dim"], _Square]:
    """Return eigenvalues in ascending order and eigenvectors as columns, in the matrix's type; NaN of one with NaN.

    Example:
        >>> eigh(torch.diag(torch.tensor([2.0, 1.0])))[0].tolist()
        [1.0, 2.0]
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        if not matrix.isfinite().all():
            return matrix.diagonal(dim1=-2, dim2=-1) * torch.nan, matrix * torch.nan
        values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype) + _nan_of(matrix), vectors.to(matrix.dtype)


def eigvalsh(matrix: _Square) -> Float[Tensor, "*groups dim"]:
    """Return eigenvalues in ascending order, in the matrix's type, NaN of one with NaN; differentiable also where some
    are equal.

    Example:
        >>> eigvalsh(torch.ones(2, 2)).round().tolist()
        [0.0, 2.0]
    """
    try:
        return torch.linalg.eigvalsh(matrix) + _nan_of(matrix)
    except torch.linalg.LinAlgError:
        if not matrix.isfinite().all():
            return matrix.diagonal(dim1=-2, dim2=-1) * torch.nan
        return torch.linalg.eigvalsh(matrix.double()).to(matrix.dtype)


def _nan_of(matrix: Tensor) -> Tensor:
    """Return 0, and NaN for a matrix with NaN or infinity, of which LAPACK finds finite eigenvalues at times."""
    return 0 * matrix.detach().abs().amax((-2, -1)).unsqueeze(-1)


def cholesky_whiten(z: Float[Tensor, "*groups rows dim"], *, eps: float = 0.0) -> Float[Tensor, "*groups rows dim"]:
    """Whiten the rows of each group by the Cholesky factor of (1 − ε)Σ + εI, with Σ over rows − 1; differentiable.

    Raises:
        UsageError: If the covariance of a group is singular within rounding.

    Example:
        >>> z = cholesky_whiten(torch.randn(32, 4))
        >>> torch.allclose(z.T @ z / 31, torch.eye(4), atol=1e-4)
        True
    """
    given = torch.finfo(z.dtype).eps
    z = at_least_float32(z)
    # At most the variance of the rounding of numbers narrower than z is computed in: of most rows, not of a far one.
    rounding = given**2 * z.detach().square().median(-2).values if given > torch.finfo(z.dtype).eps else None
    z = z - z.mean(-2, keepdim=True)
    z = z - z.mean(-2, keepdim=True)  # equal rows are zero then, not the rounding of their mean
    identity = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    with full_precision(z):
        first = _cholesky(_shrunk_covariance(z, identity, eps), z.shape, eps, rounding)
        z = torch.linalg.solve_triangular(first.mT, z, upper=True, left=False)
        # A covariance has the square of its rows' condition number, and digits are lost in it. Whitened once more, from
        # next to the identity, z has them back: Σ = L₁L₂(L₁L₂)ᵀ.
        if eps:
            identity = torch.linalg.solve_triangular(first, identity, upper=False)
            identity = identity @ identity.mT  # as the first map has left it
        second = _cholesky(_shrunk_covariance(z, identity, eps), z.shape, eps)
        return torch.linalg.solve_triangular(second.mT, z, upper=True, left=False)


def _shrunk_covariance(z: Tensor, identity: Tensor, eps: float) -> Tensor:
    covariance = z.mT @ z / (z.shape[-2] - 1)
    return (1 - eps) * covariance + eps * identity if eps else covariance


def _cholesky(covariance: Tensor, shape: torch.Size, eps: float, given: Tensor | None = None) -> Tensor:
    """Return L of the covariance of centred rows of `shape` with ε of the identity in it; refuse a singular one."""
    rows, dim = shape[-2:]
    factor, failed = torch.linalg.cholesky_ex(covariance)
    too_few = not eps and rows <= dim  # n centred rows span n − 1 dimensions at most
    # A pivot is what a column has left after the columns before it: nothing but rounding, if it is as small as that.
    pivots, variances = (m.detach().diagonal(dim1=-2, dim2=-1) for m in (factor, covariance))
    rounding = dim * torch.finfo(covariance.dtype).eps * variances
    rounding = rounding if given is None or eps else torch.maximum(rounding, given)
    if too_few or (failed.bool() | (pivots.square() <= rounding).any(-1)).any():
        raise UsageError(
            f"Whitening needs a covariance of full rank, and that of {rows} rows in {dim} dimensions is singular: the "
            "projections have collapsed, or there are too few rows. Take larger sub-batches (w_size, at least twice "
            "out_dim), a smaller out_dim, or eps=1e-3, which mixes in the identity."
        )
    return factor


def zca_matrix(covariance: _Square, *, eps: float) -> _Square:
    """Return U diag((s + ε)^−½) Uᵀ for covariances U diag(s) Uᵀ, without a gradient.

    Example:
        >>> zca_matrix(torch.diag(torch.tensor([4.0, 1.0])), eps=0.0).diagonal().tolist()
        [0.5, 1.0]
    """
    with torch.no_grad():
        values, vectors = eigh(covariance)
        scale = (values.clamp_min(0) + eps).rsqrt()  # rounding makes zero eigenvalues negative
        with full_precision(covariance):
            return (vectors * scale.unsqueeze(-2)) @ vectors.mT


def orthogonality_gap(weight: Float[Tensor, "out fan_in"], *, side: Side = "auto", squared: bool = True) -> Scalar:
    """Return ‖W Wᵀ − I‖_F² or ‖Wᵀ W − I‖_F², or without ``squared`` its root, whose gradient at 0 is 0.

    Args:
        weight: W.
        side: ``"WWt"``, ``"WtW"`` (else a UsageError), or ``"auto"`` for the shorter side, whose minimum is 0. The
            other side's square can't fall below |out − fan_in|.
        squared: Whether to return the square.

    Example:
        >>> orthogonality_gap(torch.eye(4, 3)).item(), orthogonality_gap(torch.eye(4, 3), side="WWt").item()
        (0.0, 1.0)
    """
    check_choice("side", side, SIDES)
    out, fan_in = weight.shape
    short = weight if out <= fan_in else weight.mT
    with full_precision(weight):
        residual = _GramMinusIdentity.apply(at_least_float32(short))
        constant = 0 if side == "auto" else (out if side == "WWt" else fan_in) - len(short)
        if squared:
            return residual.square().sum() + constant
        if constant:
            return (residual.square().sum() + constant).sqrt()
        return torch.linalg.vector_norm(residual)


class _GramMinusIdentity(torch.autograd.Function):
    """A Aᵀ − I. Symmetric: only the upper blocks are multiplied, and the backward needs one product instead of two."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        gram = a.new_empty(len(a), len(a))
        for start in range(0, len(a), _BLOCK):
            stop = start + _BLOCK
            gram[start:stop, start:] = a[start:stop] @ a[start:].mT
            gram[stop:, start:stop] = gram[start:stop, stop:].mT
        gram.diagonal().sub_(1)
        return gram

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return (grad + grad.mT) @ a
