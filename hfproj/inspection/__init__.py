"""A trained head from inside, layer by layer (`autopsy`) and transform by transform (`invariance_report`); cutting it.

What was found are records of `hfproj.results.inside`, pictures of `hfproj.plots.inside`. Imports everything but what
trains, converts, exports or is a command; nothing but `hfproj` and the commands imports it.
"""

from hfproj.inspection.cutting import cut_head
from hfproj.inspection.layers import autopsy
from hfproj.inspection.moves import invariance_report

__all__ = ["autopsy", "cut_head", "invariance_report"]
