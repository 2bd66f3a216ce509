"""Results: numbers of a run (`results.json`), its history while it trained (`history.parquet`), intervals, verdicts,
and the words and roundings in which table, card and page show them (`words`).

Tables, cards and pages are made from these and from nothing else. This room imports `errors` and `files` only.
"""

from hfproj.results.history import HISTORY_FILE, read_history, write_history
from hfproj.results.measurement import LAYERS, WHENS, Measurement, Missing, pack_outcomes, unpack_outcomes
from hfproj.results.record import Results
from hfproj.results.verdict import (
    Change, Finding, Interval, RankChange, Verdict, findings, paired_interval, rank_changes, recorded,
    unlabelled_sense, verdicts,
)  # fmt: skip

__all__ = [
    "HISTORY_FILE", "LAYERS", "WHENS", "Change", "Finding", "Interval", "Measurement", "Missing", "RankChange",
    "Results", "Verdict", "findings", "pack_outcomes", "paired_interval", "rank_changes", "read_history", "recorded",
    "unlabelled_sense", "unpack_outcomes", "verdicts", "write_history",
]  # fmt: skip
