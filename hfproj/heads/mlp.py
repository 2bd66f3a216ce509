"""The MLP head of SimCLR and most methods after it.

    a_0 = h,    a_l = σ(norm(W_l a_{l−1} + b_l)) for l < depth,    z = σ_last(last_norm(W_depth a_{depth−1} + b_depth)),

so ``depth`` counts linear layers; depth 1 is a linear head. Papers differ in widths, norms, biases, initialisation and
the last layer only: :mod:`hfproj.heads.presets` spells their heads out.

References:
    Chen et al. 2020, arXiv 2002.05709, section 2.1.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from hfproj.errors import UsageError, check_choice
from hfproj.functional.rows import unit_rows
from hfproj.heads.norm import Affine, Norm, Statistics, create_norm
from hfproj.heads.parts import Activation, check_input, check_positive, create_activation
from hfproj.typing import OneOf


class MLPHead(nn.Module):
    """Linear layers with norms and activations between them.

    Modules are named ``hidden.0.linear``, ``hidden.0.norm``, …, ``last.linear``, ``last.norm``.

    Args:
        in_dim: Width of h.
        out_dim: Width of z; None: `in_dim`.
        hidden_dim: Width of the hidden layers, or a list of ``depth - 1`` widths; None: `in_dim`.
        depth: Number of linear layers.
        activation: ``"relu"``, ``"gelu"``, … (:data:`hfproj.heads.parts.ACTIVATIONS`).
        norm: None, ``"batch"`` or ``"layer"``, before each activation.
        bias: Whether hidden linear layers have a bias; None: unless a BatchNorm follows, which would cancel it.
        last_norm: None, ``"batch"`` or ``"layer"``, after the last linear layer.
        last_bias: Whether the last linear layer has a bias; None: unless a BatchNorm follows.
        last_affine: Of the last norm: True learns scale and shift, ``"scale"`` the scale alone, False neither.
        last_activation: After the last layer and its norm.
        init: Of the linear layers: ``"default"`` is torch's; ``"trunc_normal"`` draws weights from a normal
            distribution with standard deviation 0.02, cut off at ±2, and sets biases to 0.
        l2_normalise: Whether rows of z have unit length; they are then float32 or better, under autocast too.
        batch_statistics: ``"per_view"`` or ``"joint"``, see :class:`hfproj.heads.norm.BatchNorm`.

    Raises:
        UsageError: If a name is unknown, a width or the depth is below 1, or `hidden_dim` lists another number of
            widths; on call, if BatchNorm has one row to train on.

    Example:
        >>> head = MLPHead(in_dim=384, out_dim=64, hidden_dim=[512, 256], depth=3)
        >>> [name for name, _ in head.named_parameters()][:3]
        ['hidden.0.linear.weight', 'hidden.0.norm.weight', 'hidden.0.norm.bias']
    """

    def __init__(
        self, *, in_dim: int, out_dim: int | None = 128, hidden_dim: int | Sequence[int] | None = 2048, depth: int = 2,
        activation: Activation = "relu", norm: Norm | None = "batch", bias: bool | None = None,
        last_norm: Norm | None = None, last_bias: bool | None = None, last_affine: Affine = True,
        last_activation: Activation = "identity", init: OneOf["default", "trunc_normal"] = "default",
        l2_normalise: bool = False, batch_statistics: Statistics = "per_view",
    ):  # fmt: skip
        super().__init__()
        self.in_dim = check_positive("in_dim", in_dim)
        self.out_dim = in_dim if out_dim is None else check_positive("out_dim", out_dim)
        self.l2_normalise = l2_normalise
        check_choice("init", init, ("default", "trunc_normal"))
        hidden_dim = in_dim if hidden_dim is None else hidden_dim
        widths = [in_dim, *_hidden_widths(hidden_dim, check_positive("depth", depth))]
        (
            create_activation(activation),
            create_norm(norm, 1),
        )  # a misspelt name is refused even where depth=1 uses neither

        def block(width_in: int, width: int, bias: bool | None, norm: Norm | None, affine: Affine) -> OrderedDict:
            linear = nn.Linear(width_in, width, bias=norm != "batch" if bias is None else bias)
            normalise = create_norm(norm, width, affine=affine, statistics=batch_statistics)
            return OrderedDict(linear=linear) if normalise is None else OrderedDict(linear=linear, norm=normalise)

        hidden = [block(a, b, bias, norm, True) for a, b in pairwise(widths)]
        self.hidden = nn.Sequential(*(nn.Sequential(b | {"act": create_activation(activation)}) for b in hidden))
        self.last = nn.Sequential(block(widths[-1], self.out_dim, last_bias, last_norm, last_affine))
        if last_activation != "identity":
            self.last.add_module("act", create_activation(last_activation))
        if init == "trunc_normal":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Project h.

        Raises:
            UsageError: If h is no tensor, or neither `[batch, in_dim]` nor `[views, batch, in_dim]`.
        """
        check_input(self, h, self.in_dim)
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
