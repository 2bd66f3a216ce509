"""The studies by name: every file of `hfproj.studies.papers` has some, as the list ``STUDIES``."""

import importlib
from collections.abc import Mapping
from functools import cache

from hfproj.checking import checked
from hfproj.errors import unknown
from hfproj.reproduction.study import Study

_PAPERS = "hfproj.studies.papers"  # by name: the top floor is reached from here, not imported


@cache
def all_studies() -> Mapping[str, Study]:
    """Return every study by its name, in the order of the papers."""
    return importlib.import_module(_PAPERS).STUDIES


@checked
def get_study(name: str) -> Study:
    """Return a study by its name.

    Raises:
        UsageError: If no study has this name.

    Example:
        >>> get_study("last_layer.table2").rows[0].name
        'SimCLR'
    """
    if name not in all_studies():
        raise unknown("study", name, all_studies())
    return all_studies()[name]


@checked
def list_studies() -> dict[str, str]:
    """Return every study's name with the line that says what it asks.

    Example:
        >>> "last_layer.table2" in list_studies()
        True
    """
    return {name: study.title for name, study in all_studies().items()}
