"""Registries: lazy names, errors with a suggestion, classes of the user's own."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import hfproj
from hfproj.errors import UsageError
from hfproj.heads import HEADS
from hfproj.objectives import OBJECTIVES
from hfproj.probes import PROBES
from hfproj.registry import Registry
from hfproj.regularizers import REGULARIZERS


class Doubling(nn.Module):
    """z = 2h."""

    def __init__(self, *, in_dim: int, factor: float = 2.0):
        super().__init__()
        self.in_dim = self.out_dim = in_dim
        self.factor = factor


class Positional(nn.Module):
    """Can't be made by name."""

    def __init__(self, size, /):
        super().__init__()

    def forward(self, z, **given):
        return z


class Alone(nn.Module):
    """Takes nothing, and as an objective nothing but z."""

    def __init__(self, *, in_dim=3):
        super().__init__()

    def forward(self, *, step=None): ...


class OnModels:
    """Measures models: scored on a data set alone."""

    name, on = "on_models", "model"

    def fit(self, model, train): ...

    def score(self, test): ...


class Unlabelled(OnModels):
    """Measures features, without their labels."""

    on = "features"


class Empty:
    """Has nothing that a registered class needs."""


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
    with pytest.raises(UsageError, match="'doubling', which exists"):
        registry.register("doubling", Doubling)


@pytest.mark.parametrize("kind", ["head", "objective", "regularizer", "probe"])
def test_registering_is_the_same_for_every_kind(kind):
    registry = {"head": HEADS, "objective": OBJECTIVES, "regularizer": REGULARIZERS, "probe": PROBES}[kind]
    register = getattr(hfproj, f"register_{kind}")
    assert list(inspect.signature(register).parameters) == ["name", "cls", "line"]
    for name in registry.list():
        registry.check(registry.get(name))  # what is asked of a class of the user's own holds for ours
    taken = next(iter(registry.list()))
    with pytest.raises(UsageError, match=f"Expected a new name for an? {kind}, got '{taken}'"):
        register(taken, registry.get(taken))
    for other, message in [(Empty, r"^Expected a"), (Empty(), r"got <.*pass the class, not an instance\.$")]:
        with pytest.raises(UsageError, match=message):
            registry.check(other)


@pytest.mark.parametrize(
    ("registry", "cls", "message"),
    [
        (
            PROBES,
            Empty,
            "Expected a probe with name and fit and score, got Empty without name, fit, score",
        ),
        (PROBES, dict, "got dict without name, fit, score"),
        (HEADS, nn.ReLU, r"got ReLU without __init__\(in_dim=…\); define it"),
        (HEADS, nn.Module, "got Module without forward; define it"),
        (HEADS, Empty, "Expected a subclass of Module as a head, got <class"),
        (OBJECTIVES, nn.Module, "got Module without forward; define it"),
        (REGULARIZERS, Empty, "Expected a subclass of Module as a regularizer"),
    ],
)
def test_classes_that_lack_what_is_needed_are_refused(registry, cls, message):
    with pytest.raises(UsageError, match=message):
        registry.check(cls)


@pytest.mark.parametrize(
    ("registry", "cls", "message"),
    [
        (
            OBJECTIVES,
            nn.Linear,
            r"^Expected forward\(z, labels=…, .*step=…\).*got Linear\.forward\(input\): .*'labels'; let",
        ),
        (OBJECTIVES, Alone, r"got Alone\.forward\(\*, step=None\): .*those that it does not use as \*\*others\.$"),
        (
            REGULARIZERS,
            nn.Linear,
            r"^Expected forward\(model, h, z, step=…\), as each regularizer is called, got Linear",
        ),
        (HEADS, Alone, r"^Expected forward\(h\), as each head is called, got .*; let it take all of these\.$"),
        (PROBES, Unlabelled, r"^Expected score\(features, labels\), .*got Unlabelled\.score\(test\)"),
        (OBJECTIVES, Positional, r"got Positional without __init__\(size=…\); define it"),
    ],
)
def test_classes_that_could_not_be_called_are_refused_when_they_are_registered(registry, cls, message):
    with pytest.raises(UsageError, match=message):
        registry.register("uncallable", cls)
    assert "uncallable" not in registry.list()


def test_a_probe_of_models_is_scored_on_a_data_set():
    PROBES.check(OnModels)


def test_unknown_names_and_options(registry):
    with pytest.raises(UsageError, match=r"Unknown head 'liner'\. Did you mean 'linear'"):
        registry.create("liner")
    registry.register("doubling", Doubling)
    with pytest.raises(UsageError, match="Did you mean 'factor'"):
        registry.create("doubling", in_dim=3, factr=1)


class Typed(nn.Module):
    """Has options of every type that constructors here have."""

    def __init__(
        self,
        *,
        number: float = 1.0,
        count: int | None = None,
        flag: bool = True,
        word: str = "a",
        pair: Sequence[float] = (0.0, 1.0),
        options: dict[str, Any] | None = None,
        weights: float | dict[str, float] = 1.0,
    ):
        super().__init__()


class Unreadable(nn.Module):
    """Has an annotation that names nothing."""

    def __init__(self, *, number: "float | Nothing" = 1.0):
        super().__init__()


class Needing(nn.Module):
    """Has an option without a default."""

    def __init__(self, *, size: int):
        super().__init__()


@pytest.mark.parametrize(
    ("option", "right", "wrong", "words"),
    [
        ("number", [2, 0.5, numpy.float32(1)], ["0.1", None, True, [0.1], torch.tensor(0.1)], "a number"),
        ("count", [3, None, numpy.int64(3)], [3.0, "3", False], "a whole number or None"),
        ("flag", [False], ["no", 0, None], "True or False"),
        ("word", ["b"], [3, None], "a string"),
        ("pair", [[1, 2], (0.9, 1.0)], [0.9, "0.9", ["a", "b"], [None]], "a list"),
        ("options", [{"a": 1}, None], [3, "{}", [("a", 1)]], "a dict or None"),
        ("weights", [2.0, {"a": 1}], ["2", {"a": "1"}], "a number or a dict"),
    ],
)
def test_values_have_the_type_of_their_option(registry, option, right, wrong, words):
    registry.register("typed", Typed)
    for value in right:
        registry.create("typed", **{option: value})
    for value in wrong:
        with pytest.raises(
            UsageError, match=rf"^Expected {option} of head 'typed' to be {words}, got .* of type \w+\.$"
        ):
            registry.create("typed", **{option: value})


def test_annotations_that_cannot_be_read_are_not_checked(registry):
    registry.register("unreadable", Unreadable)
    assert isinstance(registry.create("unreadable", number="a"), Unreadable)


def test_options_without_a_default_are_asked_for(registry):
    registry.register("needing", Needing)
    with pytest.raises(UsageError, match=r"The head 'needing' needs size=…\."):
        registry.create("needing")


def test_options_without_a_default_may_be_positional_too(registry):
    with pytest.raises(UsageError, match=r"The head 'linear' needs in_features=…, out_features=…\."):
        registry.create("linear")


def test_listing_imports_no_entry():
    registry = Registry("head", {"absent": ("no_such_module:Head", "never imported")})
    assert registry.list() == {"absent": "never imported"}
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        registry.get("absent")


@pytest.mark.parametrize("name", ["", "a b", "q/6"])  # of other types the tests' own type checker speaks first
def test_names_that_no_list_could_hold(name):
    with pytest.raises(UsageError, match=f"got {name!r}"):
        Registry("probe", {}).register(name, dict)
