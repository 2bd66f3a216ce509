"""Figures of what was measured, one function each. matplotlib is imported when a figure is drawn; no global state of it
is touched.

Every function returns the figure and writes it if `path` is given, whose suffix says the format (png, svg or pdf); the
same numbers give the same file, byte for byte. `width` is in inches, 4 to 40: narrow figures put their panels below
each other. `zero_line` draws a line at y = 0. All raise HfprojError where matplotlib is not installed, and UsageError
for another width or suffix. Layers named "h" and "z" look the same in every figure. Imports `results` and what lies
below it.
"""

from hfproj.plots.canvas import picture
from hfproj.plots.curves import plot_curves, plot_groups, plot_layers, plot_spectrum
from hfproj.plots.geometry import (
    orbit_coordinates, plot_covariance, plot_feature_weights, plot_metric_condition, plot_orbits,
)  # fmt: skip
from hfproj.plots.images import plot_map, plot_neighbours, plot_views
from hfproj.plots.inside import plot_autopsy, plot_invariance
from hfproj.plots.over_steps import plot_eigenvalues, plot_history

__all__ = [
    "orbit_coordinates", "picture", "plot_autopsy", "plot_covariance", "plot_curves", "plot_eigenvalues",
    "plot_feature_weights", "plot_groups", "plot_history", "plot_invariance",
    "plot_layers", "plot_map", "plot_metric_condition", "plot_neighbours", "plot_orbits",
    "plot_spectrum", "plot_views",
]  # fmt: skip
