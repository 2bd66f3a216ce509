"""The layout: imports point down only, collectives live in one file, and importing the package is cheap."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hfproj"
_FLOOR_0 = (
    "errors hints typing checking registry distributed files filenames lazy limits redaction secret_names strict_json"
)
RANKS = [
    set(_FLOOR_0.split()),
    {"functional"},
    {"heads", "objectives", "regularizers", "diagnostics", "geometry"},
    {"backbones", "tuner", "data", "results"},
    {"saving"},
    {"features", "shifts"},
    {"probes"},
    {"presets", "plots", "reporting"},
    {"hub"},
    {"training", "converters", "export", "inspection"},
    {"reproduction"},
    {"studies"},
    {"commands"},
    {"cli", "__main__"},
]
SIBLINGS_APART = 2  # heads, objectives … do not import each other


def rank_of(part: str) -> int:
    return next(i for i, parts in enumerate(RANKS) if part in parts)


def imported_parts(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hfproj"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hfproj.")}
    return found


FILES = sorted(f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for part in imported_parts(file) - {own}:
        assert rank_of(part) <= rank_of(own), f"{own} (rank {rank_of(own)}) imports {part} (rank {rank_of(part)})"
        if rank_of(part) == rank_of(own):
            assert rank_of(own) != SIBLINGS_APART, f"{own} and {part} are siblings"


def for_checkers_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(node: ast.AST, *, functions: bool) -> list[ast.AST]:
    """Return the statements that run, those in functions included or not; blocks for type checkers are left out."""
    found = []
    for child in ast.iter_child_nodes(node):
        if for_checkers_only(child):
            found += [s for part in child.orelse for s in [part, *statements(part, functions=functions)]]
        elif functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += [child, *statements(child, functions=functions)]
    return found


def imported_modules(file: Path, *, functions: bool) -> set[str]:
    """Return the modules of this package that a file imports: of ``from a import b`` a.b, where that is a module."""
    found = set()
    for node in statements(ast.parse(file.read_text(encoding="utf-8")), functions=functions):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = {f"{node.module}.{a.name}" for a in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def test_nothing_imports_a_study():
    """They are the top floor; what reaches them by name says so in a string (`hfproj.lazy`, the registries)."""
    for name, file in MODULES.items():
        if not name.startswith("hfproj.studies"):
            found = imported_modules(file, functions=True)
            assert not [m for m in found if m.startswith("hfproj.studies")], f"{name} imports a study"


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Return the circles of a graph, one for each edge that closes one."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" → ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_imports_of_modules_have_no_circles():
    graph = {name: imported_modules(file, functions=False) - {name} for name, file in MODULES.items()}
    assert sum(map(len, graph.values())) > len(graph)
    assert not cycles(graph), "\n".join(cycles(graph))
    graph["hfproj.errors"] = {"hfproj.studies"}  # what would be found
    assert any("hfproj.errors" in circle for circle in cycles(graph))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_collectives_live_in_one_file(file):
    if file.name != "distributed.py":
        text = re.sub(r"torch\.distributed\.(elastic|run)\b", "", file.read_text(encoding="utf-8"))  # the launcher
        assert "torch.distributed" not in text, "use hfproj.distributed"


def test_recipes_use_public_modules_only():
    for file in (PACKAGE.parent / "recipes").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("recipes"), "a recipe never imports a recipe"
                assert not any(a.name.startswith("_") for a in node.names)


def test_import_registers_the_method_and_loads_no_trainer_or_plots():
    code = (
        "import sys; from peft import PeftType; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m;"
        "before = set(sys.modules); import hfproj;"
        "assert PeftType('PROJECTION_HEAD') in m;"
        "import warnings; warnings.warn('`is_gradient_checkpointing` is deprecated and …', FutureWarning);"
        "warnings.warn(\"Unsupported layer type 'torch.nn.LayerNorm'\", UserWarning);"
        "new = sys.modules.keys() - before;"
        "print([n for n in ('matplotlib', 'sklearn', 'datasets', 'timm', 'hfproj.training') if n in new])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""  # PEFT's doings warn nobody who attaches a head
