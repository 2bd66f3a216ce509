"""Probes: what labels say about h, z and other layers, and `evaluate`, which measures what goes into `results.json`."""

from typing import Any

from hfproj.registry import Registry

PROBES: Registry[Any] = Registry(
    "probe",
    {
        "knn": ("hfproj.probes.knn:KNNProbe", "weighted k nearest neighbours by cosine (DINO's protocol)"),
        "linear": ("hfproj.probes.linear:LinearProbe", "logistic regression, its L2 strength chosen on held-out rows"),
        "many_rates": ("hfproj.probes.many_rates:ManyRatesProbe", "linear by SGD at many rates at once (DINOv2's)"),
        "mlp": ("hfproj.probes.mlp:MLPProbe", "one hidden layer"),
        "few_shot": ("hfproj.probes.few_shot:FewShotProbe", "a few rows per class, several draws"),
        "attentive": ("hfproj.probes.attentive:AttentiveProbe", "a learned query attends to the tokens"),
        "retrieval": ("hfproj.probes.retrieval:RetrievalProbe", "mean average precision and recall@k by cosine"),
        "kmeans": ("hfproj.probes.clustering:KMeansProbe", "k-means: matched accuracy, NMI, ARI"),
        "fine_tune": ("hfproj.probes.finetune:FineTuneProbe", "the whole network, on all or a share of the labels"),
    },
    needs=["name", "fit", "score"],
)


def list_probes() -> dict[str, str]:
    """Return every probe's name with a line that describes it.

    Example:
        >>> "knn" in list_probes()
        True
    """
    return PROBES.list()


def create_probe(name: str, **options: Any) -> Any:
    """Return a probe by name.

    Raises:
        UsageError: an unknown name or option.

    Example:
        >>> create_probe("knn", k=10)
        KNNProbe(k=10, temperature=0.07, metric='cosine')
    """
    return PROBES.create(name, **options)


def register_probe(name: str, cls: type, line: str = "") -> None:
    """Add a probe class of your own.

    Args:
        name: What :func:`create_probe` and ``evaluate(probes=[…])`` will know it by.
        cls: Its constructor takes keywords only; ``fit(f, y)``, ``score(f, y)``, ``results_`` and a class attribute
            ``name``.
        line: What it is; by default the first line of the class docstring.

    Raises:
        UsageError: If the name is taken, or the class has no ``name``, ``fit`` or ``score``.
    """
    PROBES.register(name, cls, line)


from hfproj.probes.attentive import AttentiveProbe  # noqa: E402  (the registry has to exist first)
from hfproj.probes.clustering import KMeansProbe  # noqa: E402
from hfproj.probes.evaluation import evaluate  # noqa: E402
from hfproj.probes.few_shot import FewShotProbe  # noqa: E402
from hfproj.probes.finetune import FineTuneProbe  # noqa: E402
from hfproj.probes.group_robust import GroupRobustProbe, group_accuracies  # noqa: E402
from hfproj.probes.knn import KNNProbe  # noqa: E402
from hfproj.probes.linear import LinearProbe  # noqa: E402
from hfproj.probes.many_rates import ManyRatesProbe  # noqa: E402
from hfproj.probes.mlp import MLPProbe  # noqa: E402
from hfproj.probes.nuisance import ProbeGap, RotatedImages, probe_gap  # noqa: E402
from hfproj.probes.retrieval import RetrievalProbe  # noqa: E402

__all__ = [
    "PROBES",
    "AttentiveProbe",
    "FewShotProbe",
    "FineTuneProbe",
    "GroupRobustProbe",
    "KMeansProbe",
    "KNNProbe",
    "LinearProbe",
    "MLPProbe",
    "ManyRatesProbe",
    "ProbeGap",
    "RetrievalProbe",
    "RotatedImages",
    "create_probe",
    "evaluate",
    "group_accuracies",
    "list_probes",
    "probe_gap",
    "register_probe",
]
