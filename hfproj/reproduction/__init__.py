"""Studies of papers run by one command: rows trained, columns measured, claims judged.

    study      what a study is: rows, columns, the paper's numbers, scales
    claims     what is claimed of it, as tests of its cells
    sources    where its images come from
    setting    one row at a scale, with every value written out: what is trained
    measures   what is measured of it
    running    row after row, on one process or several, going on where it was stopped
    store      where finished runs are kept
    judging    holds, fails, cannot be judged: the rules
    document   table, claims and pictures as a page
    reproducing    all of it: `reproduce`
    registry   the studies by name

The studies themselves are in `hfproj.studies.papers`, which no room imports: they are reached by name.
"""

from hfproj.reproduction.claims import Agree, Cells, Claim, More, Same, Trend, ordered
from hfproj.reproduction.registry import all_studies, get_study, list_studies
from hfproj.reproduction.reproducing import Reproduction, reproduce
from hfproj.reproduction.sources import Source, Splits
from hfproj.reproduction.study import Column, Row, Scale, Study

__all__ = [
    "Agree", "Cells", "Claim", "Column", "More", "Reproduction", "Row", "Same", "Scale", "Source", "Splits", "Study",
    "Trend", "all_studies", "get_study", "list_studies", "ordered", "reproduce",
]  # fmt: skip
