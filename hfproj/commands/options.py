"""Options as text, flags of presets, and what a name stands for."""

import argparse
import json
import os
import re
from typing import Any

from hfproj.errors import UsageError


def preset_flags(arguments: list[str]) -> dict[str, Any]:
    """Return the flags of the recipes that ``--preset NAME`` among `arguments` stands for; none without it.

    Options that have a flag of their own (the temperature of NT-Xent, the width of an MLP, the crops) become its value,
    so that giving the flag replaces them. With another ``--objective`` or ``--head`` than the preset's, the options of
    the preset's own are left out. ``--backbone preset`` stands for the backbone that it was published for, all of which
    is trained where it has no pretrained weights.

    Raises:
        UsageError: If no preset has this name, or ``--backbone preset`` is given without a preset that has one.

    Example:
        >>> preset_flags(["--preset", "werank_last_layer"])["regularizers"]
        '{"werank": {"weight": 1.0, "layers": "last", "squared": true, "side": "WWt"}}'
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--objective", "--head", "--backbone"):
        parser.add_argument(flag)
    given = parser.parse_known_args(arguments)[0]
    if given.preset is None and given.backbone == "preset":
        raise UsageError("--backbone preset is the backbone of --preset, which is missing; name one, or a backbone.")
    if given.preset is None:
        return {}
    from hfproj.presets import get_preset

    preset = get_preset(given.preset)
    flags: dict[str, Any] = {"patch_dropout": 0.0, "regularizers": json.dumps(preset.regularizers)}
    if given.objective in (None, preset.objective["name"]):
        flags |= _objective_flags(preset)
    if given.head in (None, preset.head):
        flags |= _head_flags(preset)
    if given.backbone == "preset":
        flags |= _backbone_flags(preset)
    return flags | _view_flags(preset.views) | preset.training


def _backbone_flags(preset: Any) -> dict[str, Any]:
    if preset.backbone is None:
        raise UsageError(f"{preset.line} was published for no single backbone: name one, --backbone vit_nano.")
    return {"trainable": "full", "lora_r": 0} if preset.backbone.get("pretrained") is False else {}


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
