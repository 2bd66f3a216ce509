"""The pullback metric of a head: how it stretches the space of representations at each sample.

    J = ∂z/∂h  [out_dim, in_dim],    G = JᵀJ  [in_dim, in_dim],    vᵀGv = ‖Jv‖².

G depends on the head alone, not on the loss: a direction with vᵀGv = 0 is one that no loss on z can see. Its
eigenvalues are the squared singular values of J and zeros. A linear head has G = WᵀW at every h, a ReLU head a
piecewise constant G.

The Jacobian is the derivative that training uses. Of a head with a straight-through gradient (``quantized``) that is
the surrogate's, not the 0 of the function itself. Of a ``topk`` head it is exact but where units tie.

References:
    Chaudhry 2026, The Geometry of Projection Heads, arXiv 2605.17180 (its z is our h, its h(z) our z).

MLP heads are computed by matrix products (:mod:`hfproj.geometry._chain` says why), others by ``torch.func``.
"""

import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.geometry._chain import Chain, read_chain
from hfproj.geometry._head import Map, as_input, check_rowwise, frozen, row_jacobian
from hfproj.typing import Features

_RESOLVED = 1e-7  # eigenvalues of JJᵀ above this fraction of the largest are right to 1e-6 or better
_BLOCK_ELEMENTS = 2**22


class PullbackMetric:
    """The Jacobian at each sample and the metric `G`, which is computed when it is first asked for.

    Attributes:
        J: The Jacobians `[rows, out_dim, in_dim]`.
    """

    @checked
    def __init__(self, J: Float[Tensor, "rows out_dim in_dim"]):
        self.J = J

    @cached_property
    def G(self) -> Float[Tensor, "rows in_dim in_dim"]:
        """The metric JᵀJ."""
        return self.J.mT @ self.J


class MetricCondition(NamedTuple):
    """Conditioning of G at each sample; over all of h it is infinite where the nullity is not 0.

    Attributes:
        condition_number: Largest over smallest eigenvalue of G on its numerical rank; NaN where G is 0.
        rank: Numerical rank of J.
        nullity: ``in_dim − rank``, at least ``in_dim − out_dim``.
    """

    condition_number: Float[Tensor, " rows"]
    rank: Int[Tensor, " rows"]
    nullity: Int[Tensor, " rows"]


@checked
def jacobian(head: Map, h: Features, *, dtype: torch.dtype = torch.float64) -> Float[Tensor, "rows out_dim in_dim"]:
    """Return J = ∂z/∂h at each row of `h`, without gradient, in `dtype`.

    `head` is any module or function from `[rows, in_dim]` to `[rows, out_dim]` that treats rows one by one; it runs in
    eval mode and is left as it was.

    Raises:
        UsageError: If BatchNorm or Dropout is in training mode, the head couples rows or is random, or h is not finite.

    Example:
        >>> head = nn.Linear(3, 2)
        >>> bool((jacobian(head, torch.randn(5, 3)) == head.weight.double()).all())
        True
    """
    J = list(jacobian_blocks(head, h, dtype=dtype))
    return J[0].contiguous() if len(J) == 1 else torch.cat(J)


@checked
def pullback_metric(head: Map, h: Features, *, dtype: torch.dtype = torch.float64) -> PullbackMetric:
    """Return J and, when asked for, G = JᵀJ at each row of `h`, without gradient, in `dtype`.

    Memory is rows · out_dim · in_dim for J and rows · in_dim² for G; :func:`metric_spectrum` needs neither. `head` is
    that of :func:`jacobian`.

    Raises:
        UsageError: If :func:`jacobian` refuses the head or h.

    Example:
        >>> pullback_metric(lambda h: h * torch.tensor([3.0, 1.0]), torch.randn(1, 2)).G.tolist()
        [[[9.0, 0.0], [0.0, 1.0]]]
    """
    return PullbackMetric(jacobian(head, h, dtype=dtype))


@checked
def metric_spectrum(head: Map, h: Features, *, dtype: torch.dtype = torch.float64) -> Float[Tensor, "rows eigenvalues"]:
    """Return the min(out_dim, in_dim) largest eigenvalues of G at each row of `h`, in float64, sorted descending.

    They are the squared singular values of J; the other in_dim − out_dim eigenvalues, if any, are 0. Samples whose
    spectrum spans more than 7 decades take a singular value decomposition, the others an eigenvalue decomposition of
    the smaller of JJᵀ and JᵀJ. `dtype` is that of J: float32 is faster, and resolves eigenvalues down to about 1e-13 of
    the largest. `head` is that of :func:`jacobian`.

    Raises:
        UsageError: If :func:`jacobian` raises it.

    Example:
        >>> head = lambda h: torch.relu(h * torch.tensor([3.0, 1.0]))
        >>> metric_spectrum(head, torch.tensor([[1.0, 1.0], [1.0, -1.0]])).tolist()  # the second unit is off
        [[9.0, 1.0], [9.0, 0.0]]
    """
    return torch.cat([_spectrum(J) for J in jacobian_blocks(head, h, dtype=dtype)])


@checked
def metric_condition_number(
    head: Map, h: Features, *, rtol: float | None = None, dtype: torch.dtype = torch.float64
) -> MetricCondition:
    """Return the condition number of G on its numerical rank, the rank, and the nullity, at each row of `h`.

    Singular values of J above `rtol` times the largest count; None: max(out_dim, in_dim) times the machine epsilon of
    `dtype`, as in ``torch.linalg.matrix_rank``. `dtype` is that of J, as for :func:`metric_spectrum`;
    `head` that of :func:`jacobian`.

    Raises:
        UsageError: If :func:`jacobian` raises it, or `rtol` is outside [0, 1).

    Example:
        >>> head = lambda h: h[:, :2] * torch.tensor([2.0, 1.0])
        >>> [round(values.item(), 9) for values in metric_condition_number(head, torch.randn(1, 3))]
        [4.0, 2, 1]
    """
    check_rtol(rtol)
    return _joined([_condition(J, J.shape[1:], rtol, dtype) for J in jacobian_blocks(head, h, dtype=dtype)])


@checked
def layerwise_condition_number(
    head: nn.Module, h: Features, *, rtol: float | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, MetricCondition]:
    """Return the conditioning of the metric after each layer of an MLP head, at each row of `h`.

    Args:
        head: An ``nn.Sequential``, or one of our MLP and linear heads: linear layers, norms and entrywise activations.
        h: Representations `[rows, in_dim]`.
        rtol: What counts as 0, in [0, 1), as for :func:`metric_condition_number`.
        dtype: Type of the Jacobians.

    Returns:
        Name of the module → conditioning of JᵀJ with J the Jacobian of its output by h, in the order of the forward
        pass. The last is that of the head.

    Raises:
        UsageError: If :func:`metric_condition_number` raises it, or the head is another network than such a chain.

    Example:
        >>> head = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))
        >>> condition = layerwise_condition_number(head, torch.randn(5, 8))
        >>> list(condition), condition["2"].nullity.tolist()
        (['0', '1', '2'], [4, 4, 4, 4, 4])
    """
    check_rtol(rtol)
    x = as_input(h, dtype)
    with frozen(head, dtype) as run:
        chain = _checked_chain(head, run, x)
    if chain is None:
        wanted = "a chain of linear layers, norms and entrywise activations (nn.Sequential, the heads 'mlp', 'linear')"
        hint = "give its parts to metric_condition_number, one after the other"
        raise UsageError(f"Expected {wanted}, got {type(head).__name__}; {hint}.")
    blocks = [[_condition(T, T.shape[:0:-1], rtol, dtype) for T in layers] for layers in chain.prefixes(x)]
    return dict(zip(chain.names, map(_joined, zip(*blocks))))


def jacobian_blocks(head: Map, h: Tensor, *, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """Yield J for one block of rows after the other; with stride 0 over rows where it is the same for all."""
    x = as_input(h, dtype)
    with frozen(head, dtype) as run:
        chain = _checked_chain(head, run, x)
        if chain is None:
            check_rowwise(run, x)
            rows = _rows_at_once(head, run, x)
    if chain is not None:
        yield from chain.jacobians(x)
        return
    for block in x.split(rows):
        with frozen(head, dtype) as run:  # not across the yield: whoever takes the blocks may stop half-way
            J = _by_autograd(run, block)
        yield J


def _checked_chain(head: Map, run: Map, x: Tensor) -> Chain | None:
    """Return the head as a chain if it is one and gives the head's values."""
    chain = read_chain(head, x.dtype, x.device)
    if chain is None or chain.in_dim != x.shape[1]:
        return None
    some = x[:32]
    with torch.no_grad():
        z, expected = chain(some), run(some)
    tolerance = 1e4 * torch.finfo(x.dtype).eps
    atol = tolerance * float(z.abs().max())
    return chain if z.shape == expected.shape and torch.allclose(z, expected, rtol=tolerance, atol=atol) else None


def _rows_at_once(head: Map, run: Map, x: Tensor) -> int:
    with torch.no_grad():
        in_dim, out_dim = x.shape[1], run(x[:1]).shape[1]
    weights = list(head.parameters()) if isinstance(head, nn.Module) else []
    widest = max([in_dim, out_dim, *(weight.shape[0] for weight in weights if weight.ndim)])
    return max(1, _BLOCK_ELEMENTS // (min(in_dim, out_dim) * widest))


def _by_autograd(run: Map, x: Tensor) -> Tensor:
    out_dim = len(run(x[:1]).T)
    transform = torch.func.jacrev if out_dim <= x.shape[1] else torch.func.jacfwd
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            warnings.filterwarnings("ignore", message="`torch.jit.script`")  # torch's own, for forward mode
            J = torch.func.vmap(transform(lambda row: run(row.unsqueeze(0)).squeeze(0)))(x)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        x = x.detach().requires_grad_()  # whatever torch.func cannot trace: custom functions, .item(), in-place code
        J = row_jacobian(run(x), x)
    return J.detach()


def _spectrum(J: Tensor) -> Tensor:
    """Return the squared singular values `[rows, min]` in float64, sorted descending; the same for J and Jᵀ."""
    rows = len(J)
    J = (J[:1] if J.stride(0) == 0 else J).double()
    gram = J @ J.mT if J.shape[1] <= J.shape[2] else J.mT @ J
    if not torch.isfinite(gram).all():
        raise UsageError("The Jacobian of the head has entries that are NaN or infinite: look at its parameters.")
    values = torch.linalg.eigvalsh(gram).flip(1)
    unresolved = values[:, -1] < _RESOLVED * values[:, 0]
    if unresolved.any():
        values[unresolved] = torch.linalg.svdvals(J[unresolved]).square()
    return values.expand(rows, -1)


def _condition(J: Tensor, shape: torch.Size, rtol: float | None, dtype: torch.dtype) -> MetricCondition:
    """Return the conditioning for Jacobians of a `shape` [out_dim, in_dim], themselves or transposed."""
    values, (out_dim, in_dim) = _spectrum(J), shape
    rtol = max(out_dim, in_dim) * torch.finfo(dtype).eps if rtol is None else rtol
    counted = values > rtol**2 * values[:, :1]
    rank = counted.sum(1)
    smallest = values.masked_fill(~counted, torch.inf).amin(1)
    return MetricCondition(torch.where(rank > 0, values[:, 0] / smallest, torch.nan), rank, in_dim - rank)


def _joined(blocks: Iterable[MetricCondition]) -> MetricCondition:
    return MetricCondition(*map(torch.cat, zip(*blocks)))


def check_rtol(rtol: float | None) -> None:
    """Refuse a relative tolerance outside [0, 1)."""
    if rtol is not None and not 0 <= rtol < 1:
        raise UsageError(f"Expected rtol, a fraction of the largest singular value, to be in [0, 1), got {rtol}.")
