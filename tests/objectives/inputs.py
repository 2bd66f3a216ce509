"""Inputs that the tests of several objectives share."""

import torch


def projections(views=2, batch=5, dim=4):
    return torch.randn(views, batch, dim, dtype=torch.float64)


def extreme_projections(dtype, views=2):
    """No direction, duplicates, a positive pair at the far end and a huge norm; a leaf that requires a gradient."""
    z = torch.randn(views, 6, 4)
    z[:, 0] = 0
    z[:, 1] = z[:, 2]
    z[1, 3] = -z[0, 3]
    z[:, 4] *= 1e4
    return z.to(dtype).requires_grad_()


def same_directions(z):
    """Versions of z that differ by what objectives of unit rows must not see; the last three keep images together."""
    views, batch, dim = z.shape
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=z.dtype)).Q
    scale = torch.logspace(-3, 3, views * batch, dtype=z.dtype).view(views, batch, 1)
    return [z * scale, z @ rotation, z[:, torch.randperm(batch)]]
