"""Probes by name: the table, and what makes a probe of a name, a (name, options) mapping or an object."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.registry import Registry
from hfproj.typing import Probe

PROBES: Registry[Probe] = Registry(
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
        "fine_tune": ("hfproj.probes.finetune:FineTuneProbe", "the whole network, on all or a fraction of the labels"),
    },
    needs=["name", "fit", "score"],
    calls=lambda cls: (
        {"fit": ["model", "train"], "score": ["test"]}
        if getattr(cls, "on", "features") == "model"
        else {"fit": ["features", "labels"], "score": ["features", "labels"]}
    ),
)

ProbeLike: TypeAlias = str | Mapping[str, Any] | Probe  # a name, {"name": …, **options}, or an object


@checked
def list_probes() -> dict[str, str]:
    """Return every probe's name with a line that describes it.

    Example:
        >>> "knn" in list_probes()
        True
    """
    return PROBES.list()


@checked
def create_probe(name: str, **options: Any) -> Probe:
    """Return a probe by name.

    Raises:
        UsageError: If no probe has this name, or if it has no such option.

    Example:
        >>> create_probe("knn", k=10)
        KNNProbe(k=10, temperature=0.07)
    """
    return PROBES.create(name, **options)


@checked
def register_probe(name: str, cls: type, line: str = "") -> None:
    """Add a probe class of your own, see `hfproj.typing.Probe`.

    Args:
        name: What :func:`create_probe` and ``evaluate(probes=[…])`` call it; the class has it as its attribute `name`.
        cls: Its constructor takes keywords only.
        line: What it is; by default the first line of the class docstring.

    Raises:
        UsageError: If the name is taken, or if the class has no ``name``, ``fit`` or ``score``, or these take
            something else than features and labels (with ``on = "model"``: model and data sets).
    """
    PROBES.register(name, cls, line)


def make_probe(given: Any) -> Any:
    """Return the probe that a name or a mapping of its name and options describes; an object as it is.

    Example:
        >>> make_probe({"name": "knn", "k": 10}).k
        10
    """
    if isinstance(given, type):
        raise UsageError(f"Expected a probe, got the class {given.__name__}; write {given.__name__}().")
    if isinstance(given, Mapping) and "name" in given:
        return create_probe(**given)
    if isinstance(given, str):
        if "," in given:
            names = [name.strip() for name in given.split(",")]
            raise UsageError(f"Expected the name of a probe, got {given!r}; several go into a list: probes={names}.")
        return create_probe(given)
    if isinstance(given, Mapping) and len(given) == 1 and next(iter(given)) in PROBES.list():
        name, options = next(iter(given.items()))
        example = {"name": name, **(options if isinstance(options, Mapping) else {})}
        raise UsageError(f"Expected a probe as a dict with its name, got {given!r}; write {example}.")
    if not all(callable(getattr(given, method, None)) for method in ("fit", "score")):
        raise UsageError(f"Expected a probe, its name or a dict such as {{'name': 'knn', 'k': 10}}, got {given!r}.")
    return given


def make_probes(given: ProbeLike | Sequence[ProbeLike]) -> list[Probe]:
    """Return a list of probes, also of a single one; see `make_probe`.

    Example:
        >>> make_probes("knn")
        [KNNProbe(k=20, temperature=0.07)]
    """
    several = isinstance(given, Sequence) and not isinstance(given, str)
    return [make_probe(probe) for probe in given] if several else [make_probe(given)]  # type: ignore[union-attr]
