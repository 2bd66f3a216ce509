"""Flags in plain values, and the page that ``--help`` prints of them."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

_KINDS = {"int": "INT", "float": "NUMBER", "str": "TEXT", "string_to_bool": "BOOL", "make_choice_type_function": "TEXT"}
_HEAD = 32  # columns of the names
_WIDEST = 120


@dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
        name: As it is written: ``"--out_dim"``; of a positional argument ``"MODEL"``.
        kind: What its value is: ``"INT"``, ``"NUMBER"``, ``"TEXT"``, ``"BOOL"``, or the choices with ``|`` between
            them; empty for a switch.
        default: Its default as text; empty for none.
        help: One or a few sentences.
    """

    name: str
    kind: str
    default: str
    help: str


def flags_of(parser: argparse.ArgumentParser) -> list[Flag]:
    """Return the flags of a parser, each once, in their order; help and the ``--no_…`` of switches are left out.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--epochs", type=int, default=3, help="Passes over the data.")
        >>> flags_of(parser)
        [Flag(name='--epochs', kind='INT', default='3', help='Passes over the data.')]
    """
    found: dict[str, Flag] = {}
    for action in parser._actions:
        if action.dest not in found and action.dest != "help":
            found[action.dest] = _flag(action)
    return list(found.values())


def _flag(action: argparse.Action) -> Flag:
    name = action.option_strings[0] if action.option_strings else action.dest.upper()
    choices = "|".join(map(str, action.choices)) if action.choices else ""
    kind = choices or _KINDS.get(getattr(action.type, "__name__", "str"), "TEXT")
    if not action.option_strings or (action.nargs == 0 and not choices):
        kind = choices
    help = " ".join((action.help or "").replace("%%", "%").split())
    return Flag(name, kind, "" if action.nargs == 0 else _shown(action.default), help)


def _shown(default: Any) -> str:
    if default is None or default == [] or default is argparse.SUPPRESS:
        return ""
    if isinstance(default, Enum):
        default = default.value
    if isinstance(default, list | tuple):
        return " ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def page(text: str, flags: Sequence[Flag], *, shown: Iterable[str] = (), every: bool = False) -> str:
    """Return a page of help.

    Args:
        text: What stands above the flags, as it is: a docstring with its commands.
        flags: All flags.
        shown: Names (without dashes) of those that matter, in this order; none: all of them.
        every: Show the others as well.
    """
    named = {flag.name.lstrip("-"): flag for flag in flags}
    first = [named[name] for name in shown if name in named] or list(flags)
    rest = [flag for flag in flags if flag not in first]
    width = min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)
    lines = [text.strip(), ""]
    if first:
        lines += ["Flags, with their defaults in brackets:", *(line for flag in first for line in _lines(flag, width))]
    if rest and every:
        lines += ["", "Further flags:", *(line for flag in rest for line in _lines(flag, width))]
    elif rest:
        lines += ["", f"{len(rest)} further flags: --help-all."]
    lines += (
        ["", "A YAML or JSON file of these, before the flags, is taken as well: run.yaml --seed 1."] if first else []
    )
    return "\n".join(lines) + "\n"


def _lines(flag: Flag, width: int) -> list[str]:
    kind = flag.kind if len(flag.kind) <= _HEAD else "CHOICE"
    head = f"  {flag.name} {kind}".rstrip()
    help = flag.help if kind == flag.kind else f"{flag.help} One of {flag.kind.replace('|', ', ')}."
    help = re.sub(r"\s*\(?`?default:?s? .*?\)", "", help) if flag.default and "(default" in help else help
    text = " ".join(part for part in (help.strip(), f"[{flag.default}]" if flag.default else "") if part)
    wrapped = textwrap.wrap(text, max(width - _HEAD - 1, 30), break_long_words=False, break_on_hyphens=False) or [""]
    lines = [f"{' ':{_HEAD}} {line}" for line in wrapped]
    if len(head) < _HEAD + 1:
        lines[0] = f"{head:{_HEAD}} {wrapped[0]}".rstrip()
        return lines
    return [head, *lines]
