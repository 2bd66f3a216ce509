"""Measures of features (h, z or p), in float64 and without gradient, whatever the features' own type.

Functions take features f `[rows, dim]` (UsageError if they are no floating-point matrix, have fewer than two rows, or
rows with NaN or infinity, which the message names), those of positive pairs `[views, batch, dim]`. Each says whether it
centres (subtracts the mean row), its unit and its range. `SpectrumState` and `ViewState` give the same numbers from a
stream or over processes. docs/diagnostics.md has the table of all.

One file holds the measures of one object: singular values (`spectrum`), correlations (`covariance`), unit rows
(`spread`), views (`views`), similarities (`information`), neighbours (`learnability`), known features (`weighting`),
the line of a training log (`global_batch`).
This room imports ``functional`` and what lies below; its siblings (heads, objectives …) it does not.
"""

# fmt: off
# isort: off
from hfproj.diagnostics.covariance import (
    correlation_offdiag_energy, covariance_offdiag_energy, vicreg_covariance, whiteness,
)
from hfproj.diagnostics.information import (
    InformationBounds, information_bounds, matrix_entropy, matrix_mutual_information,
)
from hfproj.diagnostics.learnability import Clid, clid, clid_scores, cluster_learnability, intrinsic_dimension
from hfproj.diagnostics.spectrum import (
    ConditionNumber, Decay, alpha_req, covariance_condition_number, covariance_spectrum, effective_rank, nesum,
    numerical_rank, participation_ratio, pseudo_condition_number, rankme, singular_values, stable_rank,
)
from hfproj.diagnostics.spectrum_state import SpectrumState
from hfproj.diagnostics.spread import coherence, representation_std, self_cluster, uniformity, wasserstein_uniformity
from hfproj.diagnostics.views import ViewState, alignment, lidar, lidar_of_views, positive_cosine
from hfproj.diagnostics.weighting import WeightInequality, feature_weights, layer_inequality, weight_inequality

__all__ = [
    "Clid", "ConditionNumber", "Decay", "InformationBounds", "SpectrumState", "ViewState", "WeightInequality",
    "alignment", "alpha_req", "clid", "clid_scores", "cluster_learnability", "coherence",
    "correlation_offdiag_energy", "covariance_condition_number", "covariance_offdiag_energy", "covariance_spectrum",
    "effective_rank", "feature_weights", "information_bounds", "intrinsic_dimension", "layer_inequality", "lidar",
    "lidar_of_views", "matrix_entropy", "matrix_mutual_information", "nesum", "numerical_rank", "participation_ratio",
    "positive_cosine", "pseudo_condition_number", "rankme", "representation_std", "self_cluster", "singular_values",
    "stable_rank", "uniformity", "vicreg_covariance", "wasserstein_uniformity", "weight_inequality", "whiteness",
]
