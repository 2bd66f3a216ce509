"""Paper 5: a sparse projection head.

References:
    Song et al. 2023, "Towards the Sparseness of Projection Head in Self-Supervised Learning", arXiv 2307.08913.
"""

from hfproj.presets.published import PUBLISHED
from hfproj.reproduction.study import Study
from hfproj.presets.settings import Preset

PRESETS = {
    f"sparsehead_{name}": PUBLISHED[name].but(
        f"{PUBLISHED[name].line} + SparseHead",
        "SparseHead: arXiv 2307.08913, from a summary, no code. λ, the grouping (input features) and the layer (the "
        "first) are not published; they are ours, λ = 1e-4, and so is the division by ‖W‖_F, since a BatchNorm "
        "follows.",
        regularizers={"sparse_head": {"weight": 1e-4, "normalise": True}},
    )
    for name in ("simclr", "byol", "barlow_twins")
}


def studies() -> list[Study]:
    """Return its tables."""
    return []
