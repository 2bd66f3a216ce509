r"""Strings of a `results.json` as Markdown: whatever they hold, the card keeps its structure.

A name, a note or a command may hold backticks, pipes, newlines, ``---``, HTML or letters that turn the direction of the
line. `inline` and `code` give one line that is text and nothing else; `fence` gives a block that its content can't end.
In templates of Markdown every ``{{ value }}`` goes through `escaped`, so that none can be forgotten.
"""

import re
import unicodedata

from markupsafe import Markup

_LONGEST = 300  # letters of a name or a note; more of them say nothing on a card
# Characters that Markdown, HTML or the Hub's formulas read as structure, as entities: a backslash before them would not
# do, "\(" opens a formula on the Hub.
_ENTITIES = str.maketrans({c: f"&#{ord(c)};" for c in "\\`*[]<>|~$"})
_ENTITY = re.compile(r"&(?=[#\w])")  # other ampersands are plain letters
_EDGE_UNDERSCORE = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")  # those inside a word are plain letters
# At the start of a line these open headings, lists and rules.
_BLOCK = re.compile(r"^(?:#{1,6}|[-+]|\d{1,9}[.)])(?=\s|$)|^[-=]{2,}")


class Code(str):
    """A text that a card sets as a span of code."""


def escaped(value: object) -> Markup:
    """Return a value as it stands on a card: Markdown unchanged, `Code` as a span of code, anything else as `inline`.

    Example:
        >>> escaped(Code("norm=None")), escaped("a|b"), escaped(Markup("**bold**"))
        (Markup('`norm=None`'), Markup('a&#124;b'), Markup('**bold**'))
    """
    if isinstance(value, Markup):
        return value
    return Markup(code(value) if isinstance(value, Code) else inline(value))


def one_line(text: object, longest: int = _LONGEST) -> str:
    r"""Return a text without line breaks, control and invisible characters, shortened to so many letters.

    Example:
        >>> one_line("a\n---\nb \u202e c")
        'a --- b c'
    """
    line = " ".join(_visible(str(text)).split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"


def inline(text: object, longest: int = _LONGEST) -> str:
    """Return a text as Markdown that shows it letter by letter, in one line.

    Example:
        >>> inline("# vit_nano | <b> 3.11")
        '&#35; vit_nano &#124; &#60;b&#62; 3.11'
    """
    line = _ENTITY.sub("&#38;", one_line(text, longest)).translate(_ENTITIES)
    line = _EDGE_UNDERSCORE.sub(lambda found: "&#95;" * len(found.group()), line)
    return _BLOCK.sub(lambda found: "".join(f"&#{ord(c)};" if not c.isdigit() else c for c in found.group()), line)


def code(text: object, longest: int = 120) -> str:
    """Return a text as a span of code, which stands in tables too.

    Example:
        >>> code("uoft-cs/cifar10"), code("a`b"), code("a|b")
        ('`uoft-cs/cifar10`', '``a`b``', 'a&#124;b')
    """
    line = one_line(text, longest)
    if not line or "|" in line or "\\" in line:  # a table would be split there, and no escape is understood everywhere
        return inline(line) or "–"
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if "`" in (line[0], line[-1]) else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fence(text: str, language: str = "") -> str:
    r"""Return lines as a block of code with a fence longer than any in them.

    Example:
        >>> fence("a\n```\nb").splitlines()[0]
        '````'
    """
    lines = (_visible(line.expandtabs(4)).rstrip() for line in re.split(r"\r\n|\r|\n", text))
    body = "\n".join(lines).strip("\n")
    ticks = "`" * max(3, _longest_run(body) + 1)
    return f"{ticks}{language}\n{body}\n{ticks}"


def _visible(text: str) -> str:
    """Return a text without invisible characters, and with a blank for every other character that is no letter."""
    letters = (c for c in text if unicodedata.category(c) not in ("Cf", "Cs"))
    return "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in letters)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall(r"`+", text)), default=0)
