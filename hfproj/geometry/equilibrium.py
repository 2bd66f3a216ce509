"""A collapsed point that is an equilibrium in spite of a residual: the sharpest test of what a head does to collapse.

Where z has a direction that h cannot reach (out_dim > rank J), take a unit ρ_0 ∈ ker Jᵀ at h* and the target
t = g(h*) − α ρ_0 of L = ½‖z − t‖². Then

    ∇_z L = α ρ_0 ≠ 0,    but    ∇_h L = Jᵀ α ρ_0 = 0,    H_L = I,    G_L = JᵀJ.

Linear and ReLU heads have M = 0: with J of full column rank H_eff = JᵀJ is positive definite, and the gradient flow in
h goes back to h* at the rate λ_min, whatever α is. For a smooth activation M grows with α and changes its sign with
ρ_0: beyond some α, for at least one sign, λ_min(H_eff) < 0 and the flow leaves h* at the rate −λ_min.

References:
    Chaudhry 2026, The Geometry of Projection Heads, arXiv 2605.17180, section 4.

Deviations:
    The construction is ours: it makes the claim of the paper's abstract checkable.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.errors import UsageError
from hfproj.geometry._head import Map, as_input, frozen
from hfproj.geometry.pullback import jacobian
from hfproj.typing import Features


class Equilibrium(NamedTuple):
    """An equilibrium of the gradient flow in h with a residual in z, in float64.

    Attributes:
        h: Where it is.
        target: t.
        rho: ∇_z L = α ρ_0 at h.
        J: Jacobian of the head at h.
    """

    h: Float[Tensor, "rows in_dim"]
    target: Float[Tensor, "rows out_dim"]
    rho: Float[Tensor, "rows out_dim"]
    J: Float[Tensor, "rows out_dim in_dim"]

    def loss(self, z: Float[Tensor, "rows out_dim"]) -> Float[Tensor, " rows"]:
        """Return ½‖z − t‖² of each row."""
        return (z - self.target).square().sum(1) / 2


def constructed_equilibrium(
    head: Map, h: Features, *, alpha: float = 1.0, generator: torch.Generator | None = None
) -> Equilibrium:
    """Return a target with which every row of `h` is an equilibrium that has a residual of length |α|.

    Args:
        head: As for :func:`hfproj.geometry.jacobian`, with out_dim > in_dim as a rule.
        h: Where the equilibria shall be.
        alpha: α; a negative one turns ρ_0 round.
        generator: Draws ρ_0 in ker Jᵀ, on the CPU; None: seed 0, so that calls with another α have the same ρ_0.

    Raises:
        UsageError: as :func:`hfproj.geometry.jacobian`, α is 0, or ker Jᵀ is empty at a row.

    Example:
        >>> head = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 6))
        >>> found = constructed_equilibrium(head, torch.randn(1, 3), alpha=2.0)
        >>> gradient = found.J.mT @ found.rho.unsqueeze(2)
        >>> round(found.rho.norm().item(), 6), bool(gradient.norm() < 1e-12)
        (2.0, True)
    """
    if not alpha or not abs(alpha) < float("inf"):
        raise UsageError(f"alpha, the length of the residual, must be a finite number other than 0, got {alpha}.")
    J = jacobian(head, h)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    left, sigma, _ = torch.linalg.svd(J, full_matrices=True)
    tolerance = max(J.shape[1:]) * torch.finfo(J.dtype).eps * sigma[:, :1]
    rho = torch.empty_like(J[:, :, 0])
    for row, rank in enumerate((sigma > tolerance).sum(1).tolist()):
        free = J.shape[1] - rank
        if not free:
            raise UsageError(
                f"At row {row} the Jacobian {list(J.shape[1:])} reaches every direction of z: no residual is invisible "
                "to h. Use a head with out_dim > in_dim."
            )
        drawn = torch.randn(free, generator=generator, dtype=torch.float64).to(J.device)
        rho[row] = left[row, :, rank:] @ (drawn / drawn.norm())
    x = as_input(h, torch.float64)
    with frozen(head, torch.float64) as run:
        z = run(x).detach()
    return Equilibrium(x, z - alpha * rho, alpha * rho, J)
