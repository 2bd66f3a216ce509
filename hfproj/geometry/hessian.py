"""The loss seen from the representation: the effective Hessian of a head, and what makes a collapse unstable.

For L(g(h)) with z = g(h), ρ = ∇_z L, H_L = ∇²_z L and J = ∂z/∂h,

    H_eff = ∇²_h L(g(h)) = G_L + M,    G_L = Jᵀ H_L J,    M = Σ_i ρ_i ∇²_h z_i,    ∇_h L = Jᵀρ.

docs/geometry.md lists what holds at a collapsed h with ρ ≠ 0, and what does not.

`effective_hessian` computes H_eff exactly; the operators compute products with vectors, for large heads and for whole
models. There the gradient is computed once, with a graph that is kept, with the activations of one forward and one
backward pass, for as long as the operator lives; a product H v is then one backward pass through it, at little more
than the cost of a gradient (``recipes/benchmarks/geometry.py`` measures it). An operator is symmetric and stays that of
the point where it was made: changing the parameters in place afterwards is noticed and refused. Several batches are a
sum: ``lambda v: sum(o.matvec(v) for o in operators) / len(operators)``.

References:
    Chaudhry 2026, The Geometry of Projection Heads, arXiv 2605.17180, section 4; statements of the theorem are known to
    us from an independent reproduction (MachineLearning-Nerd/icml26-geometry-projection-heads-conditioning-invariance-
    collapse), the scope above is what we found to hold. Pearlmutter 1994, Fast exact multiplication by the Hessian.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.geometry._head import (
    Map,
    as_input,
    check_eval,
    check_loss,
    check_rowwise,
    describe,
    frozen,
    row_jacobian,
    tensors_of,
)  # fmt: skip
from hfproj.typing import Features

_NEGATIVE = 1e-10  # of the largest |λ|: round-off shows as negative eigenvalues otherwise, of ReLU heads above all
_MOST_COLUMNS = 4096

Loss = Callable[[Tensor], Tensor]


class EffectiveHessian(NamedTuple):
    """H_eff and its parts, in float64.

    For a loss per row, every field has the shape ``[rows, …]`` given; for one loss of all rows, `h` and `z` are
    flattened, and shapes are those with ``rows = 1``, width ``rows · in_dim`` and ``rows · out_dim``.

    Attributes:
        H_eff: G_L + M.
        G_L: Jᵀ H_L J, what the loss' own curvature gives.
        M: Σ ρ_i ∇²z_i, what the head's curvature gives.
        H_L, rho: Hessian and gradient of the loss in z.
        J: Jacobian of the head.
    """

    H_eff: Float[Tensor, "rows in_dim in_dim"]
    G_L: Float[Tensor, "rows in_dim in_dim"]
    M: Float[Tensor, "rows in_dim in_dim"]
    H_L: Float[Tensor, "rows out_dim out_dim"]
    rho: Float[Tensor, "rows out_dim"]
    J: Float[Tensor, "rows out_dim in_dim"]


class CollapseReport(NamedTuple):
    """Whether H_eff has directions of escape, and where they come from.

    Attributes:
        n_neg: Eigenvalues of H_eff below −1e-10 times the largest in magnitude.
        lambda_min, lambda_max: Smallest and largest eigenvalue of H_eff.
        n_neg_loss: The same count for G_L: where it is 0, negative eigenvalues of H_eff come from the head.
        norm_H_eff, norm_G_L, norm_M: Frobenius norms; that of M is 0 for linear and piecewise linear heads.
        norm_rho: ‖∇_z L‖, the residual.
        norm_gradient: ‖∇_h L‖, 0 at an equilibrium.
    """

    n_neg: Int[Tensor, " rows"]
    lambda_min: Float[Tensor, " rows"]
    lambda_max: Float[Tensor, " rows"]
    n_neg_loss: Int[Tensor, " rows"]
    norm_H_eff: Float[Tensor, " rows"]
    norm_G_L: Float[Tensor, " rows"]
    norm_M: Float[Tensor, " rows"]
    norm_rho: Float[Tensor, " rows"]
    norm_gradient: Float[Tensor, " rows"]


@checked
def effective_hessian(head: Map, loss_fn: Loss, h: Features) -> EffectiveHessian:
    """Return H_eff and its parts exactly, for heads that are small enough for in_dim² numbers a row.

    The cost is out_dim + in_dim backward passes. For large heads see :class:`EffectiveHessianOperator`.

    Args:
        head: Any module or function from `[rows, in_dim]` to `[rows, out_dim]` that treats rows one by one. It runs in
            eval mode and is left as it was.
        loss_fn: z `[rows, out_dim]` (float64) → the losses `[rows]`, one for each row from this row alone; or one
            number, the loss of all rows together. Twice differentiable.
        h: Representations `[rows, in_dim]`.

    Raises:
        UsageError: If head or h is refused (see the package), or the loss is not finite, has another shape or no second
            derivative, or losses per row depend on other rows.

    Example:
        >>> head = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
        >>> found = effective_hessian(head, lambda z: z.square().sum(1) / 2, torch.randn(3, 4))
        >>> found.H_eff.shape, bool((found.H_L == torch.eye(2)).all())
        (torch.Size([3, 4, 4]), True)
    """
    x = as_input(h, torch.float64).requires_grad_()
    with frozen(head, torch.float64) as run:
        check_rowwise(run, x)
        z = run(x)
        z_leaf = z.detach().requires_grad_()
        total, together = _total_loss(loss_fn, z_leaf)
        rho = _gradient(total, z_leaf)
        H_L = row_jacobian(rho.view(1, -1) if together else rho, z_leaf)
        rho = rho.detach()
        J = row_jacobian(z, x)
        M = row_jacobian(_gradient((rho * z).sum(), x), x)
    if together:
        H_L = H_L.transpose(0, 1).flatten(1).unsqueeze(0)
        J, M = (torch.block_diag(*blocks).unsqueeze(0) for blocks in (J, M))
        rho = rho.flatten().unsqueeze(0)
    H_L, M = (H_L + H_L.mT) / 2, (M + M.mT) / 2
    G_L = J.mT @ H_L @ J
    G_L = (G_L + G_L.mT) / 2
    return EffectiveHessian(G_L + M, G_L, M, H_L.detach(), rho, J)


@checked
def collapse_report(head: Map, loss_fn: Loss, h: Features) -> CollapseReport:
    """Return the signs and sizes of H_eff and its parts at each row of `h` (one row for a loss of all rows), exactly.

    `head` and `loss_fn` are those of :func:`effective_hessian`; a loss per row with a detached target separates the
    head's part from the loss'. For large heads take the extreme eigenvalues of :class:`EffectiveHessianOperator`.

    Raises:
        UsageError: If :func:`effective_hessian` raises it.

    Example:
        >>> head = torch.nn.Linear(4, 2)
        >>> report = collapse_report(head, lambda z: z.square().sum(1) / 2, torch.randn(3, 4))
        >>> report.n_neg.tolist(), report.norm_M.tolist()
        ([0, 0, 0], [0.0, 0.0, 0.0])
    """
    found = effective_hessian(head, loss_fn, h)
    values = torch.linalg.eigvalsh(found.H_eff)
    negative, negative_loss = count_negative(values), count_negative(torch.linalg.eigvalsh(found.G_L))
    norms = [torch.linalg.matrix_norm(part) for part in (found.H_eff, found.G_L, found.M)]
    gradient = (found.J.mT @ found.rho.unsqueeze(2)).squeeze(2)
    norms += [found.rho.norm(dim=1), gradient.norm(dim=1)]
    return CollapseReport(negative, values[:, 0], values[:, -1], negative_loss, *norms)


@checked
def count_negative(eigenvalues: Float[Tensor, "*rows dim"]) -> Int[Tensor, "*rows"]:
    """Return how many eigenvalues lie below −1e-10 times the largest in magnitude, which is more than rounding.

    Example:
        >>> count_negative(torch.tensor([-0.5, -1e-17, 1.0])).item()
        1
    """
    return (eigenvalues < -_NEGATIVE * eigenvalues.abs().amax(-1, keepdim=True)).sum(-1)


class _Operator:
    """A symmetric operator at a point that is given by tensors, which must not change in place afterwards."""

    dim: int
    loss: float
    gradient: Tensor

    def __init__(self, tensors: Iterable[Tensor]):
        self._point = [(tensor, tensor._version) for tensor in tensors]

    def _check_unchanged(self) -> None:
        if any(tensor._version != version for tensor, version in self._point):
            raise UsageError("The parameters changed after this operator was made; make one after each optimizer step.")

    def matvec(self, v: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        raise NotImplementedError

    def dense(self) -> Float[Tensor, "dim dim"]:
        """Return the operator as a matrix, column by column, symmetrised.

        Raises:
            UsageError: If it has more than 4096 columns.
        """
        if self.dim > _MOST_COLUMNS:
            raise UsageError(f"Expected at most {_MOST_COLUMNS} columns for a matrix, got {self.dim}; use matvec.")
        identity = torch.eye(self.dim, dtype=self.gradient.dtype, device=self.gradient.device)
        matrix = torch.stack([self.matvec(column) for column in identity])
        return (matrix + matrix.T) / 2


class HessianOperator(_Operator):
    """The Hessian of a loss in given tensors, such as the parameters of a head or of a PEFT model.

    Args:
        closure: () → the loss, one number, from the tensors; twice differentiable. Attention inside it runs by its
            plain formula, since the fused kernels have no second derivative.
        parameters: A module, for its trainable parameters; or the tensors.

    Attributes:
        dim: Number of entries of all tensors.
        loss: The loss.
        gradient: Its gradient `[dim]`.

    Raises:
        UsageError: If no parameter requires a gradient, a module has BatchNorm or Dropout in training mode, or the loss
            is not one finite number, does not depend on the parameters or has no second derivative.

    Example:
        >>> head, h = nn.Linear(4, 1, bias=False), torch.eye(4)
        >>> hessian = HessianOperator(lambda: head(h).square().sum(), head)
        >>> hessian.matvec(torch.tensor([1.0, 0.0, 0.0, 0.0])).tolist()
        [2.0, 0.0, 0.0, 0.0]
    """

    @checked
    def __init__(self, closure: Callable[[], Tensor], parameters: nn.Module | Iterable[Tensor]):
        if isinstance(parameters, nn.Module):
            check_eval(parameters)
            parameters = parameters.parameters()
        self._tensors = [tensor for tensor in tensors_of(parameters) if tensor.requires_grad]
        if not self._tensors:
            raise UsageError("Expected parameters that require a gradient, got none: is everything frozen?")
        self.dim = sum(tensor.numel() for tensor in self._tensors)
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = _check_finite(check_loss(closure(), "the tensors that the Hessian is asked in"))
            self._gradients = torch.autograd.grad(loss, self._tensors, create_graph=True, materialize_grads=True)
        self.loss = float(loss.detach())
        self.gradient = _flat([gradient.detach() for gradient in self._gradients])
        super().__init__(self._tensors)

    def matvec(self, v: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return H v, in the dtype and on the device of `v`.

        Raises:
            UsageError: If v has another length, or the parameters were changed after the operator was made.
        """
        self._check_unchanged()
        return _product(self._gradients, self._tensors, v, self.dim)


class EffectiveHessianOperator(_Operator):
    """H_eff = G_L + M of a loss behind a head, and both parts, by their products with vectors.

    Args:
        head: Any module or function from `[rows, in_dim]` to `[rows, out_dim]`. It runs in eval mode and is left as it
            was.
        loss_fn: z `[rows, out_dim]` → one number, the loss of all rows; or the losses `[rows]`, whose sum is taken, so
            that H_eff is block-diagonal with the rows' own.
        h: Representations `[rows, in_dim]`. The Hessian is that in all their entries.
        dtype: Type of the computation.

    Attributes:
        dim: ``rows · in_dim``. Vectors are `h` flattened.
        loss: The loss.
        gradient: ∇_h L = Jᵀρ, flattened.

    Raises:
        UsageError: If :func:`effective_hessian` raises it.

    Example:
        >>> from hfproj.geometry import extreme_eigenvalues
        >>> _ = torch.manual_seed(0)
        >>> head = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> target = head(torch.zeros(1, 4)).detach() - 5  # far away: M outweighs G_L in some direction
        >>> hessian = EffectiveHessianOperator(head, lambda z: (z - target).square().sum() / 2, torch.ones(1, 4))
        >>> v = torch.randn(hessian.dim, dtype=torch.float64)
        >>> torch.allclose(hessian.matvec(v), hessian.G_L(v) + hessian.M(v))
        True
        >>> extreme_eigenvalues(hessian.matvec, hessian.dim).min < 0
        True
    """

    @checked
    def __init__(self, head: Map, loss_fn: Loss, h: Features, *, dtype: torch.dtype = torch.float64):
        self._h = h = as_input(h, dtype).requires_grad_()
        self.dim = h.numel()
        with frozen(head, dtype) as run, sdpa_kernel(SDPBackend.MATH):
            self._z = z = run(h)
            self._z_leaf = z_leaf = z.detach().requires_grad_()
            loss = loss_fn(z_leaf)
            if isinstance(loss, Tensor) and loss.shape == (len(h),):
                loss = loss.sum()
            _check_finite(check_loss(loss, "z"))
            self._rho = _gradient(loss, z_leaf)
            self._curved = _gradient((self._rho.detach() * z).sum(), h)
            self._u = torch.zeros_like(z, requires_grad=True)
            self._pulled = _gradient((self._u * z).sum(), h)
        super().__init__(head.parameters() if isinstance(head, nn.Module) else ())
        self.loss = float(loss.detach())
        self.gradient = self._curved.detach().flatten()

    def matvec(self, v: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return H_eff v.

        Raises:
            UsageError: If v has another length, or the parameters were changed after the operator was made.
        """
        return self.G_L(v) + self.M(v)

    def G_L(self, v: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return G_L v = Jᵀ H_L J v; raises as `matvec`."""
        self._check_unchanged()
        pushed = _product([self._pulled], [self._u], v, self.dim)  # J v: Jᵀu is linear in u, and its transpose is J
        curved = _product([self._rho], [self._z_leaf], pushed, self._z.numel())
        return _product([self._z], [self._h], curved, self._z.numel())

    def M(self, v: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return M v = Σ ρ_i ∇²z_i v; exactly 0 for linear and piecewise linear heads. Raises as `matvec`."""
        self._check_unchanged()
        return _product([self._curved], [self._h], v, self.dim)


def _total_loss(loss_fn: Loss, z: Tensor) -> tuple[Tensor, bool]:
    """Return the loss as one number, and whether it is one loss of all rows."""
    loss = loss_fn(z)
    if not isinstance(loss, Tensor) or loss.shape not in (torch.Size([]), torch.Size([len(z)])):
        raise UsageError(f"Expected one number of loss_fn, or one for each of the {len(z)} rows, got {describe(loss)}.")
    if not torch.isfinite(loss).all():
        raise UsageError("The loss is NaN or infinite at this z.")
    if loss.ndim == 0:
        return loss, True
    # Losses of rows are apart if a weight of a row's loss is a weight of the row's gradient.
    weights = torch.linspace(1, 2, len(z), dtype=z.dtype, device=z.device)
    total = loss.sum()
    if loss.requires_grad:
        one, weighted = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (total, (weights * loss).sum()))
        if not torch.allclose(weighted, weights.unsqueeze(1) * one, rtol=1e-8, atol=1e-8 * float(one.abs().max())):
            raise UsageError("A row's loss depends on other rows; return one number, the loss of all rows.")
    return total, False


def _check_finite(loss: Tensor) -> Tensor:
    if not torch.isfinite(loss.detach()).all():
        raise UsageError(f"The loss is {float(loss.detach())} at this point; expected a finite number.")
    return loss


def _gradient(loss: Tensor, x: Tensor) -> Tensor:
    """Return ∂loss/∂x with a graph; zeros if it does not depend on it."""
    if not loss.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(loss, x, create_graph=True, materialize_grads=True)[0]


def _product(outputs: Sequence[Tensor], inputs: Sequence[Tensor], v: Tensor, dim: int) -> Tensor:
    """Return the transposed Jacobian of `outputs` by `inputs` times v, through a graph that is kept."""
    if v.shape != (dim,):
        raise UsageError(f"Expected a vector of shape [{dim}], got {list(v.shape)}.")
    parts = [
        (output, part.view_as(output).to(output.device, output.dtype))
        for output, part in zip(outputs, v.split([output.numel() for output in outputs]))
        if output.requires_grad
    ]
    if not parts:  # constants: a loss or a head that is linear
        return v.new_zeros(sum(tensor.numel() for tensor in inputs))
    try:
        curved, weights = zip(*parts)
        found = torch.autograd.grad(curved, inputs, weights, retain_graph=True, materialize_grads=True)
    except RuntimeError as error:
        if "derivative" in str(error) and "not implemented" in str(error):
            hint = "Use plain formulas in place of fused kernels (attention: attn_implementation='eager')."
            raise UsageError(f"The loss has no second derivative: {error}. {hint}") from error
        raise
    return _flat(found).to(v.device, v.dtype)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
