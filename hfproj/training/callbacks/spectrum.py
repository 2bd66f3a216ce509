"""`SpectrumCallback`: rank, spread and alignment of h and z on a fixed probe batch, while training goes on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfproj import diagnostics, distributed
from hfproj.errors import UsageError, unknown
from hfproj.training.callbacks.base import IMAGES, ProbeWatch

# name → function of features [views, images, dim]
_ROWS: dict[str, Callable[[Tensor], float]] = {
    "rankme": diagnostics.rankme,
    "std": diagnostics.representation_std,
    "effective_rank": diagnostics.effective_rank,
    "stable_rank": diagnostics.stable_rank,
    "participation_ratio": diagnostics.participation_ratio,
    "nesum": diagnostics.nesum,
    "alpha_req": lambda f: diagnostics.alpha_req(f).alpha,
    "condition_number": lambda f: diagnostics.covariance_condition_number(f).on_support,
    "uniformity": diagnostics.uniformity,
    "wasserstein_uniformity": diagnostics.wasserstein_uniformity,
    "offdiag_energy": diagnostics.covariance_offdiag_energy,
    "whiteness": diagnostics.whiteness,
    "matrix_entropy": diagnostics.matrix_entropy,
    "self_cluster": diagnostics.self_cluster,
}
_VIEWS: dict[str, Callable[[Tensor], float]] = {
    "positive_cosine": diagnostics.positive_cosine,
    "alignment": diagnostics.alignment,
    "lidar": diagnostics.lidar_of_views,
}


def _of_rows(measure: Callable[[Tensor], float]) -> Callable[[Tensor], float]:
    return lambda f: measure(f.flatten(0, 1))


METRICS: dict[str, Callable[[Tensor], float]] = {
    **{name: _of_rows(measure) for name, measure in _ROWS.items()},
    **_VIEWS,
}
DEFAULT = ("rankme", "std", "positive_cosine")


class SpectrumCallback(ProbeWatch):
    """Records diagnostics of h and z: `trainer.history` gets ``rankme_h``, ``rankme_z``, ``std_h`` …, one row a step.

    They are those of `hfproj.diagnostics` over all views of the probe batch, whose images and augmentations stay the
    same, on any number of processes; the model is in eval mode. The log has them as ``probe_rankme_h`` …, since
    ``rankme_h`` there is that of the training batch. The history is written beside each saved adapter
    (``history.parquet``), and resumed from there.

    Args:
        metrics: Names of diagnostics: "rankme", "std" (of unit rows), "effective_rank", "stable_rank",
            "participation_ratio", "nesum", "alpha_req", "condition_number" (of the covariance, on its support),
            "uniformity", "wasserstein_uniformity", "offdiag_energy", "whiteness", "matrix_entropy", "self_cluster";
            with two or more views "positive_cosine", "alignment", "lidar". Cost: see docs/diagnostics.md.
        every: Steps between two measurements; None: so rarely that they take less than a hundredth of the time.
        images: Of the probe batch.
        dataset: Where its images come from; None: the trainer's `eval_dataset`, else its `train_dataset`.

    Raises:
        UsageError: an unknown metric, or as `ProbeWatch`.

    Example:
        >>> SpectrumCallback(metrics=["rankmee"])
        Traceback (most recent call last):
        hfproj.errors.UsageError: Unknown metric 'rankmee'. Did you mean 'rankme'? ...
    """

    def __init__(
        self,
        *,
        metrics: Sequence[str] = DEFAULT,
        every: int | None = None,
        images: int = IMAGES,
        dataset: Any = None,
    ):
        super().__init__(every=every, images=images, dataset=dataset)
        for name in metrics:
            if name not in METRICS:
                raise unknown("metric", name, METRICS)
        self.metrics = tuple(metrics)

    def measure(self) -> dict[str, float]:
        """Return each metric of h and z; NaN where features are not finite, or where the metric is not defined."""
        with self.trainer.accelerator.autocast():
            h, z = self.views.features(self.trainer.model, self.trainer.args.device)
        values: dict[str, float] = {}
        if distributed.rank() == 0:
            for layer, f in (("h", h), ("z", z)):
                for name in self.metrics:
                    if name in _VIEWS and f.shape[0] < 2:
                        continue
                    values[f"{name}_{layer}"] = _value(name, f)
        return distributed.broadcast_object(values)  # the same on all processes, to the last bit


def _value(name: str, f: Tensor) -> float:
    if not torch.isfinite(f).all():
        return float("nan")
    try:
        return METRICS[name](f)
    except UsageError:  # too few dimensions for α, say: no reason to end a training
        return float("nan")
