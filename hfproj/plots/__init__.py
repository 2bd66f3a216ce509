"""Figures of what was measured, one function each. matplotlib is imported when a figure is drawn; no global state of it
is touched.

Every function returns the figure and writes it if a path is given (png, svg or pdf); the same numbers give the same
file, byte for byte. `width` is in inches: narrow figures put their panels below each other.
"""

from hfproj.plots._common import picture
from hfproj.plots.covariance import plot_covariance
from hfproj.plots.curves import plot_curves
from hfproj.plots.eigenvalues import plot_eigenvalues
from hfproj.plots.feature_weights import plot_feature_weights
from hfproj.plots.groups import plot_groups
from hfproj.plots.layers import plot_layers
from hfproj.plots.metric_condition import plot_metric_condition
from hfproj.plots.orbits import orbit_coordinates, plot_orbits
from hfproj.plots.over_steps import plot_history
from hfproj.plots.spectrum import plot_spectrum

__all__ = [
    "orbit_coordinates",
    "picture",
    "plot_covariance",
    "plot_curves",
    "plot_eigenvalues",
    "plot_feature_weights",
    "plot_groups",
    "plot_history",
    "plot_layers",
    "plot_metric_condition",
    "plot_orbits",
    "plot_spectrum",
]
