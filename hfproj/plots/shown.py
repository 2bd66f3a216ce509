"""The figure that plots return: a notebook shows it where it is the last line of a cell, without pyplot."""

from matplotlib.figure import Figure

from hfproj.plots import canvas


class ShownFigure(Figure):
    """A matplotlib figure that IPython shows as a PNG."""

    def _repr_png_(self) -> bytes:
        return canvas.picture(self, "png")
