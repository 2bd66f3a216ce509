"""Checks types and shapes of hfproj's functions while tests run; a function's checks are made at its first call.

jaxtyping's import hook makes two functions of text for every function, and binds the arguments at each call, whether or
not a shape is among the annotations; that took a third of the suite's time. Here a function with a shape in its
annotations gets jaxtyping's checks as before, any other those of beartype alone, and neither before it is called.

While the hook executes a module of hfproj, whatever this imports is looked for in the hook's own bytecode cache, too:
up to two thousand files of other packages were compiled in each process. Here it is only the module's own code.
"""

import dataclasses
import functools
import importlib.machinery
import inspect
import typing
from unittest import mock

import beartype
import jaxtyping
from jaxtyping import _import_hook

__name__ = "jaxtyping.of_tests"  # its frames are skipped, as jaxtyping's are, where a warning names the caller

_of_jaxtyping = jaxtyping.jaxtyped
_of_beartype = beartype.beartype(conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def install():
    """Check all of hfproj that is imported from now on."""
    jaxtyping.jaxtyped = _jaxtyped  # what the hook writes above each function and class
    _import_hook._JaxtypingLoader = _Loader
    jaxtyping.install_import_hook("hfproj", "beartype.beartype")


class _Loader(_import_hook._JaxtypingLoader):
    exec_module = importlib.machinery.SourceFileLoader.exec_module

    def get_code(self, fullname):
        place = functools.partial(_import_hook._optimized_cache_from_source, self._typechecker.get_hash())
        with mock.patch("importlib._bootstrap_external.cache_from_source", place):
            return super().get_code(fullname)


def _jaxtyped(fn=None, *, typechecker=None):
    if fn is None:
        return functools.partial(_jaxtyped, typechecker=typechecker)
    if isinstance(fn, classmethod | staticmethod):
        return type(fn)(_lazily(fn.__func__, typechecker))
    if inspect.isfunction(fn):
        return _lazily(fn, typechecker)
    if dataclasses.is_dataclass(fn) and "__init__" in vars(fn) and not hasattr(fn.__init__, "__wrapped__"):
        fn.__init__ = _lazily(fn.__init__, typechecker)
    return fn


_at_work = False  # whether a function is being given its checks


def _lazily(fn, typechecker):
    if not fn.__annotations__:
        return fn
    checked = None

    @functools.wraps(fn)
    def checking(*args, **kwargs):
        global _at_work
        nonlocal checked
        __tracebackhide__ = True
        # A signal's handler may come while another function gets its checks; beartype's lock would wait for itself.
        if jaxtyping.config.jaxtyping_disable or (checked is None and _at_work):
            return fn(*args, **kwargs)
        if checked is None:
            _at_work = True
            try:
                checked = _checked(fn, typechecker)
            finally:
                _at_work = False
        return checked(*args, **kwargs)

    return checking


def _checked(fn, typechecker):
    try:
        hints = typing.get_type_hints(fn, include_extras=True)
    except NameError:  # imported for type checkers only; jaxtyping takes each such annotation for Any
        hints = None
    if hints is None or inspect.isgeneratorfunction(fn) or any(map(_has_shape, hints.values())):
        return _of_jaxtyping(fn, typechecker=typechecker)
    annotations, fn.__annotations__ = fn.__annotations__, hints
    try:
        return _of_beartype(fn)
    finally:
        fn.__annotations__ = annotations


def _has_shape(hint):
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(hint)))
