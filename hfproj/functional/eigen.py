"""Eigenvalues of symmetric matrices that always come.

LAPACK's float32 routine gives up on some matrices with many equal eigenvalues, such as the covariance of a collapsed
batch, which is rounding alone; in float64 it finds them.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def eigh(
    matrix: Float[Tensor, "*groups dim dim"],
) -> tuple[Float[Tensor, "*groups dim"], Float[Tensor, "*groups dim dim"]]:
    """Return eigenvalues in ascending order and eigenvectors as columns, in the matrix's type.

    Example:
        >>> eigh(torch.diag(torch.tensor([2.0, 1.0])))[0].tolist()
        [1.0, 2.0]
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = (found.to(matrix.dtype) for found in torch.linalg.eigh(matrix.double()))
    return values, vectors


def eigvalsh(matrix: Float[Tensor, "*groups dim dim"]) -> Float[Tensor, "*groups dim"]:
    """Return eigenvalues in ascending order, in the matrix's type; differentiable also where some are equal.

    Example:
        >>> eigvalsh(torch.ones(2, 2)).round().tolist()
        [0.0, 2.0]
    """
    try:
        return torch.linalg.eigvalsh(matrix)
    except torch.linalg.LinAlgError:
        return torch.linalg.eigvalsh(matrix.double()).to(matrix.dtype)
