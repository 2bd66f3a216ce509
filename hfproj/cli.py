"""What recipes and commands share: options as text, and errors of the user's as one line instead of a traceback."""

import argparse
import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from hfproj.errors import HfprojError, UsageError
from hfproj.redaction import is_secret, remember
from hfproj.strict_json import short


def parse(*classes: type, defaults: Callable[[list[str]], dict[str, Any]] | None = None) -> tuple[Any, ...]:
    """Return an instance of each dataclass from the command line, see ``transformers.HfArgumentParser``.

    Args:
        classes: Dataclasses of flags.
        defaults: Given the arguments, returns values for flags that are not given (those of a preset).

    Raises:
        UsageError: If a flag is unknown, or its dataclass refuses a value.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(classes, allow_abbrev=False)  # else --hub_tok would hide its token from the redaction
    try:
        if defaults is not None:
            parser.set_defaults(**defaults(sys.argv[1:]))
        *found, left = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except HfprojError:
        raise
    except ValueError as error:
        raise UsageError(f"{error}") from error
    if left:
        raise UsageError(f"Unknown arguments: {_unknown(left, parser._option_string_actions)} See --help.")
    for name, value in (entry for part in found for entry in vars(part).items()):
        if is_secret(name, value):
            remember(value)
    return tuple(found)


def _unknown(words: list[str], flags: Iterable[str]) -> str:
    """Return the flags among words, without values, which may be secrets, and what was perhaps meant by each."""
    names = [word.partition("=")[0] for word in words if word.startswith("-")]
    said = []
    for name in names:
        longer = [flag for flag in flags if flag.startswith(name)]
        close = longer or difflib.get_close_matches(name, flags, n=1)
        said.append(f"{name} (did you mean {close[0]}?)" if close else name)
    return f"{', '.join(said) or short(words[0])}."


def preset_flags(arguments: list[str]) -> dict[str, Any]:
    """Return the flags of the recipes that ``--preset NAME`` among `arguments` stands for; none without it.

    Options that have a flag of their own (the temperature of NT-Xent, the width of an MLP, the crops) become its value,
    so that giving the flag replaces them. With another ``--objective`` or ``--head`` than the preset's, the options of
    the preset's own are left out.

    Raises:
        UsageError: If no preset has this name.

    Example:
        >>> preset_flags(["--preset", "werank_last_layer"])["regularizers"]
        '{"werank": {"weight": 1.0, "layers": "last", "squared": true, "side": "WWt"}}'
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--objective", "--head"):
        parser.add_argument(flag)
    given = parser.parse_known_args(arguments)[0]
    if given.preset is None:
        return {}
    from hfproj.presets import get_preset

    preset = get_preset(given.preset)
    flags: dict[str, Any] = {"patch_dropout": 0.0, "regularizers": json.dumps(preset.regularizers)}
    if given.objective in (None, preset.objective["name"]):
        flags |= _objective_flags(preset)
    if given.head in (None, preset.head):
        flags |= _head_flags(preset)
    return flags | _view_flags(preset.views) | preset.training


def _objective_flags(preset: Any) -> dict[str, Any]:
    objective = dict(preset.objective)
    flags = {"objective": objective.pop("name")}
    for part in ("predictor", "prototypes"):
        flags[part] = json.dumps(getattr(preset, part)) if getattr(preset, part) else None
    if flags["objective"] == "nt_xent" and "temperature" in objective:
        flags["temperature"] = objective.pop("temperature")
    return flags | {"objective_options": json.dumps(objective)}


def _head_flags(preset: Any) -> dict[str, Any]:
    from hfproj.heads import HEADS

    options = dict(preset.head_options)
    flags = {"head": preset.head, "out_dim": preset.out_dim}
    if preset.head == "mlp":
        default = HEADS.options("mlp")
        flags["hidden_dim"] = options.pop("hidden_dim", default["hidden_dim"].default)
        flags["head_depth"] = options.pop("depth", default["depth"].default)
    return flags | {"head_options": json.dumps(options)}


def _view_flags(views: dict[str, Any]) -> dict[str, Any]:
    from hfproj.data.augment import Augmentation

    views, default = dict(views), Augmentation()
    named = ("color_jitter_strength", "grayscale_probability", "rotation_degrees")
    flags = {name.rpartition("_")[0]: views.pop(name, getattr(default, name)) for name in named}
    scale = views.get("scale", default.scale)
    if scale is not None and scale[1] == 1:  # else it stays among the views, whose options come first
        views.pop("scale", None)
        flags["crop_scale"] = scale[0]
    return flags | {"views": json.dumps(views)}


def is_adapter(name: str) -> bool:
    """Return whether `name` is a folder or a Hub repository that holds a PEFT adapter."""
    if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith("timm/")):
        return False
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):  # no repository of this name; loading says what is wrong
        return False


def options(text: str | None) -> dict[str, Any]:
    """Return the options in `text`: JSON in braces, or ``name=value`` pairs with commas between them.

    A name with dots makes a nested dict: ``werank.weight=0.1``.

    Raises:
        UsageError: If the text is neither.

    Example:
        >>> options("temperature=0.2,gather=false,werank.layers=head")
        {'temperature': 0.2, 'gather': False, 'werank': {'layers': 'head'}}
    """
    text = (text or "").strip()
    if text.startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{text!r} is no JSON: {error}.") from error
    found: dict[str, Any] = {}
    for pair in re.split(r",(?![^\[]*\])", text) if text else []:  # no comma inside a list
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"Expected name=value pairs with commas between them, or JSON in braces, got {pair!r}.")
        *path, last = name.strip().split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UsageError(f"{name.strip()!r}: {part!r} has a value already, so it can't hold options.")
        try:
            place[last] = json.loads(value)
        except json.JSONDecodeError:
            place[last] = value.strip()
    return found


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


def run(main: Callable[[], None]) -> None:
    """Run `main`; after an error of the user's, or of the disk, exit with status 2 and one line, no traceback."""
    _use_all_cores()
    try:
        main()
    except HfprojError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"error: {error.strerror}: {error.filename or 'a file'} can't be written.", file=sys.stderr)
        sys.exit(2)


def _use_all_cores() -> None:
    """Give a single process on the CPU all its cores: ``accelerate launch`` leaves it one unless told otherwise."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # without a launcher, OMP_NUM_THREADS is the user's own
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _one_line(error: HfprojError) -> str:
    """Return the message; of an error in a worker of a data loader, which holds a whole traceback, its last line."""
    text = str(error).strip()
    if re.match(r"Caught \w+ in .* process", text):
        text = text.splitlines()[-1].partition("Error: ")[2] or text.splitlines()[-1]
    return " ".join(text.split())
