"""The tests' own checks of types and shapes find what is wrong, in every kind of function."""

from collections.abc import Iterator
from dataclasses import dataclass

import beartype
import jaxtyping
import pytest
import torch
import type_checks
from jaxtyping import Float
from torch import Tensor

from hfproj.files import write_atomic
from hfproj.functional.rows import unit_rows
from hfproj.results import Measurement

checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)


@checked
def number(x: int, *, text: "str" = "a") -> int:
    return text if x == 7 else x


@checked
def same(x: Float[Tensor, "rows dim"], y: Float[Tensor, "rows other"]) -> Float[Tensor, "rows"]:
    return x[:, 0] if len(x) < 4 else x[0]


@checked
def rows(count: int) -> Iterator[int]:
    yield from range(count)


@checked
class Kinds:
    @property
    @checked
    def wrong(self) -> int:
        return "a"

    @classmethod
    @checked
    def of(cls, x: int) -> int:
        return x

    @staticmethod
    @checked
    def at(x: list[int]) -> int:
        return x[0]


@checked
@dataclass
class Made:
    x: int


def nested(x):
    @checked
    def inner(y: int) -> int:
        return x + y

    return inner


def test_what_is_right_passes():
    assert number(3, text="b") == 3
    assert same(torch.ones(3, 2), torch.ones(3, 5)).shape == (3,)
    assert (list(rows(2)), Kinds.of(2), Kinds.at([4]), Made(2).x, nested(1)(2), nested(3)(2)) == ([0, 1], 2, 4, 2, 3, 5)
    assert number.__name__ == "number"
    assert number.__annotations__["text"] == "str"


@pytest.mark.parametrize("call", [
    lambda: number("a"),
    lambda: number(1, text=2),
    lambda: number(7),
    lambda: same(torch.ones(3, 2), torch.ones(4, 2)),
    lambda: same(torch.ones(5, 2), torch.ones(5, 2)),
    lambda: same(torch.ones(3), torch.ones(3, 2)),
    lambda: rows("a"),
    lambda: Kinds().wrong,
    lambda: Kinds.of("a"),
    lambda: Kinds.at(["a"]),
    lambda: Made("a"),
    lambda: nested(1)("a"),
    lambda: unit_rows([1.0]),
    lambda: write_atomic("a", "text"),
    lambda: Measurement(name=3, value=1.0, layer="h"),
])  # fmt: skip
def test_what_is_wrong_does_not(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_a_handler_of_a_signal_amid_the_checks_of_another_function_does_not_wait_for_itself(monkeypatch):
    def amid(fn, typechecker):
        if fn.__name__ == "outer":
            assert inner(1) == 1  # as a handler would be called, while the lock is held
        return original(fn, typechecker)

    def outer(x: int) -> int:
        return x

    def inner(x: int) -> int:
        return x

    original = type_checks._checked
    monkeypatch.setattr(type_checks, "_checked", amid)
    outer, inner = (type_checks._lazily(fn, beartype.beartype) for fn in (outer, inner))
    assert outer(1) == 1
    with pytest.raises(Exception, match="inner"):  # which has its checks afterwards
        inner("a")
