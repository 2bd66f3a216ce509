"""What heads are made of: checks of their options and input, activations by name, and a head inside a head."""

from typing import Any

from torch import Tensor, nn

from hfproj.errors import UsageError, check_choice, check_type
from hfproj.heads import create_head
from hfproj.typing import OneOf

Activation = OneOf["identity", "relu", "leaky_relu", "gelu", "silu", "tanh", "softplus", "elu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,  # the exact form, by the error function
    "silu": nn.SiLU, "tanh": nn.Tanh, "softplus": nn.Softplus, "elu": nn.ELU,
}  # fmt: skip


def create_activation(name: Activation) -> nn.Module:
    """Make an activation by its name, one of `ACTIVATIONS`.

    Raises:
        UsageError: If no activation has this name.
    """
    check_choice("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def create_inner(name: str, *, in_dim: int, options: dict[str, Any] | None, out_dim: int | None) -> nn.Module:
    """Make the head `name` inside another one, whose `out_dim` (if given) is that of the inner head.

    Raises:
        UsageError: If `options` have another `out_dim`, or in the cases of `create_head`.
    """
    options = dict(options or {})
    if out_dim is not None and options.setdefault("out_dim", out_dim) != out_dim:
        got = f"out_dim={out_dim} beside out_dim={options['out_dim']} in its options"
        raise UsageError(f"Expected one width of the inner head {name!r}, got {got}; give the width once.")
    return create_head(name, in_dim=in_dim, **options)


def check_positive(name: str, value: object) -> int:
    """Return `value`, or raise `UsageError` if it is no integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"Expected {name} to be a whole number of at least 1, got {value!r}.")
    return value


def check_kept_width(who: str, in_dim: object, out_dim: object) -> int:
    """Return `in_dim`, or raise `UsageError` if it is no width, or if `out_dim` is given and differs."""
    width = check_positive("in_dim", in_dim)
    if out_dim not in (None, width):
        raise UsageError(
            f"Expected out_dim={width}, which is in_dim, got out_dim={out_dim}: {who} keeps the width; leave out_dim "
            "away, or use the head 'linear' to change the width."
        )
    return width


def check_input(head: nn.Module, h: Tensor, width: int) -> None:
    """Raise `UsageError` if `h` is neither ``[batch, width]`` nor ``[views, batch, width]``."""
    check_type("h", h, Tensor, "make a tensor of it: torch.tensor(…)")
    if h.is_meta and not any(p.is_meta for p in head.parameters()) and any(True for _ in head.parameters()):
        raise UsageError("Expected h with data, got a tensor of the device 'meta'; make it on the head's device.")
    if not h.is_floating_point() and any(p.is_floating_point() for p in head.parameters()):
        raise UsageError(f"Expected h in floating-point numbers, got {h.dtype}; convert it: h.float().")
    if h.ndim not in (2, 3) or h.shape[-1] != width:
        wanted = f"h of shape [batch, {width}] or [views, batch, {width}] for {type(head).__name__}"
        hint = f"make it with in_dim={h.shape[-1] if h.ndim else width}, or give it features of width {width}"
        hint = hint if h.ndim in (2, 3) else "pool tokens or feature maps to one vector per image first"
        raise UsageError(f"Expected {wanted}, got {list(h.shape)}; {hint}.")
