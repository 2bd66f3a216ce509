"""How large the rooms are: `python tests/counts.py` prints lines of code, lines in all and files of each.

Lines of code are those with anything but blanks, comments and docstrings.
"""

import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "hfproj"
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines of code."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            documentation |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - documentation


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield the name and the lines of code of every function and method."""
    code = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, len(code & set(range(node.lineno, node.end_lineno + 1)))


def rooms(package: Path = PACKAGE) -> dict[str, list[int]]:
    """Return room → [lines of code, lines in all, files]."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for file in sorted(package.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        room = counts[file.relative_to(package).parts[0]]
        for i, more in enumerate((len(code_lines(source)), source.count("\n"), 1)):
            room[i] += more
    return dict(counts)


if __name__ == "__main__":
    found = rooms(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
    print(f"{'':20}{'code':>8}{'lines':>8}{'files':>8}")
    for name, counts in found.items():
        print(f"{name:20}" + "".join(f"{count:8,}" for count in counts))
    for name, chosen in (("all but studies", set(found) - {"studies"}), ("all", set(found))):
        print(f"{name:20}" + "".join(f"{sum(found[room][i] for room in chosen):8,}" for i in range(3)))
