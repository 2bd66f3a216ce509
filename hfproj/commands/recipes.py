"""The recipes, which the wheel ships and a checkout has in its folder ``recipes``: listed, copied, run."""

import ast
import os
import re
import runpy
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import hfproj
from hfproj.commands import tables
from hfproj.commands.arguments import LAUNCHER, SUFFIXES, help_wanted, read_arguments, split_files
from hfproj.commands.flags import page
from hfproj.errors import UsageError, unknown
from hfproj.files import write_atomic

PACKAGE = Path(hfproj.__file__).resolve().parent
KINDS = "heads", "objectives", "regularizers", "probes", "presets", "studies", "recipes"
_BRIEF = 4  # lines of the names of a kind, where all kinds are listed
_RECIPE = re.compile(
    r"(?:ACCELERATE_USE_CPU=true )?(?:python|accelerate launch)((?: --\S+(?: \d+)?)*) recipes/(\w+)\.py"
)


def folder() -> Path:
    """Return where the recipes lie: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def results_folder(recipe: str, name: str) -> Path:
    """Return where a recipe keeps its results by default: beside itself, and if it is an installed one, below ``out``.

    Example:
        >>> results_folder("/home/someone/recipes/geometry.py", "results/geometry").as_posix()
        '/home/someone/recipes/results/geometry'
    """
    beside = Path(recipe).resolve().parent
    return Path("out") / Path(name).name if beside == PACKAGE / "recipes" else beside / name


def path_of(recipe: str) -> Path:
    """Return the file of a recipe that ships, by its name, or of one's own, by its path.

    Raises:
        UsageError: If there is none.
    """
    names = tables.read()["recipes"]
    if recipe.endswith(".py"):
        path = Path(recipe).expanduser()
        if path.is_file():
            return path
        hint = f"; {path.stem} ships: leave '.py' out" if path.name == recipe and path.stem in names else ""
        raise UsageError(f"Expected the path of a recipe, got {recipe!r}, where no file is{hint}.")
    if recipe not in names:
        raise unknown("recipe", recipe, names)
    return folder() / f"{recipe}.py"


# --- ls ---


def listing(kind: str | None = None) -> str:
    """Return what is registered, of a kind with a line each, or the names of all kinds.

    Raises:
        UsageError: If there is no such kind.
    """
    table = tables.read()
    if kind is None:
        return "\n\n".join(_brief(kind, table) for kind in KINDS) + "\n\nhfproj ls KIND says what each is.\n"
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    lines = table["names"][kind] if kind != "recipes" else {n: of["line"] for n, of in table["recipes"].items()}
    width = max(map(len, lines))
    return "".join(f"{name:{width}}  {line}\n" for name, line in lines.items())


def _brief(kind: str, table: Mapping) -> str:
    names = list(table["names"][kind] if kind != "recipes" else table["recipes"])
    lines = textwrap.wrap(", ".join(names), 110, break_on_hyphens=False)
    more = [f"… all of them: hfproj ls {kind}"] if len(lines) > _BRIEF else []
    return "\n  ".join([f"{kind} ({len(names)})", *lines[:_BRIEF], *more])


# --- cp ---


def copy(recipe: str, to: str | None = None) -> Path:
    """Copy a recipe that ships to a file or into a folder, by default the working directory; return the file.

    Raises:
        UsageError: If there is no such recipe, or the file exists.
    """
    source, target = path_of(recipe), Path(to or ".").expanduser()
    target = target / source.name if target.is_dir() or (to or "").endswith(("/", os.sep)) else target
    if target.suffix != ".py":
        raise UsageError(f"Expected the name of a Python file or a folder to copy to, got {str(target)!r}.")
    if target.exists():
        raise UsageError(f"Expected a new file to copy to, got {str(target)!r}, which exists; give another name.")
    try:
        write_atomic(target, source.read_bytes())
    except OSError as error:
        raise UsageError(f"Expected a place that can be written to, got {str(target)!r} ({error.strerror}).") from error
    return target


# --- run ---


def document(path: Path, *, launched: bool) -> str:
    """Return the docstring of a recipe; `launched`: with its commands as ``hfproj run`` has them."""
    text = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    run = partial(_RECIPE.sub, lambda found: f"hfproj run {found[2]}{found[1].replace(' --multi_gpu', '')}")
    return run(text) if launched else text


def known_help(path: Path, words: Sequence[str], *, launched: bool) -> str | None:
    """Return the help of a recipe from the table, or None where that could be another's: of a copy that was changed.

    Args:
        path: The recipe.
        words: Its command line.
        launched: Whether ``hfproj run`` shows it, so that the commands in it are those of ``hfproj run``.
    """
    wanted, known = help_wanted(words), tables.of_recipe(path)
    if wanted is None or known is None or (wanted == "all" and not known.current):
        return None
    return page(document(path, launched=launched), known.flags, shown=known.shown, every=wanted == "all")


def start(file: str) -> None:
    """Begin a recipe: answer ``--help`` before anything large is imported, and let idle threads sleep.

    On a shared CPU threads that spin while they wait cost more than they save: ``OMP_WAIT_POLICY=PASSIVE``, which is
    read when torch is imported, unless it is set.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    path = Path(file).resolve()
    if Path(sys.argv[0]).resolve() == path and (text := known_help(path, sys.argv[1:], launched=False)):
        sys.stdout.write(text)
        sys.exit(0)


def run_recipe(recipe: str, words: Sequence[str]) -> None:
    """Run a recipe by name, or a copy by path: in this process, or by accelerate's launcher.

    Raises:
        UsageError: If there is no such recipe, or the launcher's arguments are wrong.
    """
    path = path_of(recipe)
    if (text := known_help(path, words, launched=True)) is not None:
        sys.stdout.write(text)
        return
    os.environ["HFPROJ_RECIPE"] = recipe  # for `hfproj.files.command_line`
    if _is_launched(words):
        from hfproj.commands.launching import launch

        launch(path, words)
    else:
        sys.argv = [str(path), *words]
        sys.path[0] = str(path.resolve().parent)  # as `python recipe.py` does
        runpy.run_path(str(path), run_name="__main__")


def _is_launched(words: Sequence[str]) -> bool:
    named = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    in_files = {name for file in split_files(words)[0] if file.endswith(SUFFIXES) for name in read_arguments(file)}
    return bool({*named, *in_files} & {*LAUNCHER})
