"""The MLP head of SimCLR and most methods after it.

    a_0 = h,    a_l = σ(norm(W_l a_{l−1} + b_l)) for l < depth,    z = last_norm(W_depth a_{depth−1} + b_depth),

so ``depth`` counts linear layers; depth 1 is a linear head. Papers differ in norm, bias and the last layer only:

=====================  ===============================================================================================
SimCLR v1/v2 (Google)  ``last_norm="batch", last_affine="scale", batch_statistics="joint"``, depth 2 or 3
MoCo v2, SupCon        ``norm=None``
SimSiam                ``depth=3, out_dim=2048, last_norm="batch", last_affine=False``
MoCo v3                ``depth=3, hidden_dim=4096, out_dim=256, last_norm="batch", last_affine=False`` (ViT)
Barlow Twins           ``depth=3, hidden_dim=8192, out_dim=8192, last_bias=False``
VICReg                 the same with ``bias=True`` in the hidden layers
=====================  ===============================================================================================

References:
    Chen et al. 2020, arXiv 2002.05709, section 2.1; google-research/simclr ``model_util.py`` (no linear bias, last norm
    without a shift); facebookresearch/{simsiam, moco, moco-v3} ``builder.py``, barlowtwins ``main.py``.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from hfproj.errors import UsageError
from hfproj.functional.rows import unit_rows
from hfproj.heads.activations import create_activation
from hfproj.heads.checks import check_input, check_positive
from hfproj.heads.norm import create_norm


class MLPHead(nn.Module):
    """Linear layers with norms and activations between them; torch's default initialisation.

    Modules are named ``hidden.0.linear``, ``hidden.0.norm``, …, ``last.linear``, ``last.norm``.

    Args:
        in_dim: Width of h.
        out_dim: Width of z.
        hidden_dim: Width of the hidden layers, or a list of ``depth - 1`` widths.
        depth: Number of linear layers.
        activation: ``"relu"``, ``"gelu"``, … (:data:`hfproj.heads.activations.ACTIVATIONS`).
        norm: None, ``"batch"`` or ``"layer"``, before each activation.
        bias: Whether hidden linear layers have a bias; None: unless a BatchNorm follows, which would cancel it.
        last_norm: None, ``"batch"`` or ``"layer"``, after the last linear layer.
        last_bias: Whether the last linear layer has a bias; None: unless a BatchNorm follows.
        last_affine: Of the last norm: True learns scale and shift, ``"scale"`` the scale alone, False neither.
        l2_normalise: Whether rows of z have unit length; they are then float32 or better, under autocast too.
        batch_statistics: ``"per_view"`` or ``"joint"``, see :class:`hfproj.heads.norm.BatchNorm`.

    Raises:
        UsageError: an option that cannot work.

    Example:
        >>> head = MLPHead(in_dim=384, out_dim=64, hidden_dim=[512, 256], depth=3)
        >>> [name for name, _ in head.named_parameters()][:3]
        ['hidden.0.linear.weight', 'hidden.0.norm.weight', 'hidden.0.norm.bias']
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int = 128,
        hidden_dim: int | Sequence[int] = 2048,
        depth: int = 2,
        activation: str = "relu",
        norm: str | None = "batch",
        bias: bool | None = None,
        last_norm: str | None = None,
        last_bias: bool | None = None,
        last_affine: bool | str = True,
        l2_normalise: bool = False,
        batch_statistics: str = "per_view",
    ):
        super().__init__()
        self.in_dim, self.out_dim = check_positive("in_dim", in_dim), check_positive("out_dim", out_dim)
        self.l2_normalise = l2_normalise
        widths = [in_dim, *_hidden_widths(hidden_dim, check_positive("depth", depth))]
        create_activation(activation), create_norm(norm, 1)  # a typing error shows even where depth=1 uses neither

        def block(width_in: int, width: int, bias: bool | None, norm: str | None, affine: bool | str) -> OrderedDict:
            layers: OrderedDict[str, nn.Module] = OrderedDict(
                linear=nn.Linear(width_in, width, bias=norm != "batch" if bias is None else bias)
            )
            normalise = create_norm(norm, width, affine=affine, statistics=batch_statistics)
            if normalise is not None:
                layers["norm"] = normalise
            return layers

        hidden = [block(a, b, bias, norm, True) for a, b in pairwise(widths)]
        self.hidden = nn.Sequential(*(nn.Sequential(b | {"act": create_activation(activation)}) for b in hidden))
        self.last = nn.Sequential(block(widths[-1], out_dim, last_bias, last_norm, last_affine))

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Project h.

        Raises:
            UsageError: h has another shape than ``[batch, in_dim]`` or ``[views, batch, in_dim]``, or BatchNorm is to
                train on one row.
        """
        check_input("The MLP head", h, self.in_dim)
        z = self.last(self.hidden(h))
        return unit_rows(z) if self.l2_normalise else z


def _hidden_widths(hidden_dim: int | Sequence[int], depth: int) -> list[int]:
    if isinstance(hidden_dim, int):
        return [check_positive("hidden_dim", hidden_dim)] * (depth - 1)
    if len(hidden_dim) != depth - 1:
        raise UsageError(
            f"hidden_dim={list(hidden_dim)} lists {len(hidden_dim)} hidden widths, but depth={depth} linear layers "
            f"have {depth - 1} between them. Use depth={len(hidden_dim) + 1}, or one number for all."
        )
    return [check_positive("hidden_dim", width) for width in hidden_dim]
