"""Probes: what labels say about h and z, and `evaluate`, which measures everything that goes into `results.json`."""

from hfproj.registry import Registry

PROBES = Registry(
    "probe",
    {
        "knn": (
            "hfproj.probes.knn:KNNProbe",
            "weighted k nearest neighbours by cosine (DINO's protocol)",
        ),
    },
)


def list_probes() -> dict[str, str]:
    """Return every probe's name with a line that describes it.

    Example:
        >>> "knn" in list_probes()
        True
    """
    return PROBES.list()


from hfproj.probes.evaluate import evaluate  # noqa: E402  (the registry has to exist first)
from hfproj.probes.features import Features, extract_features  # noqa: E402
from hfproj.probes.interval import Interval, paired_interval  # noqa: E402
from hfproj.probes.knn import KNNProbe  # noqa: E402

__all__ = [
    "PROBES",
    "Features",
    "Interval",
    "KNNProbe",
    "evaluate",
    "extract_features",
    "list_probes",
    "paired_interval",
]
