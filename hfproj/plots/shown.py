"""The figure that plots return: a notebook shows it where it is the last line of a cell, without pyplot."""

import matplotlib.figure

from hfproj.plots import canvas


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that IPython shows as a PNG."""

    def _repr_png_(self) -> bytes:
        return canvas.picture(self, "png")
