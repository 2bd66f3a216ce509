"""Geometry of a head: what it does to the space of representations, and what the loss looks like from there.

A head is any module or function from h `[rows, in_dim]` to z `[rows, out_dim]` that treats rows one by one; views are
rows (``h.flatten(0, 1)``). It runs in eval mode and is left as it was; results carry no gradient. `dtype` is that of
the computation, float64 by default. Functions of a head raise UsageError if BatchNorm or Dropout is in training mode
(z of a row then depends on the batch or on chance), if the head couples rows in another way, is random or fails on h,
and if rows of h are not finite. This room imports ``functional`` and what lies below; its siblings it does not.
"""

# fmt: off
# isort: off
from hfproj.geometry.constructions import (
    Equilibrium, Whitening, constructed_equilibrium, curvature_barrier, subspace_whitening, whitening_score,
)
from hfproj.geometry.degeneracy import (
    Overlap, augmentation_tangents, bottom_overlap, metric_degeneracy, metric_variation, nullity,
)
from hfproj.geometry.flow import GradientFlow, gradient_flow, linear_invariant, relu_invariant
from hfproj.geometry.hessian import (
    CollapseReport, EffectiveHessian, EffectiveHessianOperator, HessianOperator, collapse_report, count_negative,
    effective_hessian,
)
from hfproj.geometry.lanczos import ExtremeEigenvalues, extreme_eigenvalues
from hfproj.geometry.orbits import (
    OrbitMetrics, alignment_gain, compression, head_orbits, local_curvature, orbit_metrics, timescale_ratio,
    update_ratio,
)
from hfproj.geometry.pullback import (
    MetricCondition, PullbackMetric, jacobian, layerwise_condition_number, metric_condition_number, metric_spectrum,
    pullback_metric,
)

__all__ = [
    "CollapseReport", "EffectiveHessian", "EffectiveHessianOperator", "Equilibrium", "ExtremeEigenvalues",
    "GradientFlow", "HessianOperator", "MetricCondition", "OrbitMetrics", "Overlap", "PullbackMetric", "Whitening",
    "alignment_gain", "augmentation_tangents", "bottom_overlap", "collapse_report", "compression",
    "constructed_equilibrium", "count_negative", "curvature_barrier", "effective_hessian", "extreme_eigenvalues",
    "gradient_flow", "head_orbits", "jacobian", "layerwise_condition_number", "linear_invariant", "local_curvature",
    "metric_condition_number", "metric_degeneracy", "metric_spectrum", "metric_variation", "nullity", "orbit_metrics",
    "pullback_metric", "relu_invariant", "subspace_whitening", "timescale_ratio", "update_ratio", "whitening_score",
]
