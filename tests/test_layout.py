"""The layout: imports point down only, collectives live in one file, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hfproj"
RANKS = [
    {"errors", "typing", "registry", "distributed", "files", "filenames", "lazy"},
    {"functional"},
    {"heads", "objectives", "regularizers", "diagnostics", "geometry"},
    {"backbones", "tuner", "data", "results"},
    {"features"},
    {"probes"},
    {"presets", "plots", "reporting"},
    {"hub"},
    {"training", "converters", "export"},
    {"studies"},
    {"cli"},
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


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_collectives_live_in_one_file(file):
    if file.name != "distributed.py":
        text = file.read_text(encoding="utf-8")
        assert "torch.distributed" not in text, "use hfproj.distributed"


def test_recipes_use_public_modules_only():
    for file in (PACKAGE.parent / "recipes").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("recipes"), "a recipe never imports a recipe"
                assert not any(a.name.startswith("_") for a in node.names)


def test_import_registers_the_method_and_loads_no_trainer_or_plots():
    code = (
        "import hfproj, sys; from peft import PeftType; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m;"
        "assert PeftType('PROJECTION_HEAD') in m;"
        "print([n for n in ('matplotlib', 'sklearn', 'datasets', 'timm', 'hfproj.training') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
