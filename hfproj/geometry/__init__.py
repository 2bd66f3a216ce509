"""Geometry of a head: what it does to the space of representations, and what the loss looks like from there.

Everything runs in eval mode, without changing the head, in float64 unless told otherwise. BatchNorm in training mode is
refused: there z of a row depends on the whole batch.
"""

from hfproj.geometry.degeneracy import (
    Overlap,
    augmentation_tangents,
    bottom_overlap,
    metric_degeneracy,
    metric_variation,
    nullity,
)
from hfproj.geometry.equilibrium import Equilibrium, constructed_equilibrium
from hfproj.geometry.flow import GradientFlow, gradient_flow, linear_invariant, relu_invariant
from hfproj.geometry.hessian import (
    CollapseReport,
    EffectiveHessian,
    collapse_report,
    count_negative,
    effective_hessian,
)
from hfproj.geometry.lanczos import ExtremeEigenvalues, extreme_eigenvalues
from hfproj.geometry.operators import EffectiveHessianOperator, HessianOperator
from hfproj.geometry.orbits import (
    OrbitMetrics,
    alignment_gain,
    compression,
    head_orbits,
    local_curvature,
    orbit_metrics,
    timescale_ratio,
    update_ratio,
)
from hfproj.geometry.pullback import (
    MetricCondition,
    PullbackMetric,
    jacobian,
    layerwise_condition_number,
    metric_condition_number,
    metric_spectrum,
    pullback_metric,
)
from hfproj.geometry.whitening import Whitening, curvature_barrier, subspace_whitening, whitening_score

__all__ = [
    "CollapseReport",
    "EffectiveHessian",
    "EffectiveHessianOperator",
    "Equilibrium",
    "ExtremeEigenvalues",
    "GradientFlow",
    "HessianOperator",
    "MetricCondition",
    "OrbitMetrics",
    "Overlap",
    "PullbackMetric",
    "Whitening",
    "alignment_gain",
    "augmentation_tangents",
    "bottom_overlap",
    "collapse_report",
    "compression",
    "constructed_equilibrium",
    "count_negative",
    "curvature_barrier",
    "effective_hessian",
    "extreme_eigenvalues",
    "gradient_flow",
    "head_orbits",
    "jacobian",
    "layerwise_condition_number",
    "linear_invariant",
    "local_curvature",
    "metric_condition_number",
    "metric_degeneracy",
    "metric_spectrum",
    "metric_variation",
    "nullity",
    "orbit_metrics",
    "pullback_metric",
    "relu_invariant",
    "subspace_whitening",
    "timescale_ratio",
    "update_ratio",
    "whitening_score",
]
