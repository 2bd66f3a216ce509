"""What an objective is given beside tensors, what it returns, and the checks that all of them share.

An objective is an ``nn.Module`` without parameters, called as ``objective(z, **given)`` with projections
``z: [views, batch, dim]`` and, by keyword, what else there is; it ignores what it has no use for:

| keyword | what | shape |
|---|---|---|
| ``labels`` | class of each image | ``[batch]`` |
| ``index`` | number of each image in the data set | ``[batch]`` |
| ``prediction`` | p, of the adapter's predictor | ``[views, batch, dim]`` |
| ``scores`` | cosines of z with the prototypes, times their lengths if learned | ``[views, batch, K]`` |
| ``prototypes`` | what unit z are multiplied with to give scores, without a gradient | ``[K, dim]`` |
| ``target`` | z̄ (or its scores) of the moving-average copy, without a gradient | ``[target views, batch, dim]`` |
| ``scales`` | the adapter's learnable scalars, by name | dict of scalars |
| ``step`` | `Step` | |

Class attributes (or attributes of the instance) tell the trainer what to prepare:

* ``views = (fewest, most or None)`` and ``needs``, the keywords that it can't do without;
* ``target_of = "projection"`` or ``"scores"``, ``target_views`` (the copy sees the first so many views; None: all) and
  ``ema_momentum = (start, end)``, which a cosine joins, where ``"target"`` is needed;
* ``scales``: name → initial value, where ``"scales"`` are needed;
* ``on_epoch_start(step)``, if there is such a method, is called before each epoch;
* ``frozen(step)``, if there is such a method, returns which of ``"head"``, ``"predictor"``, ``"prototypes"`` get no
  gradient in this step.

Rows of other processes belong to the batch: see :mod:`hfproj.distributed`.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hfproj.errors import UsageError

_CURES = {
    "labels": "use a data set with a label column, and pass labels=…",
    "index": "return 'index' from the collator (hfproj.ImageViews does), and pass index=…",
    "prediction": "give the config a predictor, ProjectionHeadConfig(predictor={'head': 'mlp'}), and pass prediction=…",
    "scores": "give the config prototypes, ProjectionHeadConfig(prototypes=300), and pass scores=…",
    "prototypes": "give the config prototypes, ProjectionHeadConfig(prototypes=300), and pass prototypes=…",
    "target": "hfproj.ProjectionTrainer keeps a moving-average copy; elsewhere pass its projections as target=…",
    "scales": "give the config the objective's scales, ProjectionHeadConfig(scales={name: value}), and pass scales=…",
    "step": "pass step=Step.at(seed, global_step, epoch), the same on all processes",
}


class ObjectiveOutput(NamedTuple):
    """Loss of the joint batch, and named scalars to log, without gradients."""

    loss: Tensor
    terms: dict[str, Tensor]


@dataclasses.dataclass
class Step:
    """Where training stands.

    Attributes:
        global_step: Optimizer steps taken so far.
        epoch: Epochs done so far, with the fraction of the current one.
        generator: Source of randomness, in the same state on all processes and after a resume.
    """

    global_step: int
    epoch: float
    generator: torch.Generator

    @classmethod
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


_KINDS: dict[str, type] = {**dict.fromkeys(_CURES, Tensor), "scales": Mapping, "step": Step}


def check_views(objective: nn.Module, count: int) -> None:
    """Refuse a batch with fewer or more views of each image than the objective takes.

    Raises:
        UsageError: so it is.
    """
    fewest, most = getattr(objective, "views", (1, None))
    if count < fewest or (most is not None and count > most):
        wanted = f"{fewest}" if most == fewest else f"at least {fewest}" if most is None else f"{fewest} to {most}"
        raise UsageError(
            f"{type(objective).__name__} needs {wanted} views of each image and the batch has {count}; set "
            f"num_views={fewest} in the collator (hfproj.ImageViews)."
        )


def check_needs(objective: nn.Module, given: dict[str, Any]) -> None:
    """Refuse a call that lacks something the objective can't do without.

    Raises:
        UsageError: so it does.
    """
    for name in sorted(getattr(objective, "needs", ())):
        if given.get(name) is None:
            raise UsageError(f"{type(objective).__name__} needs {name!r}, and there is none: {_CURES[name]}.")


def check_call(objective: nn.Module, z: Any, **given: Any) -> None:
    """Refuse projections of another shape or type, too few or too many views, and a lack of what the objective needs.

    Raises:
        UsageError: so it is.

    Example:
        >>> class Pairs(nn.Module):
        ...     views = (2, 2)
        >>> check_call(Pairs(), torch.zeros(2, 4, 8))
    """
    if not isinstance(z, Tensor) or z.ndim != 3:
        came = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise UsageError(
            f"{type(objective).__name__} takes projections z of shape [views, batch, dim], got {came}. Make views of "
            "every image in the data collator and stack their projections: torch.stack([z_a, z_b])."
        )
    if not z.is_floating_point() or not z.shape[2]:
        raise UsageError(
            f"{type(objective).__name__} takes projections z in floating-point numbers, of one dimension or more, got "
            f"{z.dtype} of shape {list(z.shape)}."
        )
    check_views(objective, z.shape[0])
    check_needs(objective, given)
    for name, value in given.items():
        if value is not None and not isinstance(value, _KINDS.get(name, object)):
            raise UsageError(
                f"{type(objective).__name__} takes {name} as a {_KINDS[name].__name__}, got {type(value).__name__}: "
                f"{_CURES[name]}."
            )
