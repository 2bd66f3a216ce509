"""What an objective is: its attributes, what a call gives and returns, and the checks of options and calls.

An objective is an ``nn.Module`` without parameters, called as ``objective(z, **given)`` with projections
``z: [views, batch, dim]`` and, by keyword, what else there is; it ignores what it has no use for:

| keyword | what | shape |
|---|---|---|
| ``labels`` | class of each image | ``[batch]`` |
| ``index`` | number of each image in the data set | ``[batch]`` |
| ``prediction`` | p, of the adapter's predictor | ``[views, batch, dim]`` |
| ``scores`` | prototype logits: cosines of z with the prototypes, times learned lengths | ``[views, batch, K]`` |
| ``prototypes`` | what unit z are multiplied with to give scores, without a gradient | ``[K, dim]`` |
| ``target`` | z̄ (or its scores) of the EMA teacher, without a gradient | ``[target views, batch, dim]`` |
| ``scales`` | the adapter's learnable scalars, by name | dict of scalars |
| ``step`` | `Step` | |

Rows of a view are in the same order. Any floating-point type is accepted and computed in float32 or better. Rows of
other processes belong to the batch (:mod:`hfproj.distributed`), and processes may hold batches of different sizes.

Attributes of the class or the instance tell the trainer what to prepare:

* ``views = (fewest, most or None)`` and ``needs``, the keywords without which there is no loss;
* where ``"target"`` is needed: ``target_of = "projection"`` or ``"scores"``, ``target_views``, how many first views the
  teacher sees (None: all), and ``ema_momentum = (start, end)``, joined by a cosine;
* ``scales``: name → initial value, where ``"scales"`` are needed;
* ``on_epoch_start(step)``, if it has this method, is called before each epoch;
* ``frozen(step)``, if it has this method, returns which of ``"head"``, ``"predictor"``, ``"prototypes"`` are frozen.
"""

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.functional.contrastive import check_images
from hfproj.functional.overflow import OverflowGuard
from hfproj.functional.rows import gather_views
from hfproj.registry import ShowsOptions
from hfproj.typing import Views

_HINTS = {
    "labels": "use a data set with a label column, and pass labels=…",
    "index": "return 'index' from the collator (hfproj.ImageViews does), and pass index=…",
    "prediction": "give the config a predictor, ProjectionHeadConfig(predictor={'head': 'mlp'}), and pass prediction=…",
    "scores": "give the config prototypes, ProjectionHeadConfig(prototypes=300), and pass scores=…",
    "prototypes": "give the config prototypes, ProjectionHeadConfig(prototypes=300), and pass prototypes=…",
    "target": "hfproj.ProjectionTrainer keeps an EMA teacher; elsewhere pass its projections as target=…",
    "scales": "give the config the objective's scales, ProjectionHeadConfig(scales={name: value}), and pass scales=…",
    "step": "pass step=Step.at(seed, global_step, epoch), the same on all processes",
}
KEYWORDS = tuple(_HINTS)  # of every call


class ObjectiveOutput(NamedTuple):
    """`loss`: that of the global batch, one number. `terms`: named numbers to log, without gradients."""

    loss: Tensor
    terms: dict[str, Tensor]


@dataclasses.dataclass
class Step:
    """Where training stands: `global_step` optimizer steps and `epoch` epochs (with the fraction of the current one)
    are done; `generator` is the source of randomness, in the same state on all processes and after a resume.
    """

    global_step: int
    epoch: float
    generator: torch.Generator

    @classmethod
    @checked
    def at(cls, seed: int, global_step: int, epoch: float, device: torch.device | str = "cpu") -> "Step":
        """Make a step whose generator depends on (`seed`, `global_step`) and on nothing else.

        Example:
            >>> a, b = Step.at(0, 7, 0.5), Step.at(0, 7, 0.5)
            >>> bool(torch.rand((), generator=a.generator) == torch.rand((), generator=b.generator))
            True
        """
        # Hashed, since torch's CPU generator reads 32 bits only and neighbouring seeds must not meet.
        digest = hashlib.blake2b(f"{seed}:{global_step}".encode(), digest_size=4).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
        return cls(global_step, epoch, generator)


_KINDS: dict[str, type] = {**dict.fromkeys(_HINTS, Tensor), "scales": Mapping, "step": Step}


class Objective(ShowsOptions, nn.Module):
    """Base of the objectives of this room: two or more views and nothing beside z, unless the class says otherwise.

    :func:`check_call` checks a call once; the class's own ``compute`` then states by name what it needs. A class of
    your own may be any ``nn.Module`` with the attributes in the module docstring.
    """

    views: tuple[int, int | None] = (2, None)
    needs: frozenset[str] = frozenset()
    target_of = "projection"
    target_views: int | None = 2
    scales: Mapping[str, float] = {}
    compute: Callable[..., ObjectiveOutput]

    def __init__(self) -> None:
        super().__init__()  # written out, since nn.Module's own takes any option

    def forward(self, z: Views, *others: object, **given: object) -> ObjectiveOutput:
        """Return the loss of the global batch and terms to log; the module docstring says what may be given.

        Raises:
            UsageError: If the call lacks something, as in :func:`check_call`, or ``compute`` refuses it.
            NonFiniteLossError: In the backward pass, if the gradient of a finite loss is not finite in the type of z.
        """
        if others:
            how = f"{type(self).__name__.lower()}(torch.stack([z_a, z_b]))"
            raise UsageError(f"{type(self).__name__} takes the views as one tensor [views, batch, dim]: {how}.")
        check_call(self, z, **given)
        guard = OverflowGuard(type(self).__name__)
        loss, terms = self.compute(guard(z), **{name: guard(value) for name, value in given.items()})
        return ObjectiveOutput(guard.loss(loss), terms)

    def global_batch(self, z: Views, *, gather: bool = True) -> Views:
        """Return views of the images of all processes, or of this one; raise a UsageError if it is one image."""
        z = gather_views(z) if gather else z
        check_images(z.shape[1], type(self).__name__)
        return z

    def check_shape(
        self, name: str, value: Tensor, z: Views, *, views: int | None = None, dim: int | None = None
    ) -> None:
        """Raise a UsageError if predictions, targets or prototype logits are not ``[views, batch, dim]`` like z.

        `views` is how many views there must be at least (None: as many as in z), `dim` the width (None: that of z).
        """
        wanted = [z.shape[0] if views is None else views, z.shape[1], z.shape[2] if dim is None else dim]
        fits = value.ndim == 3 and list(value.shape[1:]) == wanted[1:]
        if not fits or value.shape[0] < wanted[0] or (views is None and value.shape[0] > wanted[0]):
            who, like = type(self).__name__, "the images and the width" if dim is None else "the images"
            got = list(value.shape)
            raise UsageError(f"{who} needs {name} of shape {wanted}, {like} of z {list(z.shape)}, got {got}.")

    def check_per_image(self, name: str, value: Tensor, z: Views) -> None:
        """Raise a UsageError if labels or numbers of images are not one whole number for each image of z."""
        if value.shape != z.shape[1:2] or value.is_floating_point():
            raise UsageError(
                f"{type(self).__name__} needs one whole number for each of the {z.shape[1]} images as {name}, got "
                f"{value.dtype} of shape {list(value.shape)}."
            )


def check_views(objective: nn.Module, count: int) -> None:
    """Raise a UsageError if a batch has fewer or more views than the objective takes."""
    fewest, most = getattr(objective, "views", (1, None))
    if count < fewest or (most is not None and count > most):
        wanted = f"{fewest}" if most == fewest else f"at least {fewest}" if most is None else f"{fewest} to {most}"
        hint = f"set num_views={fewest} in the collator (hfproj.ImageViews)"
        raise UsageError(f"{type(objective).__name__} needs {wanted} views of each image, got {count}; {hint}.")


def check_needs(objective: nn.Module, given: Mapping[str, object]) -> None:
    """Raise a UsageError if one of the objective's ``needs`` is absent or None."""
    for name in sorted(getattr(objective, "needs", ())):
        if given.get(name) is None:
            raise UsageError(f"{type(objective).__name__} needs {name!r}, which is missing: {_HINTS[name]}.")


def check_call(objective: nn.Module, z: object, **given: object) -> None:
    """Refuse a call that the objective can't compute.

    Raises:
        UsageError: If z is no floating-point tensor ``[views, batch, dim]``, its views are too few or too many, or one
            of the objective's ``needs`` is missing or of another type.

    Example:
        >>> class Pairs(nn.Module):
        ...     views = (2, 2)
        >>> check_call(Pairs(), torch.zeros(2, 4, 8))
    """
    who = type(objective).__name__
    if isinstance(z, list | tuple) and len({tuple(getattr(v, "shape", ())) for v in z}) > 1:
        got = ", ".join(str(list(getattr(v, "shape", ()))) for v in z)
        raise UsageError(f"{who} takes views of the same images, z of shape [views, batch, dim], got {got}.")
    if not isinstance(z, Tensor) or z.ndim != 3:
        raise UsageError(
            f"{who} takes projections z of shape [views, batch, dim], got "
            f"{list(z.shape) if isinstance(z, Tensor) else type(z).__name__}. Make views of every image in the data "
            "collator and stack their projections: torch.stack([z_a, z_b])."
        )
    if not z.is_floating_point() or not z.shape[2]:
        got = f"{z.dtype} of shape {list(z.shape)}"
        raise UsageError(f"{who} takes projections z in floating-point numbers, of one dimension or more, got {got}.")
    check_views(objective, z.shape[0])
    check_needs(objective, given)
    for name, value in given.items():
        kind = _KINDS.get(name, object)
        if value is not None and not isinstance(value, kind):
            raise UsageError(f"{who} takes {name} as a {kind.__name__}, got {type(value).__name__}: {_HINTS[name]}.")


def check_output(objective: nn.Module, returned: Any) -> ObjectiveOutput:
    """Return what a call of an objective returned, which has to be a loss of one number and a dict of terms.

    Raises:
        UsageError: If it is anything else, such as the loss alone.

    Example:
        >>> check_output(nn.Identity(), torch.zeros(3))
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected Identity to return a pair, (loss, terms), got a tensor of shape [3]; ...
    """
    pair: Any = returned if isinstance(returned, tuple | list) and len(returned) == 2 else (None, None)
    loss, terms = pair
    named = isinstance(terms, Mapping) and all(isinstance(value, Tensor) for value in terms.values())
    if isinstance(loss, Tensor) and loss.numel() == 1 and named:
        return ObjectiveOutput(loss, dict(terms))

    def kind(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"a dict of {', '.join(sorted({type(v).__name__ for v in value.values()})) or 'nothing'}"
        return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    got = f"({', '.join(map(kind, returned))})" if pair is returned else kind(returned)
    raise UsageError(
        f"Expected {type(objective).__name__} to return a pair, (loss, terms), got {got}; return the loss of the batch "
        "as a tensor of one number, with a dict of tensors to log: return loss, {}."
    )


def check_callable(objective: nn.Module) -> None:
    """Raise a UsageError for a module that can't be called as objectives are, such as a loss of torch's own."""
    try:
        inspect.signature(objective.forward).bind(None, **dict.fromkeys(KEYWORDS))
    except TypeError as error:
        kind = type(objective).__name__
        raise UsageError(
            f"Expected an objective, called as objective(z, labels=…, target=…, …), got {kind}: {error}; give the name "
            "of one (hfproj.list_objectives()), or let its forward take **others."
        ) from error


def check_positive(name: str, value: float, *, usual: str) -> float:
    """Return the option `name`, or raise a UsageError if it is no finite number above 0, with what is `usual`.

    Example:
        >>> check_positive("temperature", -1.0, usual="0.05 to 1")
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected temperature to be a positive number (0.05 to 1 is usual), got -1.0.
    """
    if not 0 < value < math.inf:
        raise UsageError(f"Expected {name} to be a positive number ({usual} is usual), got {value}.")
    return value


def check_temperature(temperature: float) -> float:
    """Return the temperature of a softmax, or raise a UsageError if it is not a positive finite number."""
    return check_positive("temperature", temperature, usual="0.05 to 1")


def check_between(low: int, high: int, **values: int | float) -> None:
    """Raise a UsageError if an option is not a number from `low` to `high`."""
    for name, value in values.items():
        if not low <= value <= high:
            raise UsageError(f"Expected {name} to be from {low} to {high}, got {value}.")


def check_at_least(fewest: int, **values: int | float | None) -> None:
    """Raise a UsageError if an option is below `fewest` or not finite; None passes.

    Example:
        >>> check_at_least(1, w_iter=0)
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected w_iter to be at least 1, got 0.
    """
    for name, value in values.items():
        if value is not None and not fewest <= value < math.inf:
            raise UsageError(f"Expected {name} to be at least {fewest}, got {value}.")


def check_momentum(ema_momentum: Sequence[float]) -> tuple[float, float]:
    """Return the momentum of the EMA teacher at start and end, or raise a UsageError if it is not two of 0 to 1.

    Example:
        >>> check_momentum([0.99, 1.0])  # a list, as a JSON file has it
        (0.99, 1.0)
    """
    if len(ema_momentum) != 2 or not all(0 <= m <= 1 for m in ema_momentum):
        wanted = "ema_momentum to be two numbers from 0 to 1, at the start and end"
        raise UsageError(f"Expected {wanted}, got {ema_momentum}.")
    return ema_momentum[0], ema_momentum[1]
