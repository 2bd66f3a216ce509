"""The sparse projector: an autoencoder of which only the largest units are kept, trained by the loss alone.

With v = h, or the output of a first head (the stem), and a dictionary of m units,

    a = relu(W_e (v − b_pre) + b_e),    a_top = the top_k largest entries of each row of a, the others 0,
    z = W_d a_top + b_d + b_pre.

There is no reconstruction loss, no tied weight and no normalised decoder. Where no more than top_k entries of a row are
positive nothing is cut off. The gradient flows through the kept units only, so that units may die, see
`TopKHead.dead_units`.

References:
    Ouyang, Hu, Zhang, Wang, Wang 2025, arXiv 2503.00507; PKU-ML/Projector_Theory (5c2e7d1) ``methods/simclr.py`` (in
    place of the projector), ``methods/barlow_twins.py`` (behind its first layer), both with m = 100000, top_k = 1000.
    The autoencoder is that of Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093.

Deviations:
    m is 32 times the width of v by default, since 100000 units on 512 entries are 10⁸ parameters; top_k = 0.01 m, the
    official ratio. Weights start as torch's linear layers do, b_pre at 0. The report of dead units is ours.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.heads.parts import check_input, check_kept_width, check_positive, create_inner
from hfproj.registry import ShowsOptions


def keep_largest(a: Float[Tensor, "*batch width"], top_k: int) -> Float[Tensor, "*batch width"]:
    """Set all but the `top_k` largest entries of each row to 0.

    Example:
        >>> keep_largest(torch.tensor([[3.0, 1.0, 2.0]]), 2).tolist()
        [[3.0, 0.0, 2.0]]
    """
    kept, where = a.topk(top_k, dim=-1, sorted=False)
    return torch.zeros_like(a).scatter(-1, where, kept)


class TopKHead(ShowsOptions, nn.Module):
    """A sparse top-k autoencoder as a head.

    The buffer ``idle`` counts, for each unit, the rows of all processes since it was last kept with a positive value in
    training; it is the same on every process and is saved with the head.

    Args:
        in_dim: Width of h.
        out_dim: Width of z, which is that of v: passed to the stem; without one it equals `in_dim`.
        width: m, the number of units; None: 32 times the width of v.
        top_k: How many units of a row are kept; None: ``width / 100``, at least 1.
        stem: Name of a head that makes v from h; None: v = h (the paper's SimCLR). Its Barlow Twins: ``"mlp"`` with
            ``{"depth": 1, "out_dim": 2048, "last_norm": "batch", "last_bias": True, "last_activation": "relu"}``.
        stem_options: Options of the stem.

    Raises:
        UsageError: If a number is below 1, `top_k` is larger than `width`, the stem refuses its options, or `out_dim`
            differs from `in_dim` without a stem.

    Example:
        >>> head = TopKHead(in_dim=4, width=32, top_k=3)
        >>> int((head.units(torch.randn(8, 4)) > 0).sum(1).max())
        3
    """

    idle: Tensor

    def __init__(
        self, *, in_dim: int, out_dim: int | None = None, width: int | None = None, top_k: int | None = None,
        stem: str | None = None, stem_options: dict[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_dim = check_positive("in_dim", in_dim)
        if stem is None:
            if stem_options:
                raise UsageError(f"Expected a stem for stem_options={stem_options}, got None; name it: stem='mlp'.")
            self.stem = None
            self.out_dim = check_kept_width("The top-k head without a stem", in_dim, out_dim)
        else:
            self.stem = create_inner(stem, in_dim=in_dim, options=stem_options, out_dim=out_dim)
            self.out_dim = check_positive("out_dim", self.stem.out_dim)
        self.width = 32 * self.out_dim if width is None else check_positive("width", width)
        self.top_k = max(1, self.width // 100) if top_k is None else check_positive("top_k", top_k)
        if self.top_k > self.width:
            hint = f"choose top_k from 1 to {self.width} (a hundredth of the width is usual), or a larger width"
            raise UsageError(f"top_k={self.top_k} of width={self.width} units can't be kept: {hint}.")
        self.pre_bias = nn.Parameter(torch.zeros(self.out_dim))
        self.encoder = nn.Linear(self.out_dim, self.width)
        self.decoder = nn.Linear(self.width, self.out_dim)
        self.register_buffer("idle", torch.zeros(self.width, dtype=torch.int64))

    def forward(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Project h.

        Raises:
            UsageError: If h is no tensor, or neither `[batch, in_dim]` nor `[views, batch, in_dim]`.
        """
        check_input(self, h, self.in_dim)
        kept = self._kept(h)
        if self.training:
            self._count(kept.detach())
        return self.decoder(kept) + self.pre_bias

    def units(self, h: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch width"]:
        """Return a_top, the kept activations, with 0 for all other units."""
        check_input(self, h, self.in_dim)
        return self._kept(h)

    def dead_units(self, *, rows: int = 100_000) -> Int[Tensor, " dead"]:
        """Return the indices of the units that were never active in the last `rows` rows of training.

        Args:
            rows: How long a unit must have been idle, in rows of z (views times images) over all processes; 100,000 are
                two views of all images of CIFAR-10.

        Example:
            >>> head = TopKHead(in_dim=4, width=8, top_k=8)
            >>> _ = nn.init.constant_(head.encoder.bias, -100.0)
            >>> _ = head(torch.randn(16, 4))
            >>> head.dead_units(rows=16).tolist(), head.dead_units(rows=17).tolist()
            ([0, 1, 2, 3, 4, 5, 6, 7], [])
        """
        return (self.idle >= check_positive("rows", rows)).nonzero().squeeze(1)

    def _kept(self, h: Tensor) -> Tensor:
        # A stem such as "quantized" gives float32 whatever its weights are, also in a module of half precision.
        v = h if self.stem is None else self.stem(h).to(self.pre_bias.dtype)
        return keep_largest(torch.relu(self.encoder(v - self.pre_bias)), self.top_k)

    def _count(self, kept: Tensor) -> None:
        active = (kept.flatten(0, -2) > 0).sum(0)
        total = distributed.all_reduce_sum(torch.cat([active, active.new_full((1,), kept.shape[:-1].numel())]))
        self.idle.add_(total[-1]).masked_fill_(total[:-1] > 0, 0)
