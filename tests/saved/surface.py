"""The public surface of the package as JSON: names, signatures, registries, presets, options, file names.

    cd /tmp/base && PYTHONPATH=/tmp/base python …/tests/saved/surface.py > …/tests/saved/0.1.0/surface.json

`0.1.0/surface.json` was written at commit 455e39c. `tests/test_saved_files.py` compares it with today's, by way of the
table of what moved (`0.1.0/moves.json`): the only way for a name to vanish.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import sys
import types
from pathlib import Path
from typing import Any

import hfproj

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_FILE = re.compile(r"[\w.*-]*\w\.(json|safetensors|parquet|html|md|png|onnx|pt2|pt|pth|txt)")


def surface() -> dict[str, Any]:
    """Return the surface of the `hfproj` that is imported."""
    modules = sorted(m.name for m in pkgutil.walk_packages(hfproj.__path__, "hfproj.") if "._" not in m.name)
    packages, found = {"hfproj": _package(hfproj)}, {}
    for name in modules:
        module = importlib.import_module(name)
        if hasattr(module, "__path__"):
            packages[name] = _package(module)
        found[name] = sorted(n for n in _defined(module) if n not in packages.get(name, ()))
    return {
        "packages": packages,
        "modules": found,
        "registries": _registries(),
        "presets": {name: _preset(hfproj.get_preset(name)) for name in hfproj.list_presets()},
        "converters": sorted(hfproj.list_converters()),
        "corruptions": sorted(hfproj.list_corruptions()),
        "config": _fields(hfproj.ProjectionHeadConfig),
        "arguments": _fields(hfproj.ProjectionTrainingArguments),
        "files": _file_names(),
    }


def exists(path: str) -> bool:
    """Return whether ``hfproj.module.name`` can be imported."""
    module, _, name = path.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def _package(module: types.ModuleType) -> dict[str, Any]:
    return {name: _described(getattr(module, name)) for name in sorted(getattr(module, "__all__", []))}


def _defined(module: types.ModuleType) -> list[str]:
    """Return the public classes, functions and constants that a module itself defines."""
    own = []
    for node in ast.parse(Path(module.__file__ or "").read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            own.append(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        own += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in own if name[0] != "_"]


def _described(value: Any) -> Any:
    if inspect.isclass(value):
        methods = {}
        for cls in reversed(value.__mro__):
            if cls.__module__.partition(".")[0] != "hfproj":
                continue
            for name, member in vars(cls).items():
                if name[0] != "_" or name == "__call__":
                    if isinstance(member, property):
                        methods[name] = "property"
                    elif inspect.isroutine(member) or isinstance(member, classmethod | staticmethod):
                        methods[name] = _signature(getattr(value, name))
        own = _fields(value) if dataclasses.is_dataclass(value) else None
        init = [p for p in _signature(value) if own is None or p == "*" or p.partition("=")[0] in own]
        return {"init": init, "members": dict(sorted(methods.items()))}
    if callable(value):
        return {"call": _signature(value)}
    if isinstance(value, types.ModuleType):
        return "module"
    return type(value).__name__


def _signature(value: Any) -> list[str]:
    """Return "name" or "name=default" of each parameter, with a "*" before those that are given by keyword only."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):  # what is written in C
        return []
    words: list[str] = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        name = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        words.append(name if p.default is p.empty else f"{name}={_text(p.default)}")
    return words


def _text(value: Any) -> str:
    return value.__qualname__ if inspect.isroutine(value) or inspect.isclass(value) else _ADDRESS.sub("", repr(value))


def _fields(cls: Any) -> dict[str, str]:
    """Return the fields of a dataclass that a class of this package declares, with their defaults."""
    mro = [c for c in cls.__mro__ if c.__module__.partition(".")[0] == "hfproj"]
    own = {name for c in mro for name in vars(c).get("__annotations__", {})}
    return {
        f.name: _text(f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default)
        for f in dataclasses.fields(cls)
        if f.name in own
    }


def _registries() -> dict[str, Any]:
    from hfproj import heads, objectives, probes, regularizers

    tables = {
        "heads": heads.HEADS, "objectives": objectives.OBJECTIVES, "regularizers": regularizers.REGULARIZERS,
        "probes": probes.PROBES,
    }  # fmt: skip
    return {
        kind: {
            name: {
                n: "" if p.default is p.empty else _text(p.default)
                for n, p in registry.options(name).items()
                if p.kind is p.KEYWORD_ONLY
            }
            for name in registry.list()
        }
        for kind, registry in tables.items()
    }


def _preset(preset: Any) -> dict[str, Any]:
    words = ("line", "source")
    return {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset) if f.name not in words}


def _file_names() -> list[str]:
    """Return every string of the sources that is the name of a file which the package reads or writes."""
    found = set()
    for file in Path(hfproj.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _FILE.fullmatch(node.value):
                found.add(node.value)
    return sorted(found)


# --- comparing ---


@dataclasses.dataclass
class Moves:
    """The table of what moved: old path → new path, old path → why it was removed, or why it has another value.

    A path is that of a name (``hfproj.data.corrupt``), of a member (``hfproj.Results.merge``), or of a parameter
    (``hfproj.KNNProbe(metric)``); ``heads.mlp(bias)``, ``presets.byol``, ``files.results.json`` name what is no import.
    ``hfproj.data.cache.*`` stands for all names of a module.
    """

    moved: dict[str, str]
    removed: dict[str, str]
    changed: dict[str, str] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)

    def now(self, path: str) -> str | None:
        """Return where an old path is today: itself where the table doesn't have it, None where it was removed."""
        module, _, name = path.rpartition(".")
        for entry in (path, f"{module}.*"):
            if entry in self.moved:
                self.used.add(entry)
                return self.moved[entry].replace("*", name)
            if entry in self.removed:
                self.used.add(entry)
                return None
        return path


def lost(old: dict[str, Any], new: dict[str, Any], moves: Moves) -> list[str]:
    """Return what the old surface has and the new one lacks, one line each."""
    found: list[str] = []
    public = {f"{package}.{name}": what for package, names in new["packages"].items() for name, what in names.items()}
    for package, names in old["packages"].items():
        for name, what in names.items():
            path = f"{package}.{name}"
            if path in public and path not in moves.moved:
                found += _differences(path, what, public[path], moves)
            elif (now := moves.now(path)) is not None:
                if now in public:
                    found += _differences(path, what, public[now], moves)
                elif now == path or not exists(now):
                    found.append(path if now == path else f"{path} → {now}, which is not there")
    for module, defined in old["modules"].items():
        for path in (f"{module}.{name}" for name in defined):
            if not exists(path) and (now := moves.now(path)) is not None and not exists(now):
                found.append(path if now == path else f"{path} → {now}, which is not there")
    for kind, names in old["registries"].items():
        for name, options in names.items():
            there = new["registries"].get(kind, {}).get(name)
            found += _table(f"{kind}.{name}", options, there, moves)
    for kind in ("config", "arguments"):
        found += _table(kind, old[kind], new[kind], moves)
    for name, preset in old["presets"].items():
        found += _table(f"presets.{name}", preset, new["presets"].get(name), moves)
    for kind in ("converters", "corruptions", "files"):
        there = set(new[kind])
        found += [p for n in old[kind] if n not in there and moves.now(p := f"{kind}.{n}") == p]
    return found


def _table(path: str, old: dict[str, Any], new: dict[str, Any] | None, moves: Moves) -> list[str]:
    """Compare names with their defaults."""
    if new is None:
        return [path] if moves.now(path) == path else []
    found = []
    for name, value in old.items():
        entry = f"{path}({name})"
        if name not in new and moves.now(entry) == entry:
            found.append(entry)
        elif name in new and new[name] != value and entry in moves.changed:
            moves.used.add(entry)
        elif name in new and new[name] != value:
            found.append(f"{entry}: {value!r} became {new[name]!r}")
    return found


def _differences(path: str, old: Any, new: Any, moves: Moves) -> list[str]:
    """Compare two descriptions of a class or a function."""
    if not isinstance(old, dict):
        return []
    if not isinstance(new, dict):
        return [f"{path} is no class or function any more"]
    found = []
    for kind in ("init", "call"):
        if kind in old:
            found += _parameters(path, old[kind], new.get(kind, []), moves)
    for name, member in old.get("members", {}).items():
        there = new.get("members", {}).get(name)
        if there is None:
            found += [p] if moves.now(p := f"{path}.{name}") == p else []
        elif isinstance(member, list) and isinstance(there, list):
            found += _parameters(f"{path}.{name}", member, there, moves)
    return found


def _parameters(path: str, old: list[str], new: list[str], moves: Moves) -> list[str]:
    """Compare parameters: none may vanish, change its default, become required or, by position, change its place."""

    def split(words: list[str]) -> tuple[list[str], dict[str, str]]:
        stop = next((i for i, w in enumerate(words) if w[0] == "*"), len(words))
        names = [w.partition("=") for w in words if w[0] != "*"]
        return [w.partition("=")[0] for w in words[:stop]], {n: default for n, _, default in names}

    (order, was), (now_order, now) = split(old), split(new)
    found = []
    for name, default in was.items():
        entry = f"{path}({name})"
        if name not in now:
            found += [entry] if moves.now(entry) == entry else []
        elif default and now[name] != default and moves.now(entry) == entry:
            found.append(f"{entry}: the default {default} became {now[name] or 'required'}")
    kept = [name for name in order if name in now]
    if kept != now_order[: len(kept)] and moves.now(path) == path:
        found.append(f"{path}: by position {', '.join(kept)} became {', '.join(now_order)}")
    return found


if __name__ == "__main__":
    json.dump(surface(), sys.stdout, indent=1, sort_keys=True)
    print()
