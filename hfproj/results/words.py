"""Words and numbers of results, each exactly once: table, card and page say what stands here.

To change how a verdict, an interval or a rounding reads, change it here.
"""

from collections.abc import Sequence
from typing import Any

# What measures are called where the name itself, its underscores as blanks, is not what people write. A measure with a
# unit is followed by it, so that a probe needs no entry here: "my_probe" in accuracy is "my probe accuracy".
LABELS = {
    "alpha_req": "α-ReQ", "few_shot": "few-shot", "fine_tune": "fine-tuning", "kmeans": "k-means", "knn": "k-NN",
    "knn_overlap": "k-NN overlap with h before", "cka": "linear CKA with h before", "lidar": "LiDAR",
    "many_rates": "linear (many rates)", "mlp": "MLP", "rankme": "RankMe",
}  # fmt: skip
# Measures that use no labels, in the order of their rows, and how to read them.
UNLABELLED = {
    "rankme": "effective number of directions that the features of these items use",
    "representation_std": "spread of the unit features over each dimension; 0 at collapse, at most 1/√width",
    "positive_cosine": "cosine between views of one item; 1 at collapse",
    "alignment": "distance between views of one item; 0 at collapse",
    "uniformity": "spread on the sphere, lower is more even; 0 at collapse",
    "lidar": "effective number of directions that tell items apart",
    "alpha_req": "exponent of the decay of the covariance's eigenvalues",
    "knn_overlap": "fraction of the nearest neighbours that are those of h before training",
    "cka": "similarity with h before training; 1 is the same up to rotation and scale",
}
# Where it is known of a measure without labels whether more (↑) or less (↓) of it is better.
ARROWS = {"alpha_req": "↓", "alignment": "↓", "uniformity": "↓"}
TEXT_NEIGHBOURS = (
    "Of a few held-out texts those nearest by cosine of h, before and after training, nearest first; ✓ has the same "
    "label, ✗ another one."
)
ARROWS_SAY = "↑ more is better, ↓ less is better; of the others neither is known."
HELD_OUT = (
    "All of it is of held-out items: of themselves or, where pairs are measured, of views of them. The same measures "
    "over training are of other rows, and are other numbers."
)
# What training did: `{layer}` is one of LAYER_NAMES.
HEADLINES = {
    "better": "The {layer} got better", "worse": "The {layer} got worse", "unclear": "No gain was measured",
    "alarm": "The collapse alarm rang while it trained", "guard": "A guard's limit was passed while it trained",
    "collapse": "A sign of dimensional collapse",
    "rank": "No sign of dimensional collapse",
    "backbone": "Another backbone than it was made on",
}  # fmt: skip
# What training did as far as it can be told without labels.
UNLABELLED_HEADLINES = {
    "better": "The representation got better, as far as can be told without labels",
    "worse": "The representation got worse, as far as can be told without labels",
    "unclear": "Without labels it can't be told whether the representation got better",
}  # fmt: skip
UNLABELLED_SIGN = (
    "On one data set such measures ranked checkpoints as a k-NN with labels did: this is a sign, and no proof."
)
# Where no accuracy of h was measured before and after training.
UNKNOWN = "No accuracy of h was measured before and after training: whether it got better is not known."
LAYER_NAMES = {"h": "representation", "z": "projection"}
BACKBONE = {
    "meant": "The adapter was made on {other} and is used here, as its author says, on a backbone with other weights.",
    "private": "Its backbone has no public source. Who has it passes it as `backbone=`, and it is compared with the "
    "one that the adapter was made on.",
    "digest": "SHA-256 of the backbone's tensors",
}
WENT = "went from {before} to {after}"
INTERVAL = "95 % interval"
NO_INTERVAL = "no interval, since answers row by row were not kept"
LESS_THAN_HALF = "less than half"
MISSING = "Not measured"
USUAL_PROBES = {
    "knn": LABELS["knn"], "linear": "linear probe", "fine_tune": LABELS["fine_tune"],
}  # else: "Not measured: …"  # fmt: skip
PROTOCOL = f"All of it in eval mode. {LABELS['rankme']} does not centre; spectra are of unit rows, centred."
INSIDE = {
    "title": "Inside the head",
    "transforms": "What is left of each transform of the views",
    "layers": "Intervals are paired with h over held-out rows and speak of each layer by itself. Where to cut was "
    "chosen on one half of these rows and confirmed on the other. Rank: singular values above rounding; condition: of "
    "the covariance on its support.",
    "moved": "Moves: distance between the two strengths over that of two different images. Read: accuracy of a linear "
    "probe that tells them apart; 0.50 is chance. h − z in points. Degeneracy: how much the head stretches that move "
    "of h, 1 as an average direction, 0 not at all.",
}
# What follows from it, by sense and layer.
ADVICE = {
    ("worse", "h"): "Use the bare backbone where your task resembles this one.",
    ("worse", "z"): "Use h, not z, where your task resembles this one.",
    ("unclear", "h"): "An interval that holds 0 says neither that the representation got better nor that it got worse: "
    "use the bare backbone where your task resembles this one.",
}
_ONE_DECIMAL = ("rankme", "lidar")  # they count directions


def label(name: str, unit: str, protocol: dict[str, Any]) -> str:
    """Return what a measure is called.

    Example:
        >>> label("knn", "accuracy", {"k": 20}), label("my_probe", "accuracy", {}), label("rankme", "", {})
        ('20-NN accuracy', 'my probe accuracy', 'RankMe')
    """
    if name == "knn" and "k" in protocol:
        return f"{protocol['k']}-NN {unit or 'accuracy'}"
    return " ".join(filter(None, (LABELS.get(name, name.replace("_", " ")), unit)))


def arrow(name: str, unit: str) -> str:
    """Return "↑" or "↓", what is better of a measure, or "" where neither is known.

    Example:
        >>> arrow("knn", "accuracy"), arrow("alpha_req", ""), arrow("rankme", "")
        ('↑', '↓', '')
    """
    return "↑" if unit.endswith("accuracy") or unit == "mAP" else ARROWS.get(name, "")


def number(name: str, mean: float, std: float | None = None) -> str:
    """Return the number of a measure, with its standard deviation if one is given.

    Example:
        >>> number("knn", 0.91903, 0.0059), number("rankme", 17.84)
        ('0.9190 ± 0.0059', '17.8')
    """
    text = f"{mean:.{_digits(name)}f}" + (f" ± {std:.{_digits(name)}f}" if std is not None else "")
    return text.replace("-", "−")


def change(name: str, difference: float) -> str:
    """Return a difference with its sign, a minus of the same width as the plus.

    Example:
        >>> change("knn", -0.01), change("rankme", 5.25)
        ('−0.0100', '+5.2')
    """
    return f"{difference:+.{_digits(name)}f}".replace("-", "−")


def interval(name: str, low: float, high: float) -> str:
    """Return the ends of an interval of differences.

    Example:
        >>> interval("knn", -0.01, 0.02)
        '−0.0100 to +0.0200'
    """
    return f"{change(name, low)} to {change(name, high)}"


def missing(name: str, layers: Sequence[str], when: str, dataset: str, reason: str) -> str:
    """Return what was not measured, and why.

    Example:
        >>> missing("RankMe", ["h"], "after", "digits", "one row")
        'RankMe of h after training on digits: one row.'
    """
    return f"{name} of {' and '.join(layers)} {when} training{f' on {dataset}' if dataset else ''}: {reason}."


def _digits(name: str) -> int:
    return 1 if name in _ONE_DECIMAL else 4
