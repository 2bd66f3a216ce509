"""Types that many signatures share; the letters are those of the papers (h representation, z projection)."""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Features = Float[Tensor, "rows dim"]
Views = Float[Tensor, "views batch dim"]
Scalar = Float[Tensor, ""]


@runtime_checkable
class HasGenerator(Protocol):
    """What draws at random in a step of training: :class:`hfproj.objectives.base.Step`."""

    generator: torch.Generator


@runtime_checkable
class Probe(Protocol):
    """What `hfproj.evaluate` measures with.

    It may also have ``unit`` (of `score`), ``correct_`` (after scoring, right or wrong row by row) and ``on``:
    "features" (the default) or "tokens", then `fit` and `score` get these and labels, or "model", then
    ``fit(model, train)`` and ``score(test)`` get the model and data sets.

    Attributes:
        results_: After scoring: ``{"value": …, "protocol": {…}}``, and ``"values"``, a mapping of further numbers.
    """

    @property
    def name(self) -> str:
        """What `results.json` calls it."""

    if TYPE_CHECKING:  # at run time a probe that was not scored has none
        results_: dict[str, Any]

    def fit(self, *train: Any, **options: Any) -> Any:
        """Fit it, and return it."""

    def score(self, *test: Any, **options: Any) -> float:
        """Return the main number, and keep it in `results_`."""
