"""Small files, small rooms: what is larger is two things."""

import pytest
from counts import PACKAGE, functions, rooms

LINES_OF_A_FILE = 400
CODE_OF_A_FUNCTION = 60
LINES_OF_A_ROOM = 3800


@pytest.mark.parametrize("folder", [PACKAGE, PACKAGE.parent / "recipes"], ids=lambda f: f.name)
def test_files_and_functions(folder):
    large = []
    for file in sorted(folder.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        lines = source.count("\n")
        large += [f"{file.name}: {lines} lines"] * (lines > LINES_OF_A_FILE)
        large += [f"{file.name}:{name}: {code} lines" for name, code in functions(source) if code > CODE_OF_A_FUNCTION]
    assert not large


def test_rooms():
    counts = rooms()
    assert {room: lines for room, (_, lines, _) in counts.items() if lines > LINES_OF_A_ROOM} == {}
