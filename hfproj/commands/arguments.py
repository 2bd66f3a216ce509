"""The arguments of a command: flags, files of them, and the ``arguments.yaml`` that a run leaves beside its results.

A YAML or JSON file stands before the flags, and flags win:

    hfproj run simclr_vit run.yaml --learning_rate 1e-3

Its keys are the names of the flags. A list is several values, or one with commas where the flag takes one; a mapping is
that flag's JSON; null is "not set". Secrets are not written into ``arguments.yaml`` but the variable that holds them
(``hub_token: $HF_TOKEN``), which is looked up when the file is read.
"""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from hfproj.commands.flags import flags_of, page
from hfproj.errors import HfprojError, UsageError, one_line, unknown
from hfproj.files import command_line, write_atomic
from hfproj.hints import known_elsewhere
from hfproj.redaction import is_secret, redacted, remember, variable
from hfproj.strict_json import short

ARGUMENTS = "arguments.yaml"
SUFFIXES = (".yaml", ".yml", ".json")
LAUNCHER = "num_processes", "config_file"  # what makes `hfproj run` launch, and no recipe has
_MOST = 2**20  # bytes of a file of arguments
_HELP = ("-h", "--help", "--help-all", "--help_all")
_EXPECTED = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}

_last: dict[str, tuple[Any, bool]] = {}  # of the last command line: name → value, and whether it was given
# Called with each parser and the flags that its help shows, instead of parsing: `hfproj.commands.tables` reads these.
capture: Callable[[argparse.ArgumentParser, Sequence[str], str], None] | None = None


def parse(
    *classes: type, defaults: Callable[[list[str]], dict[str, Any]] | None = None, shown: str = ""
) -> tuple[Any, ...]:
    """Return an instance of each dataclass from the command line, see ``transformers.HfArgumentParser``.

    Args:
        classes: Dataclasses of flags.
        defaults: Given the arguments, returns values for flags that are not given (those of a preset).
        shown: Names of the flags that ``--help`` shows, with spaces between them; ``--help-all`` shows the others as
            well, but for those that would be refused. Empty: all.

    Raises:
        UsageError: If a flag is unknown, a value is of another type or refused by its dataclass, or a file of arguments
            can't be read.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(classes, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
    for action in _refused(classes, parser):
        action.help = argparse.SUPPRESS
    words = _words(parser, shown.split(), sys.modules[classes[0].__module__].__doc__ or "")
    if defaults is not None:
        parser.set_defaults(**defaults(words))
    namespace = _parsed(parser, words, shown.split())
    made = []
    try:
        for cls in classes:
            names = [field.name for field in fields(cls) if field.init] if is_dataclass(cls) else []
            made.append(cls(**{name: getattr(namespace, name) for name in names}))
    except HfprojError:
        raise
    except ValueError as error:
        raise UsageError(f"{error}") from error
    return tuple(made)


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return what `parser` makes of the command line, with files of arguments, its help and its errors as in `parse`.

    Raises:
        UsageError: If a flag is unknown, missing or of another type, or a file of arguments can't be read.
    """
    parser.allow_abbrev = False
    return _parsed(parser, _words(parser, (), parser.description or ""), ())


def help_wanted(words: Sequence[str]) -> str | None:
    """Return which help is asked for: "some", "all" or None.

    Example:
        >>> help_wanted(["--epochs", "3", "--help-all"]), help_wanted(["--seed", "1"])
        ('all', None)
    """
    asked = [word for word in words if word in _HELP]
    return None if not asked else "all" if any("all" in word for word in asked) else "some"


def _refused(classes: Sequence[type], parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the flags that a trainer would refuse, whatever their value, and those of scripts of `transformers`."""
    if not any(cls.__name__ == "ProjectionTrainingArguments" for made in classes for cls in made.__mro__):
        return []
    from hfproj.training.checks import REFUSED

    return [action for action in parser._actions if action.dest in {*REFUSED, "do_train", "do_eval", "do_predict"}]


def _words(parser: argparse.ArgumentParser, shown: Sequence[str], text: str) -> list[str]:
    """Return the words of the command line with files of arguments taken apart; print help if it is asked for."""
    parser.error = _refuse(parser)  # type: ignore[method-assign, assignment]
    listed = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    if capture is not None:
        capture(parser, shown, text)
    if wanted := help_wanted(sys.argv[1:]):
        some = argparse.ArgumentParser(add_help=False)
        some._actions = listed
        sys.stdout.write(page(text, flags_of(some), shown=shown, every=wanted == "all"))
        sys.exit(0)
    return expanded(sys.argv[1:], parser)


def _parsed(parser: argparse.ArgumentParser, words: list[str], shown: Sequence[str]) -> argparse.Namespace:
    nulls = _nulls(words)
    for action in parser._actions:
        if action.dest in nulls:
            action.required = False
    words = [word for word in words if not word.startswith(_NULL)]
    namespace, left = parser.parse_known_args(words)
    if left:
        raise _unknown_words(parser, left)
    for name, value in vars(namespace).items():
        if is_secret(name, value):
            remember(value)
    for name in nulls:
        setattr(namespace, name, None)
    options = {option: action.dest for action in parser._actions for option in action.option_strings}
    given = {options[word.partition("=")[0]] for word in words if word.partition("=")[0] in options} | nulls.keys()
    given |= {a.dest for a in parser._actions if not a.option_strings}
    others = shown or vars(namespace)
    _last.clear()
    _last.update({name: (value, name in given) for name, value in vars(namespace).items() if name in {*given, *others}})
    return namespace


# --- files of arguments ---

_NULL = "\0null:"  # a word for a flag that a file sets to null, which no shell can give


def _nulls(words: Sequence[str]) -> dict[str, None]:
    return {word.removeprefix(_NULL): None for word in words if word.startswith(_NULL)}


def read_arguments(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a YAML or JSON file of arguments holds: name → value, with ``-`` in names as ``_``.

    Raises:
        UsageError: If it is not there, can't be read, is larger than 1 MB, is no mapping of names, or has a name twice.
    """
    path = Path(path)
    what = "flags and values, one a line, such as `learning_rate: 0.001`"
    if path.suffix == ".json":
        what = 'flags and values in braces, such as {"learning_rate": 0.001}'
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST + 1)
    except OSError as error:
        where = "; give the path of a file that is there" if isinstance(error, FileNotFoundError) else ""
        raise UsageError(f"Expected {str(path)!r} to be a file of arguments, got: {error.strerror}{where}.") from error
    if len(raw) > _MOST:
        raise UsageError(f"Expected {str(path)!r} to hold {what}, got more than 1 MB; it is another file.")
    import yaml

    try:
        text = raw.decode()
        found = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else _yaml(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"{str(path)!r} can't be read: {_problem(error)}. Expected {what}.") from error
    found = {} if found is None else found
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        got = f"a {type(found).__name__}" if not isinstance(found, dict) else "a name that is no text"
        raise UsageError(f"Expected {str(path)!r} to hold {what}, got {got}.")
    values = {name.lstrip("-").replace("-", "_"): value for name, value in found.items()}
    for name, value in list(values.items()):
        if isinstance(value, str) and value == variable(name):  # a secret that was not written down
            values[name] = os.environ.get(value.removeprefix("$"))
    return values


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return a mapping, whose names are all different.

    Raises:
        ValueError: If a name stands twice.
    """
    names = [name for name, _ in pairs]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"{twice!r} stands twice; keep one of the two")
    return dict(pairs)


def _yaml(text: str) -> Any:
    """Return what YAML holds, as ``yaml.safe_load`` does, where no name stands twice (there the last would win)."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            if isinstance(node, yaml.MappingNode):
                _once([(name.value, None) for name, _ in node.value if isinstance(name, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader=Strict)


def _problem(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{problem or 'no YAML'}, line {mark.line + 1}, column {mark.column + 1}" if mark else one_line(error)


def split_files(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files of arguments among the words before the first flag, and all other words.

    Example:
        >>> split_files(["run.yaml", "--seed", "1"])
        (['run.yaml'], ['--seed', '1'])
    """
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    files = [word for word in words[:first] if word.endswith(SUFFIXES)]
    return files, [word for i, word in enumerate(words) if i >= first or word not in files]


def expanded(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return the words with those of files of arguments in place of the files, before all flags.

    Raises:
        UsageError: If a file can't be read, or has a name that is no flag.
    """
    files, others = split_files(words)
    actions = {action.dest: action for action in reversed(parser._actions)}  # of --x and --no_x the first
    found: dict[str, list[str]] = {}
    for file in files:
        for name, value in read_arguments(file).items():
            if name in LAUNCHER and name not in actions:
                continue  # `hfproj run` has read it
            if name not in actions:
                message = str(unknown("flag", name, actions)).partition(" Available:")[0]
                raise UsageError(f"{file}: {message} See --help-all.")
            found[name] = _as_words(actions[name], value, file)
    flags = [word for name, words in found.items() if actions[name].option_strings for word in words]
    places = [word for name, words in found.items() if not actions[name].option_strings for word in words]
    own = [word for word in others[:1] if not word.startswith("-")]  # a positional argument of the command line
    return [*(own or places), *flags, *others[len(own) :]]


def _as_words(action: argparse.Action, value: Any, file: str) -> list[str]:
    option = action.option_strings[0] if action.option_strings else ""
    if value is None:
        return [_NULL + action.dest]
    if isinstance(value, list) and action.nargs in ("*", "+"):
        return [option, *map(_text, value)] if option else list(map(_text, value))
    if isinstance(value, list):
        if any(isinstance(part, list | dict) for part in value):
            raise UsageError(f"{file}: expected {action.dest} to be one value or a list of values, got {value!r}.")
        value = ",".join(map(_text, value))
    if action.nargs == 0:  # a switch
        return [option] if value is True else []
    return [f"{option}={_text(value)}"] if option else [_text(value)]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def write_arguments(folder: str | os.PathLike) -> Path:
    """Write the arguments of this command as ``arguments.yaml`` into a folder, and return where it lies.

    What was given stands in lines of its own, the rest, as it was by default, in comments: the file gives the same run
    again, and flags beside it win. Secrets are left out.
    """
    import yaml

    def lines(*, given: bool) -> list[str]:
        values = redacted({name: _plain(value) for name, (value, was_given) in _last.items() if was_given is given})
        dumped = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=2**16) if values else ""
        return dumped.splitlines()

    rest = [f"# {line}" for line in lines(given=False)]
    rest = ["", "# As they were by default:", *rest] if rest else []
    text = "\n".join([f"# {command_line()}", *lines(given=True), *rest])
    path = Path(folder) / ARGUMENTS
    write_atomic(path, f"{text}\n".encode())
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def leave_arguments() -> Any:
    """Return a callback of the Trainer that calls `write_arguments` with `output_dir` when training begins."""
    from transformers import TrainerCallback

    class LeaveArguments(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                write_arguments(args.output_dir)

    return LeaveArguments()


# --- mistakes ---


def _refuse(parser: argparse.ArgumentParser) -> Callable[[str], NoReturn]:
    """Return what a parser calls with its message, instead of printing its usage."""

    def error(message: str) -> NoReturn:
        flag, rest = "", message
        if found := re.match(r"argument ([^:]+): (.*)", message, re.DOTALL):
            flag, rest = found[1].split("/")[0], found[2]
        action = next((a for a in parser._actions if flag in (*a.option_strings, a.dest)), None)
        if wrong := re.match(r"invalid (\w+) value: (.*)", rest, re.DOTALL):
            raise UsageError(f"Expected {flag} to be {_EXPECTED.get(wrong[1], wrong[1])}, got {wrong[2]}. See --help.")
        if wrong := re.match(r"Truthy value expected: got (.*) but expected", rest, re.DOTALL):
            raise UsageError(f"Expected {flag} to be true or false, got {wrong[1]!r}. See --help.")
        if (wrong := re.match(r"invalid choice: '(.*?)' \(", rest, re.DOTALL)) and action is not None:
            raise unknown(flag, wrong[1], map(str, action.choices or ()))
        if missing := re.match(r"the following arguments are required: (.*)", rest):
            names = [re.sub(r"/--[\w-]+", "", name) for name in missing[1].split(", ")]
            names = [name if name.startswith("-") else name.upper() for name in names]
            raise UsageError(f"Expected {' and '.join(names)}, got none. See --help.")
        if rest.startswith("expected one argument"):
            raise UsageError(f"Expected a value behind {flag}, got none. See --help.")
        raise UsageError(f"{flag}: {rest}. See --help." if flag else f"{rest[:1].upper()}{rest[1:]}. See --help.")

    return error


def _unknown_words(parser: argparse.ArgumentParser, left: Sequence[str]) -> UsageError:
    """Return the error for words that are no flags: without their values, which may be secrets."""
    known = [option for action in parser._actions for option in action.option_strings]
    said = []
    for name in (word.partition("=")[0] for word in left if word.startswith("-")):
        longer = [flag for flag in known if len(name) > 2 and flag.startswith(name)]
        meant = known_elsewhere(name, [flag.lstrip("-") for flag in known])
        close = [f"--{meant}"] if meant else longer or difflib.get_close_matches(name, known, n=1)
        said.append(f"{name} (did you mean {close[0]}?)" if close else name)
    hint = ""
    if not said and any(word.endswith(SUFFIXES) for word in left):
        hint = " A file of arguments stands before the flags."
    elif not said and Path(left[0]).is_file():
        hint = f" Files of arguments are {', '.join(SUFFIXES)}."
    return UsageError(f"Unknown arguments: {', '.join(said) or short(left[0])}.{hint} See --help.")
