"""What making a model may take: the bytes of its tensors and the number of its modules, counted while it is made."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from hfproj import limits
from hfproj.errors import AdapterFileError


@contextmanager
def allowance(largest: int, what: str, hint: str) -> Iterator[None]:
    """Refuse, by an `AdapterFileError`, modules with more than `largest` bytes of tensors, or too many modules.

    On the meta device it takes no memory to find out.
    """
    found, modules, thread = 0, 0, threading.get_ident()

    def check() -> None:
        if found > largest or modules > limits.BACKBONE_MODULES:
            beyond = f"{found:,} bytes of tensors" if found > largest else f"{modules:,} modules"
            most = largest if found > largest else limits.BACKBONE_MODULES
            raise AdapterFileError(f"{what} would take {beyond} or more, and {most:,} are allowed; {hint}.")

    def tensor(_: nn.Module, name: str, value: Any) -> None:
        nonlocal found
        if isinstance(value, Tensor) and threading.get_ident() == thread:
            found += value.numel() * value.element_size()
            check()

    def module(*_: Any) -> None:
        nonlocal modules
        modules += threading.get_ident() == thread
        check()

    handles = [
        registration.register_module_parameter_registration_hook(tensor),
        registration.register_module_buffer_registration_hook(tensor),
        registration.register_module_module_registration_hook(module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class NoInitialisation(TorchFunctionMode):
    """Leaves out what fills tensors of the meta device, which takes most of the time that a model is made in."""

    _FILLS = frozenset(("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "copy_"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        filled = args[0] if args else options.get("tensor")
        if getattr(func, "__name__", "") in self._FILLS and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled
        return func(*args, **options)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Return what `make` makes, as shapes without values where that can be."""
    from accelerate import init_empty_weights

    try:
        with torch.device("meta"), NoInitialisation():
            return make()
    except (RuntimeError, NotImplementedError):  # it reads a number from a tensor while it is made
        with init_empty_weights():
            return make()


def bytes_of(make: Callable[[], nn.Module], largest: int, what: str, hint: str) -> int:
    """Return the bytes of a model's tensors, which are not made; more than `largest` are an `AdapterFileError`."""
    with allowance(largest, what, hint):
        made = on_meta(make)
    return sum(t.numel() * t.element_size() for t in made.state_dict().values())
