"""Types that many signatures share; the letters are those of the papers (h representation, z projection)."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from typing import Literal as OneOf

    import numpy as np
    from PIL import Image
    from torch.utils.data import Dataset
    from typing_extensions import Unpack as Unpack

    AnyImage: TypeAlias = Image.Image | np.ndarray | Tensor | bytes | Mapping[str, Any]  # a dict: as datasets stores it
    Item: TypeAlias = AnyImage | tuple[Any, ...]

    class MapStyle(Protocol):
        """A data set with a length and integer indices: a ``datasets.Dataset``, a torchvision data set, a list."""

        def __len__(self) -> int: ...

        def __getitem__(self, index: int, /) -> Item: ...

    Data: TypeAlias = MapStyle | Dataset[Any]  # torch's class shows no length: a subclass has it
    DataOrStream: TypeAlias = Data | Iterable[Item]
    Refused: TypeAlias = NoReturn  # of keywords that are taken only for the sake of a better message
else:  # run-time type checkers let wrong values pass, for which there are better messages
    OneOf = type("OneOf", (), {"__class_getitem__": lambda cls, words: str})  # OneOf["a", "b"] is any string
    Unpack = type("Unpack", (), {"__class_getitem__": lambda cls, keywords: Any})  # of **options: Unpack[Keywords]
    AnyImage = Data = DataOrStream = Refused = Any

Pooling: TypeAlias = OneOf["cls", "mean", "cls_mean", "max", "last", "pooler"]
Interpolation: TypeAlias = OneOf["bicubic", "bilinear"]
Resampling: TypeAlias = OneOf["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
When: TypeAlias = OneOf["before", "after"]

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
