"""The public names: the same for Python, type checkers and editors; no function shares its name with a module."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import hfproj

PACKAGE = Path(hfproj.__file__).parent
ROOMS = sorted(m.name for m in pkgutil.iter_modules(hfproj.__path__) if m.name != "__main__")
PACKAGES = ["hfproj", *(m.name for m in pkgutil.walk_packages(hfproj.__path__, "hfproj.") if m.ispkg)]


def lazy_tables():
    """Yield each lazy package with the names that it imports for type checkers, and those of its table."""
    for name in PACKAGES:
        tree = ast.parse(Path(importlib.import_module(name).__file__).read_text(encoding="utf-8"))
        blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "lazy_names"]
        if calls:
            seen = {
                (node.module.removeprefix(name).lstrip("."), alias.name)
                for block in blocks
                for node in ast.walk(block)
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            table = {(m, n) for m, names in ast.literal_eval(calls[0].args[1]).items() for n in names}
            rooms = ast.literal_eval(calls[0].args[2]) if len(calls[0].args) > 2 else []
            yield name, seen, table | {("", room) for room in rooms}


@pytest.mark.parametrize(("name", "seen", "table"), list(lazy_tables()), ids=lambda v: v if isinstance(v, str) else "")
def test_type_checkers_see_what_python_sees(name, seen, table):
    assert seen == table
    package = importlib.import_module(name)
    assert set(package.__all__) == {n for module, n in table if module}
    for _, public in table:
        assert getattr(package, public) is not None
        assert public in dir(package)


@pytest.mark.parametrize("name", PACKAGES)
def test_all_names_exist(name):
    package = importlib.import_module(name)
    for public in getattr(package, "__all__", []):
        assert getattr(package, public) is not None


@pytest.mark.parametrize("name", PACKAGES)
def test_no_function_shares_its_name_with_a_module(name):
    package = importlib.import_module(name)
    modules = {m.name for m in pkgutil.iter_modules(package.__path__)}
    for public in {*getattr(package, "__all__", []), *modules}:
        assert public not in modules or inspect.ismodule(getattr(package, public, package)), f"{name}.{public}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_an_attribute(room):
    assert room in dir(hfproj)
    assert inspect.ismodule(getattr(hfproj, room))


def test_a_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="ProjectionTrainr"):
        hfproj.ProjectionTrainr
