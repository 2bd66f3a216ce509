"""Heads and features that several tests of geometry share."""

import torch
from torch import Tensor, nn

import hfproj

ACTIVATIONS = ("identity", "relu", "leaky_relu", "gelu", "silu", "tanh", "softplus", "elu")


def two_layers(
    activation: str, in_dim: int, hidden_dim: int, out_dim: int, seed: int = 0, bias: bool = True
) -> nn.Module:
    """Return an MLP head without norm, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"hidden_dim": hidden_dim, "depth": 2, "activation": activation, "norm": None}
        head = hfproj.create_head("mlp", in_dim=in_dim, out_dim=out_dim, bias=bias, last_bias=bias, **options)
    return head.double().eval()


def weights(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Return W_1 and W_2."""
    return head.hidden[0].linear.weight.detach(), head.last.linear.weight.detach()


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def digit_features(rows: int) -> tuple[Tensor, Tensor]:
    """Return h of scikit-learn's digits from the small pretrained ViT, float64, and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:rows] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    x = nn.functional.interpolate(x, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    with torch.no_grad():
        tokens = hfproj.load_backbone("vit_nano")(pixel_values=x).last_hidden_state
    return tokens[:, 0].double(), torch.tensor(labels[:rows])
