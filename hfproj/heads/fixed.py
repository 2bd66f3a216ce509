"""Fixed heads: entries of the representation, reweighted or left out, and nothing to train."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.errors import UsageError, check_choice, unknown
from hfproj.heads.parts import check_input, check_kept_width, check_positive
from hfproj.registry import ShowsOptions


def decay_weights(dim: int, kappa: float) -> Float[Tensor, " dim"]:
    """Return κ^(−i) for i = 0 … dim − 1, in float32.

    Far entries underflow to 0: at κ = 1.2 all those from 571 on.

    Example:
        >>> decay_weights(4, 2.0).tolist()
        [1.0, 0.5, 0.25, 0.125]
    """
    # Powers with negative exponents: κ^i itself would overflow. In float64, since rounding κ would add up along i.
    return (kappa ** -torch.arange(dim, dtype=torch.float64)).float()


class ReweightHead(ShowsOptions, nn.Module):
    """z_i = κ^(−i) h_i for i = 0 … in_dim − 1, without parameters; z is float32 or better, under autocast too.

    Which entry comes first is arbitrary; only training orders features by it. The loss sees about as many entries as
    the effective dimension of the weights, (Σ w²)² / Σ w⁴: 100.5, 20.5, 5.5 and 2.6 for κ = 1.01, 1.05, 1.2 and 1.5,
    however wide h is.

    Args:
        in_dim: Width of h.
        out_dim: Width of z; if given, it equals `in_dim`.
        kappa: κ, at least 1 (the identity). 1.05: the paper's script and its SimCLR on MNIST-on-CIFAR-10; 1.2 and 1.5:
            its supervised and SupCon runs on CIFAR-100.

    Raises:
        UsageError: If `kappa` is below 1 or not finite, or `out_dim` differs from `in_dim`.

    Example:
        >>> ReweightHead(in_dim=3, kappa=2.0)(torch.ones(1, 3)).tolist()
        [[1.0, 0.5, 0.25]]

    References:
        Xue, Gan, Ni, Joshi, Mirzasoleiman 2024, "Investigating the Benefits of Projection Head for Representation
        Learning", arXiv 2403.11391; jiayini1119/projection-head-experiments (a145e06), class
        ``ReweightProjectionHead``, whose ``pretrain.py`` has κ = 1.05.

    Deviations:
        The weights are a buffer, not a frozen parameter that optimizers or averaging might touch.
    """

    weights: Tensor

    def __init__(self, *, in_dim: int, out_dim: int | None = None, kappa: float = 1.05):
        super().__init__()
        self.in_dim = self.out_dim = check_kept_width("The reweight head", in_dim, out_dim)
        if not 1 <= kappa < math.inf:
            raise UsageError(
                f"kappa must be a number of at least 1 (1.01 to 1.5 is usual), got {kappa}; below 1 the weights would "
                "grow without bound, and which entry comes first is arbitrary anyway: take 1/kappa."
            )
        self.kappa = kappa
        self.register_buffer("weights", decay_weights(in_dim, kappa), persistent=False)  # kappa says it all

    @property
    def effective_dimension(self) -> float:
        """(Σ w²)² / Σ w⁴ of the weights: about how many entries of h the loss sees.

        Example:
            >>> ReweightHead(in_dim=512, kappa=1.0).effective_dimension
            512.0
        """
        square = self.weights.double().square()
        return (square.sum().square() / square.square().sum()).item()

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch in_dim"]:
        """Weigh the entries of h."""
        check_input(self, h, self.in_dim)
        weights = self.weights
        if torch.finfo(weights.dtype).bits < 32:  # a module cast to half precision: most weights would be lost in it
            weights = decay_weights(self.in_dim, self.kappa).to(weights.device)
        return h * weights.to(torch.promote_types(h.dtype, torch.float32))


class SubvectorHead(ShowsOptions, nn.Module):
    """DirectCLR: z = h[:d0], without parameters; the whole h is evaluated.

    The other entries get no gradient from the loss themselves; they learn through the backbone's layers below.

    Args:
        in_dim: Width of h.
        d0: How many entries are kept; the paper keeps 360 of 2048.
        out_dim: Width of z, another name for `d0`: give either.

    Raises:
        UsageError: If neither `d0` nor `out_dim` is given, if they differ, or if h has fewer entries.

    Example:
        >>> SubvectorHead(in_dim=4, d0=2)(torch.arange(4.0).view(1, 4)).tolist()
        [[0.0, 1.0]]

    References:
        Jing et al. 2021, "Understanding Dimensional Collapse in Contrastive Self-Supervised Learning", arXiv
        2110.09348, section 6; facebookresearch/directclr ``directclr/main.py``, mode "directclr" with ``--dim 360`` for
        a ResNet-50. Its mode "group", random disjoint groups of entries, is the objective ``grouped`` on the head
        ``identity``.
    """

    def __init__(self, *, in_dim: int, d0: int | None = None, out_dim: int | None = None):
        super().__init__()
        d0 = out_dim if d0 is None else d0
        if d0 is None or out_dim not in (None, d0):
            what = "The subvector head needs the number of entries to keep, as d0 or as out_dim"
            raise UsageError(f"{what}; got d0={d0}, out_dim={out_dim}. The paper keeps 360 of 2048.")
        self.d0, self.in_dim = _check_d0(d0, in_dim)
        self.out_dim = self.d0

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch d0"]:
        """Return the first d0 entries."""
        check_input(self, h, self.in_dim)
        return h[..., : self.d0]


class ConstantSubvectorHead(ShowsOptions, nn.Module):
    """z = [h_1, …, h_d0, c, …, c] (in_dim entries), without parameters.

    With c = 0 a loss on cosines, and its gradient, are those of `SubvectorHead` with the same d0; for any c the
    covariance of z has rank d0 at most.

    Args:
        in_dim: Width of h.
        d0: How many entries are kept.
        constant: c, a number or ``"inverse_sqrt"`` for 1/√in_dim.
        evaluate: What z is in eval mode; the paper does not say which its tables have. ``"constant"``: as in training;
            probes then compare both vectors, since they run on h too. ``"full"``: h itself, for those who read z only
            and want DirectCLR's way; the loss of an evaluation is then that of h.
        out_dim: Width of z; if given, it equals `in_dim`.

    Raises:
        UsageError: If h has fewer entries than `d0`, `out_dim` differs from `in_dim`, `constant` is not finite, or a
            name is unknown.

    Example:
        >>> ConstantSubvectorHead(in_dim=4, d0=2, constant="inverse_sqrt")(torch.arange(4.0).view(1, 4)).tolist()
        [[0.0, 1.0, 0.5, 0.5]]

    References:
        OpenReview PD532fs8b1 (first version), section 3.4 and table 1: c ∈ {0, 1/√in_dim, 1}, d0 ∈ {200, 400, 480} of
        512; c = 0 and d0 = 480 did best. No official code.
    """

    def __init__(
        self, *, in_dim: int, d0: int, constant: float | str = 0.0, evaluate: str = "constant",
        out_dim: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.d0, self.in_dim = _check_d0(d0, in_dim)
        self.out_dim = check_kept_width("The constant-subvector head", in_dim, out_dim)
        check_choice("evaluate", evaluate, ("constant", "full"))
        if isinstance(constant, str):
            if constant != "inverse_sqrt":
                raise unknown("constant:", constant, ("inverse_sqrt", "a number"))
            constant = 1 / math.sqrt(in_dim)
        if not math.isfinite(constant):
            raise UsageError(f"constant must be a finite number or 'inverse_sqrt' (1/√in_dim), got {constant}.")
        self.constant, self.evaluate = float(constant), evaluate

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch in_dim"]:
        """Replace the entries after the first d0; in eval mode with ``evaluate="full"``, return h."""
        check_input(self, h, self.in_dim)
        if self.evaluate == "full" and not self.training:
            return h
        tail = h.new_full((*h.shape[:-1], self.in_dim - self.d0), self.constant)
        return torch.cat([h[..., : self.d0], tail], dim=-1)


def _check_d0(d0: object, in_dim: object) -> tuple[int, int]:
    kept, width = check_positive("d0", d0), check_positive("in_dim", in_dim)
    if kept > width:
        what = f"d0={kept} entries can't be taken from a representation of {width}"
        raise UsageError(f"{what}: choose d0 from 1 to {width} (DirectCLR keeps 360 of 2048).")
    return kept, width
