"""Probes: what labels say about h, z and other layers, and `evaluate`, which measures what goes into `results.json`.

A probe is one file, one line of `PROBES` in `registry.py`, and rows in the tests (see CONTRIBUTING.md). This room
imports `features`, `results`, `data`, `tuner`, `diagnostics` and what lies below them.
"""

from hfproj.probes.attentive import AttentiveProbe
from hfproj.probes.clustering import KMeansProbe
from hfproj.probes.evaluation import evaluate
from hfproj.probes.few_shot import FewShotProbe
from hfproj.probes.finetune import FineTuneProbe
from hfproj.probes.group_robust import GroupRobustProbe, group_accuracies
from hfproj.probes.knn import KNNProbe
from hfproj.probes.linear import LinearProbe
from hfproj.probes.many_rates import ManyRatesProbe
from hfproj.probes.mlp import MLPProbe
from hfproj.probes.nuisance import ProbeGap, RotatedImages, probe_gap
from hfproj.probes.registry import PROBES, create_probe, list_probes, register_probe
from hfproj.probes.retrieval import RetrievalProbe
from hfproj.probes.unlabelled import RANKS, unlabelled_changes

__all__ = [
    "PROBES", "RANKS", "AttentiveProbe", "FewShotProbe", "FineTuneProbe", "GroupRobustProbe", "KMeansProbe",
    "KNNProbe", "LinearProbe", "MLPProbe", "ManyRatesProbe", "ProbeGap", "RetrievalProbe", "RotatedImages",
    "create_probe", "evaluate", "group_accuracies", "list_probes", "probe_gap", "register_probe",
    "unlabelled_changes",
]  # fmt: skip
