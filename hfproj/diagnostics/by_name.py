"""The measures that a training or a study names by a string: of features h or z, one number each."""

from collections.abc import Callable

from torch import Tensor

from hfproj import diagnostics

# Name → function of views [views, images, dim]; MEASURES has those of the rows of all views [rows, dim], too.
OF_VIEWS: dict[str, Callable[[Tensor], float]] = {
    "positive_cosine": diagnostics.positive_cosine, "alignment": diagnostics.alignment,
    "lidar": diagnostics.lidar_of_views,
}  # fmt: skip
MEASURES: dict[str, Callable[[Tensor], float]] = {
    name: getattr(diagnostics, name)
    for name in ("rankme", "effective_rank", "stable_rank", "participation_ratio", "nesum", "uniformity",
                 "wasserstein_uniformity", "whiteness", "matrix_entropy", "self_cluster")
}  # fmt: skip
MEASURES |= {
    "std": diagnostics.representation_std, "alpha_req": lambda f: diagnostics.alpha_req(f).alpha,
    "condition_number": lambda f: diagnostics.covariance_condition_number(f).on_support,
    "offdiag_energy": diagnostics.covariance_offdiag_energy, **OF_VIEWS,
}  # fmt: skip
