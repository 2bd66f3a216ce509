"""Whitening: linear maps after which rows have the identity as covariance.

Cholesky: Σ = LLᵀ, rows (z − μ) L⁻ᵀ. ZCA: Σ = U diag(s) Uᵀ, rows z U diag((s + ε)^−½) Uᵀ.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.errors import UsageError
from hfproj.functional.eigen import eigh
from hfproj.functional.rows import full_precision


def cholesky_whiten(z: Float[Tensor, "*groups rows dim"], *, eps: float = 0.0) -> Float[Tensor, "*groups rows dim"]:
    """Whiten the rows of each group by the Cholesky factor of (1 − ε)Σ + εI, with Σ over rows − 1; differentiable.

    Args:
        z: Rows in any floating-point type; computed in float32 or better.
        eps: ε, from 0 to 1: how much of the identity is mixed in.

    Raises:
        UsageError: the covariance of a group is singular as far as the precision tells.

    Example:
        >>> z = cholesky_whiten(torch.randn(32, 4))
        >>> torch.allclose(z.T @ z / 31, torch.eye(4), atol=1e-4)
        True
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z = z - z.mean(-2, keepdim=True)
    z = z - z.mean(-2, keepdim=True)  # equal rows are zero then, not the rounding of their mean
    identity = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    with full_precision(z):
        first = _cholesky(_shrunk_covariance(z, identity, eps), z.shape, eps)
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


def _cholesky(covariance: Tensor, shape: torch.Size, eps: float) -> Tensor:
    """Return L of the covariance of centred rows of this shape, ε of the identity mixed in, unless it is singular."""
    rows, dim = shape[-2:]
    factor, failed = torch.linalg.cholesky_ex(covariance)
    too_few = not eps and rows <= dim  # n centred rows span n − 1 dimensions at most
    # A pivot is what a column has left after the columns before it: nothing but rounding, if it is as small as that.
    pivots, variances = (m.detach().diagonal(dim1=-2, dim2=-1) for m in (factor, covariance))
    rounding = dim * torch.finfo(covariance.dtype).eps * variances
    if too_few or (failed.bool() | (pivots.square() <= rounding).any(-1)).any():
        raise UsageError(
            f"Whitening needs a covariance of full rank, and that of {rows} rows in {dim} dimensions is singular: the "
            "projections have collapsed, or there are too few rows. Take larger sub-batches (w_size, at least twice "
            "out_dim), a smaller out_dim, or eps=1e-3, which mixes in the identity."
        )
    return factor


def zca_matrix(covariance: Float[Tensor, "*groups dim dim"], *, eps: float) -> Float[Tensor, "*groups dim dim"]:
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
