"""Presets: one named combination of head, objective, regularizers, augmentation and training per published setting.

A preset is data: its parts are the names and options that `hfproj.create_head`, `hfproj.create_objective` and
`hfproj.create_regularizer` take, so that each can be replaced. Most of the settings train a backbone from scratch:
``preset.config(trainable="full")`` does, without it the head alone is trained. :mod:`hfproj.presets.published` has each
objective as it was published, and solo-learn's settings for CIFAR. This room imports `tuner`, `objectives` and what
lies below them; the rows of the papers, on the top floor, are reached by name.
"""

import importlib
from collections.abc import Mapping
from functools import cache

from hfproj.checking import checked
from hfproj.errors import unknown
from hfproj.presets.published import CIFAR, PUBLISHED
from hfproj.presets.settings import Preset

__all__ = ["Preset", "all_presets", "get_preset", "list_presets"]

_STUDIES = "hfproj.studies.papers"  # by name: the top floor is reached from here, not imported


@cache
def all_presets() -> Mapping[str, Preset]:
    """Return every preset by its name, those of the studies included."""
    return {**importlib.import_module(_STUDIES).PRESETS, **PUBLISHED, **CIFAR}


@checked
def get_preset(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        UsageError: If no preset has this name.

    Example:
        >>> get_preset("simclr_cifar").objective
        {'name': 'nt_xent', 'temperature': 0.2}
    """
    if name not in all_presets():
        raise unknown("preset", name, all_presets())
    return all_presets()[name]


@checked
def list_presets() -> dict[str, str]:
    """Return every preset's name with the line that describes it.

    Example:
        >>> list_presets()["byol_cifar"]
        'BYOL on CIFAR, solo-learn'
    """
    return {name: preset.line for name, preset in sorted(all_presets().items())}
