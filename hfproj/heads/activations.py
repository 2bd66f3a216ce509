"""Activations that heads know by name."""

from torch import nn

from hfproj.errors import unknown

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,  # the exact form, by the error function
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
}


def create_activation(name: str) -> nn.Module:
    """Make an activation by its name.

    Raises:
        UsageError: no activation has this name.

    Example:
        >>> import torch
        >>> create_activation("relu")(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()
