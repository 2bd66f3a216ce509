"""NT-Xent's value and gradient in tiles: the matrix of all similarities never exists.

With n = images · views unit rows u_i, S_ij = u_i·u_j / τ without its diagonal, ℓ_i = log Σ_j exp S_ij and m_i the mean
of S_ip over the V − 1 positives p of i,

    L = mean_i (ℓ_i − m_i), ∂L/∂u_i = 1/(nτ) · [ Σ_j (exp(S_ij − ℓ_i) + exp(S_ij − ℓ_j)) u_j − 2/(V−1) Σ_p u_p ].

The gradient of a row needs only the row's similarities and everybody's ℓ. So two passes over tiles of S, the first for
ℓ, the second for the gradient, give both in the forward pass with one tile of memory. On one process S is symmetric and
the upper tiles suffice: 4n²d FLOPs instead of 6n²d. Over processes each rank passes over its own rows against
all rows: it gathers u and ℓ and builds the complete gradient of its own rows, with no reduction in the backward.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.functional.rows import full_precision

_CPU_TILE, _GPU_TILE = 512, 4096


def tiled_nt_xent(
    u: Float[Tensor, "views images dim"], *, temperature: float, tile_rows: int | None = None, gather: bool = True
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return NT-Xent of unit rows, and the mean cosine of positive pairs without a gradient.

    Equal to :func:`hfproj.objectives.nt_xent.nt_xent_loss`, with O(tile_rows²) instead of O(n²) memory.

    Args:
        u: Rows of unit length, float32 or float64. Over processes the numbers of images may differ.
        temperature: τ.
        tile_rows: Edge of a tile. None: 512 on a CPU, whose cache holds it; 4096 elsewhere, with 128 MiB of memory, so
            that the time goes into the tiles and not into launching them.
        gather: Whether images of all processes are one batch (:mod:`hfproj.distributed`).

    Raises:
        UsageError: If there is one image over all processes, or a second derivative is asked for.

    Example:
        >>> loss, cosine = tiled_nt_xent(torch.eye(4)[:2].repeat(2, 1, 1), temperature=1.0)  # two equal views each
        >>> round(loss.item(), 4), cosine.item()  # ln(e + 2) - 1
        (0.5514, 1.0)
    """
    if tile_rows is None:
        tile_rows = _CPU_TILE if u.device.type == "cpu" else _GPU_TILE
    return _TiledNTXent.apply(u, temperature, tile_rows, gather and distributed.world_size() > 1)


def check_images(images: int, method: str = "NT-Xent") -> None:
    """Raise a UsageError, in the name of `method`, if there are fewer than two images over all processes."""
    if images < 2:
        raise UsageError(
            f"{method} tells images of a batch apart and needs at least 2 of them, got {images} over all processes: "
            "use a larger batch, or drop the last incomplete batch."
        )


class _TiledNTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, temperature: float, tile_rows: int, gather: bool) -> tuple[Tensor, Tensor]:
        views, images, dim = u.shape
        counts = distributed.row_counts(images, u.device) if gather else [images]
        check_images(sum(counts))
        first = sum(counts[: distributed.rank()]) * views if gather else 0
        # Over processes rows are sorted by image, so that those of a rank are a slice of all; alone, no copy is made.
        by_image, axis = (u.transpose(0, 1).contiguous(), 1) if gather else (u.contiguous(), 0)
        local = by_image.view(-1, dim)
        rows = distributed.gather_rows(by_image, counts=counts).view(-1, dim) if gather else local
        tiles = _Tiles(local, rows, first, temperature, tile_rows)
        lse = tiles.log_sum_exp()
        image_sum = by_image.sum(axis, keepdim=True)  # without the row itself: the sum of its positives
        cosine = (by_image * (image_sum - by_image)).sum(-1).flatten() / (views - 1)
        all_lse = lse
        if gather:
            per_row = distributed.gather_rows(torch.stack([lse, cosine], 1), counts=[n * views for n in counts])
            all_lse, cosine = per_row.unbind(1)
        cosine = cosine.mean()
        loss = all_lse.mean() - cosine / temperature
        if ctx.needs_input_grad[0]:
            pull = 2 / (views - 1)
            grad = tiles.weighted_rows(lse, all_lse).view_as(by_image)
            grad.add_(by_image, alpha=pull).sub_(image_sum, alpha=pull)
            grad.mul_(len(counts) / (len(rows) * temperature))  # len(counts): what a summing backward would add up
            ctx.save_for_backward(u, grad.transpose(0, 1) if gather else grad)
        ctx.mark_non_differentiable(cosine)
        return loss, cosine

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        u, grad = ctx.saved_tensors
        grad = grad_loss * grad
        return _NoSecondDerivative.apply(grad, u) if torch.is_grad_enabled() else grad, None, None, None


class _NoSecondDerivative(torch.autograd.Function):  # without it, the second derivative would silently be zero
    @staticmethod
    def forward(ctx: Any, grad: Tensor, u: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        hint = "For Hessians and gradient penalties use the dense form: create_objective('nt_xent', tile_rows=None)"
        raise UsageError(f"The tiled NT-Xent has first derivatives only. {hint}.")


class _Tiles:
    """Tiles of S = local @ rows.T / τ without self-similarity, where ``local = rows[first : first + len(local)]``."""

    def __init__(self, local: Tensor, rows: Tensor, first: int, temperature: float, edge: int):
        self.local, self.rows, self.first, self.edge = local, rows, first, edge
        self.scale = 1 / temperature
        self.symmetric = len(local) == len(rows)
        # |S| <= 1/τ, so one shift for all rows leaves exp(S - shift) a normal float32 while 2/τ < 80; it saves half
        # of the exponentials. Colder than that, each row is shifted by its own maximum.
        self.shift = 1 / temperature if 2 / temperature < 80 else None
        self.buffers = local.new_empty(2, min(edge, len(local)) * min(edge, len(rows)))

    def __iter__(self):
        for i in range(0, len(self.local), self.edge):
            anchors = self.local[i : i + self.edge]
            for j in range(i if self.symmetric else 0, len(self.rows), self.edge):
                columns = self.rows[j : j + self.edge]
                shape = len(anchors), len(columns)
                tile, spare = (buffer[: shape[0] * shape[1]].view(shape) for buffer in self.buffers)
                torch.addmm(tile, anchors, columns.T, beta=0, alpha=self.scale, out=tile)
                if self.shift is not None:
                    tile.sub_(self.shift).exp_()
                offset = self.first + i - j
                if -shape[0] < offset < shape[1]:
                    tile.diagonal(offset).fill_(-torch.inf if self.shift is None else 0)
                mirrored = self.symmetric and i != j  # stands for its transpose too
                yield slice(i, i + shape[0]), slice(j, j + shape[1]), tile, spare, mirrored

    def log_sum_exp(self) -> Tensor:
        """Return ℓ of the local rows."""
        with full_precision(self.local):
            if self.shift is not None:
                total = self.local.new_zeros(len(self.local))
                for i, j, tile, _, mirrored in self:
                    total[i] += tile.sum(1)
                    if mirrored:
                        total[j] += tile.sum(0)
                return total.log_().add_(self.shift)
            lse = self.local.new_full((len(self.local),), -torch.inf)
            for i, j, tile, _, mirrored in self:
                lse[i] = torch.logaddexp(lse[i], tile.logsumexp(1))
                if mirrored:
                    lse[j] = torch.logaddexp(lse[j], tile.logsumexp(0))
            return lse

    def weighted_rows(self, lse: Tensor, all_lse: Tensor) -> Tensor:
        """Return Σ_j (exp(S_ij − ℓ_i) + exp(S_ij − ℓ_j)) u_j for the local rows i."""
        out = torch.zeros_like(self.local)
        if self.shift is not None:
            lse, all_lse = (self.shift - lse).exp(), (self.shift - all_lse).exp()
        with full_precision(self.local):
            for i, j, tile, spare, mirrored in self:
                if self.shift is not None:
                    torch.add(lse[i].unsqueeze(1), all_lse[j], out=spare)
                    tile.mul_(spare)
                else:
                    torch.sub(tile, lse[i].unsqueeze(1), out=spare)
                    tile.sub_(all_lse[j]).exp_().add_(spare.exp_())
                out[i].addmm_(tile, self.rows[j])
                if mirrored:
                    out[j].addmm_(tile.T, self.local[i])
        return out
