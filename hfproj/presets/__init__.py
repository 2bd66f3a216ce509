"""Presets: one named combination of head, objective, regularizers, augmentation and training per published setting.

A preset is data: its parts are the names and options that `hfproj.create_head`, `hfproj.create_objective` and
`hfproj.create_regularizer` take, so that each can be replaced. Most of the settings train a backbone from scratch:
``preset.config(trainable="full")`` does, without it the head alone is trained.

| file | settings |
|---|---|
| ``papers.py`` | the rows of the tables in five papers on projection heads |
| ``published.py`` | each objective as it was published, mostly for ImageNet |
| ``cifar.py`` | solo-learn's for CIFAR |
"""

from hfproj.errors import unknown
from hfproj.presets.base import Preset
from hfproj.presets.cifar import CIFAR
from hfproj.presets.papers import PAPERS
from hfproj.presets.published import PUBLISHED

__all__ = ["PRESETS", "Preset", "get_preset", "list_presets"]

PRESETS: dict[str, Preset] = {**PAPERS, **PUBLISHED, **CIFAR}


def get_preset(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        UsageError: no preset has this name.

    Example:
        >>> get_preset("simclr_cifar").objective
        {'name': 'nt_xent', 'temperature': 0.2}
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


def list_presets() -> dict[str, str]:
    """Return every preset's name with the line that describes it.

    Example:
        >>> list_presets()["byol_cifar"]
        'BYOL on CIFAR, solo-learn'
    """
    return {name: preset.line for name, preset in sorted(PRESETS.items())}
