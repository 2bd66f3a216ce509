"""Registries: lazy names, errors with a suggestion, classes of the user's own."""

import pytest
from torch import nn

from hfproj.errors import UsageError
from hfproj.heads import HEADS
from hfproj.objectives import OBJECTIVES
from hfproj.registry import Registry


class Doubling(nn.Module):
    """z = 2h."""

    def __init__(self, *, in_dim: int, factor: float = 2.0):
        super().__init__()
        self.in_dim = self.out_dim = in_dim
        self.factor = factor


@pytest.fixture
def registry():
    return Registry("head", {"linear": ("torch.nn:Linear", "a linear layer")})


@pytest.mark.parametrize("registry", [HEADS, OBJECTIVES], ids=lambda registry: registry.kind)
def test_every_entry_is_a_module_with_a_line(registry):
    for name, line in registry.list().items():
        assert issubclass(registry.get(name), nn.Module)
        assert line
        assert "\n" not in line


def test_a_class_of_ones_own(registry):
    registry.register("doubling", Doubling)
    assert registry.list() == {"doubling": "z = 2h.", "linear": "a linear layer"}
    assert registry.create("doubling", in_dim=3, factor=4.0).factor == 4.0
    with pytest.raises(UsageError, match="'doubling' exists already"):
        registry.register("doubling", Doubling)


def test_unknown_names_and_options(registry):
    with pytest.raises(UsageError, match=r"Unknown head 'liner'\. Did you mean 'linear'"):
        registry.create("liner")
    registry.register("doubling", Doubling)
    with pytest.raises(UsageError, match="Did you mean 'factor'"):
        registry.create("doubling", in_dim=3, factr=1)


def test_listing_imports_no_entry():
    registry = Registry("head", {"absent": ("no_such_module:Head", "never imported")})
    assert registry.list() == {"absent": "never imported"}
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        registry.get("absent")
