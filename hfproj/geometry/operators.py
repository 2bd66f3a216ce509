"""Hessians by their products with vectors: of the loss in h, in the parameters of a head, or in those of a whole model.

The gradient is computed once, with a graph that is kept; each product H v is then one backward pass through it, at
little more than the cost of a gradient (``recipes/benchmarks/geometry.py`` measures it). The graph holds the
activations of one forward and one backward pass for as long as the operator lives.

An operator is symmetric, and stays that of the point where it was made: changing the parameters in place afterwards is
noticed and refused. Several batches are a sum: ``lambda v: sum(o.matvec(v) for o in operators) / len(operators)``.

References:
    Pearlmutter 1994, Fast exact multiplication by the Hessian.

Deviations:
    None.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.errors import UsageError
from hfproj.geometry._head import Map, as_input, check_eval, check_rows, frozen
from hfproj.geometry.hessian import Loss

_MOST_COLUMNS = 4096


class HessianOperator:
    """The Hessian of a loss in given tensors, such as the parameters of a head or of a PEFT model.

    Args:
        closure: () → the loss, one number, from the tensors; twice differentiable. Attention inside it runs by its
            plain formula, since the fused kernels have no second derivative.
        parameters: A module, for its trainable parameters; or the tensors.

    Attributes:
        dim: Number of entries of all tensors.
        loss: The loss.
        gradient: The gradient `[dim]`.

    Raises:
        UsageError: no parameter, a module with BatchNorm or Dropout in training mode, or a loss that is no finite
            number, does not depend on the parameters or has no second derivative.

    Example:
        >>> head, h = nn.Linear(4, 1, bias=False), torch.eye(4)
        >>> hessian = HessianOperator(lambda: head(h).square().sum(), head)
        >>> hessian.matvec(torch.tensor([1.0, 0.0, 0.0, 0.0])).tolist()
        [2.0, 0.0, 0.0, 0.0]
    """

    def __init__(self, closure: Callable[[], Tensor], parameters: nn.Module | Iterable[Tensor]):
        if isinstance(parameters, nn.Module):
            check_eval(parameters)
            parameters = parameters.parameters()
        self._tensors = [tensor for tensor in parameters if tensor.requires_grad]
        if not self._tensors:
            raise UsageError("Expected parameters that require a gradient, got none: is everything frozen?")
        self.dim = sum(tensor.numel() for tensor in self._tensors)
        with torch.inference_mode(False), torch.enable_grad(), _plain_attention():
            loss = closure()
            _check_loss(loss)
            gradients = torch.autograd.grad(loss, self._tensors, create_graph=True, materialize_grads=True)
        self.loss = float(loss.detach())
        self.gradient = _flat([gradient.detach() for gradient in gradients])
        self._gradients = gradients
        self._unchanged = _Unchanged(self._tensors)

    def matvec(self, v: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return H v, in the dtype and on the device of `v`.

        Raises:
            UsageError: v has another length, or the parameters were changed after the operator was made.
        """
        self._unchanged.check()
        return _product(self._gradients, self._tensors, v, self.dim)

    def dense(self) -> Float[Tensor, "dim dim"]:
        """Return H as a matrix, column by column, symmetrised.

        Raises:
            UsageError: it has more than 4096 columns.
        """
        return dense(self.matvec, self.dim, like=self._tensors[0])


class EffectiveHessianOperator:
    """H_eff = G_L + M of a loss behind a head, and both parts, by their products with vectors.

    Args:
        head: Any module or function from `[rows, in_dim]` to `[rows, out_dim]`. It runs in eval mode and is left as it
            was.
        loss_fn: z `[rows, out_dim]` → one number, the joint loss of all rows; or the losses `[rows]`, whose sum is
            taken, so that H_eff is block-diagonal with the rows' own.
        h: Representations. The Hessian is that in all their entries.
        dtype: Of the computation.

    Attributes:
        dim: ``rows · in_dim``. Vectors are `h` flattened.
        loss: The loss.
        gradient: ∇_h L = Jᵀρ, flattened.

    Raises:
        UsageError: as :func:`hfproj.geometry.effective_hessian`.

    Example:
        >>> from hfproj.geometry.lanczos import extreme_eigenvalues
        >>> _ = torch.manual_seed(0)
        >>> head = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> target = head(torch.zeros(1, 4)).detach() - 5
        >>> hessian = EffectiveHessianOperator(head, lambda z: (z - target).square().sum() / 2, torch.ones(1, 4))
        >>> v = torch.randn(hessian.dim, dtype=torch.float64)
        >>> torch.allclose(hessian.matvec(v), hessian.G_L(v) + hessian.M(v))
        True
        >>> extreme_eigenvalues(hessian.matvec, hessian.dim).min < 0
        True
    """

    def __init__(
        self, head: Map, loss_fn: Loss, h: Float[Tensor, "rows in_dim"], *, dtype: torch.dtype = torch.float64
    ):
        check_rows(h)
        self._h = h = as_input(h, dtype).requires_grad_()
        self.dim = h.numel()
        with frozen(head, dtype) as run, _plain_attention():
            z = run(h)
            self._z = z_leaf = z.detach().requires_grad_()
            loss = loss_fn(z_leaf)
            if isinstance(loss, Tensor) and loss.shape == (len(h),):
                loss = loss.sum()
            _check_loss(loss)
            (self._rho,) = torch.autograd.grad(loss, z_leaf, create_graph=True, materialize_grads=True)
            rho = self._rho.detach()
            (self._curved,) = torch.autograd.grad((rho * z).sum(), h, create_graph=True, materialize_grads=True)
            self._u = torch.zeros_like(z, requires_grad=True)
            (self._pulled,) = torch.autograd.grad((self._u * z).sum(), h, create_graph=True, materialize_grads=True)
        self._forward = z
        self._unchanged = _Unchanged(head.parameters() if isinstance(head, nn.Module) else ())
        self.loss = float(loss.detach())
        self.gradient = self._curved.detach().flatten()

    def matvec(self, v: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return H_eff v."""
        return self.G_L(v) + self.M(v)

    def G_L(self, v: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return G_L v = Jᵀ H_L J v."""
        self._unchanged.check()
        pushed = _product([self._pulled], [self._u], v, self.dim)  # J v: Jᵀu is linear in u, and its transpose is J
        curved = _product([self._rho], [self._z], pushed, self._z.numel())
        return _product([self._forward], [self._h], curved, self._z.numel())

    def M(self, v: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return M v = Σ ρ_i ∇²z_i v; exactly 0 for linear and piecewise linear heads."""
        self._unchanged.check()
        return _product([self._curved], [self._h], v, self.dim)

    def dense(self) -> Float[Tensor, "dim dim"]:
        """Return H_eff as a matrix, column by column, symmetrised.

        Raises:
            UsageError: it has more than 4096 columns.
        """
        return dense(self.matvec, self.dim, like=self._h)


class _Unchanged:
    """Notices that tensors were changed in place: their graph then is that of no point at all."""

    def __init__(self, tensors: Iterable[Tensor]):
        self._tensors = list(tensors)
        self._versions = [tensor._version for tensor in self._tensors]

    def check(self) -> None:
        if [tensor._version for tensor in self._tensors] != self._versions:
            raise UsageError(
                "The parameters were changed after this operator was made, which is the Hessian at the point where "
                "they were: make a new one after each optimizer step."
            )


def dense(matvec: Callable[[Tensor], Tensor], dim: int, *, like: Tensor) -> Tensor:
    """Return a symmetric operator as a matrix of the dtype and device of `like`.

    Raises:
        UsageError: it has more than 4096 columns.
    """
    if dim > _MOST_COLUMNS:
        raise UsageError(f"A matrix of {dim} columns is too large; expected at most {_MOST_COLUMNS}. Use matvec.")
    identity = torch.eye(dim, dtype=like.dtype, device=like.device)
    matrix = torch.stack([matvec(column) for column in identity])
    return (matrix + matrix.T) / 2


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
        found = torch.autograd.grad(
            [output for output, _ in parts], inputs, [part for _, part in parts],
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip
    except RuntimeError as error:
        if "derivative" in str(error) and "not implemented" in str(error):
            raise UsageError(
                f"The loss has no second derivative: {error}. Use plain formulas in place of fused kernels (attention: "
                "attn_implementation='eager')."
            ) from error
        raise
    return _flat(found).to(v.device, v.dtype)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        came = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(f"Expected the loss as one number, got {came}.")
    if not torch.isfinite(loss.detach()).all():
        raise UsageError(f"The loss is {float(loss.detach())} at this point.")
    if not loss.requires_grad:
        raise UsageError("The loss does not depend on the tensors that the Hessian is asked in: was it detached?")


def _plain_attention() -> contextlib.AbstractContextManager:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
