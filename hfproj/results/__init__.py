"""Results: numbers of a run (`results.json`), its history while it trained (`history.parquet`), intervals, verdicts.

Tables, cards and pages are made from these and from nothing else. This room imports `errors` and `files` only.
"""

from hfproj.results.history import HISTORY_FILE, read_history, write_history
from hfproj.results.intervals import Interval, paired_interval
from hfproj.results.record import LAYERS, WHENS, Measurement, Results, pack_outcomes, unpack_outcomes
from hfproj.results.verdict import RankChange, Verdict, rank_changes, verdicts

__all__ = [
    "HISTORY_FILE",
    "LAYERS",
    "WHENS",
    "Interval",
    "Measurement",
    "RankChange",
    "Results",
    "Verdict",
    "pack_outcomes",
    "paired_interval",
    "rank_changes",
    "read_history",
    "unpack_outcomes",
    "verdicts",
    "write_history",
]
