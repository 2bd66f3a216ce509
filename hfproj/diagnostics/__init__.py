"""Measures of features (h, z or p): float64 inside, no gradient; each says whether it centres, its unit and its range.

Functions take features `[rows, dim]`, those of positive pairs `[views, batch, dim]`. `SpectrumState` and `ViewState`
give the same numbers from a stream or over processes. docs/diagnostics.md has the table of all.
"""

from hfproj.diagnostics.condition import ConditionNumber, covariance_condition_number, pseudo_condition_number
from hfproj.diagnostics.covariance import (
    correlation_offdiag_energy,
    covariance_offdiag_energy,
    vicreg_covariance,
    whiteness,
)
from hfproj.diagnostics.decay import Decay, alpha_req
from hfproj.diagnostics.discriminant import lidar, lidar_of_views
from hfproj.diagnostics.information import (
    InformationBounds,
    information_bounds,
    matrix_entropy,
    matrix_mutual_information,
)
from hfproj.diagnostics.learnability import Clid, clid, clid_scores, cluster_learnability, intrinsic_dimension
from hfproj.diagnostics.leverage import coherence, self_cluster
from hfproj.diagnostics.rank import (
    covariance_spectrum,
    effective_rank,
    nesum,
    numerical_rank,
    participation_ratio,
    rankme,
    singular_values,
    stable_rank,
)
from hfproj.diagnostics.spectrum_state import SpectrumState
from hfproj.diagnostics.sphere import uniformity, wasserstein_uniformity
from hfproj.diagnostics.spread import alignment, positive_cosine, representation_std
from hfproj.diagnostics.view_state import ViewState
from hfproj.diagnostics.weighting import WeightInequality, feature_weights, layer_inequality, weight_inequality

__all__ = [
    "Clid",
    "ConditionNumber",
    "Decay",
    "InformationBounds",
    "SpectrumState",
    "ViewState",
    "WeightInequality",
    "alignment",
    "alpha_req",
    "clid",
    "clid_scores",
    "cluster_learnability",
    "coherence",
    "correlation_offdiag_energy",
    "covariance_condition_number",
    "covariance_offdiag_energy",
    "covariance_spectrum",
    "effective_rank",
    "feature_weights",
    "information_bounds",
    "intrinsic_dimension",
    "layer_inequality",
    "lidar",
    "lidar_of_views",
    "matrix_entropy",
    "matrix_mutual_information",
    "nesum",
    "numerical_rank",
    "participation_ratio",
    "positive_cosine",
    "pseudo_condition_number",
    "rankme",
    "representation_std",
    "self_cluster",
    "singular_values",
    "stable_rank",
    "uniformity",
    "vicreg_covariance",
    "wasserstein_uniformity",
    "weight_inequality",
    "whiteness",
]
