"""Why a collapse is likely to have happened, from the objective, the head and how the weights moved.

What is looked at, in this order:

1. Learning rate: the optimizer moved head or backbone by more than `FAST` of their norm in one step.
2. Stop-gradient: an objective of predictions passes a gradient to the projections that it should hold still.
3. Predictor: an objective that is as low at collapse as anywhere rests on a predictor, and there is none that learns.
4. Temperature: collapsed rows cost hardly more than rows spread evenly, since similarities hardly count.
5. BatchNorm: an objective that is as low at collapse as anywhere, and neither head nor predictor has a norm.
6. Objective: nothing in it, and no regularizer, keeps rows apart.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.training.callbacks.base import IMAGES, ProbeWatch
from hfproj.training.callbacks.head_loss import HeadLoss, joint
from hfproj.training.methods import active_modules

FAST = 0.3  # of the norm, in a step; healthy runs stay below a tenth
ROUNDING = 1e-9
FLAT = 0.05  # of the loss at collapse: what rows spread evenly save


class Cause(NamedTuple):
    """A likely cause: its name, and what was seen with what to do."""

    name: str
    why: str


def likely_causes(trainer: Any) -> list[Cause]:
    """Return the likely causes of a collapse, the likeliest first; "unknown" if nothing is conspicuous."""
    watch = next(
        (c for c in trainer.callback_handler.callbacks if isinstance(c, ProbeWatch)), ProbeWatch(images=IMAGES)
    )
    watch.bind(trainer)
    loss = HeadLoss(trainer, watch.views)
    found = [_learning_rate(trainer), *_objective(trainer, loss)]
    causes = [cause for cause in found if cause is not None]
    return causes or [
        Cause(
            "unknown",
            "Weights move slowly, and the objective keeps rows apart. Lower learning_rate, or add a regularizer such "
            "as vicreg_terms.",
        )
    ]


def flat_loss(trainer: Any) -> float | None:
    """Return what an objective is for a batch of equal rows of z, if rows spread evenly hardly cost less than that.

    None where the objective tells the two apart well, or not at all, or is no function of z alone.
    """
    objective = copy.deepcopy(trainer.objective).double().eval()
    last = trainer.last_batch.get("z")
    if set(getattr(objective, "needs", ())) & {"prediction", "target", "scores"} or not isinstance(last, Tensor):
        return None
    views, images, dim = last.shape
    own = torch.arange(images, device=last.device)
    given = {"labels": own, "index": own, "scales": dict(active_modules(trainer.bare_model()).scales) or None}

    def value(z: Tensor) -> float:
        with torch.no_grad():
            return float(objective(z, **given, step=trainer.step())[0])

    like = last.double()
    try:
        collapsed = value(torch.ones_like(like))
        spread = value(_directions(images, dim, like).expand(views, -1, -1).contiguous())
    except UsageError:  # what can't be whitened, for one, has no value
        return None
    return collapsed if ROUNDING * max(1.0, abs(collapsed)) < collapsed - spread <= FLAT * abs(collapsed) else None


def _learning_rate(trainer: Any) -> Cause | None:
    ratios = {
        part: max((row.get(f"update_ratio_{part}") or 0.0 for row in trainer.history), default=0.0)
        for part in ("head", "backbone")
    }
    part = max(ratios, key=lambda p: ratios[p])
    if ratios[part] <= FAST:
        return None
    rate = trainer.args.learning_rate
    return Cause(
        "learning rate",
        f"The {part} moved by {ratios[part]:.0%} of its norm in one step (update_ratio_{part}); lower learning_rate, "
        f"{rate:g} at its peak, to {rate / 10:g} or less, or raise warmup_steps.",
    )


def _objective(trainer: Any, loss: HeadLoss) -> list[Cause | None]:
    needs: frozenset[str] = getattr(loss.objective, "needs", frozenset())
    name = type(loss.objective).__name__
    causes: list[Cause | None] = []
    if "prediction" in needs and _gradient_of_projections(loss) > 0:
        causes.append(
            Cause(
                "stop-gradient",
                f"{name} passes a gradient to the projections that the predictions are compared with; detach them.",
            )
        )
    collapsed, spread = _value(loss, _collapsed(loss)), _value(loss, _spread(loss))
    if collapsed is None or spread is None:
        return causes
    saved = collapsed - spread
    same = saved <= ROUNDING * max(1.0, abs(collapsed), abs(spread))
    if not same and saved > FLAT * abs(collapsed):
        return causes
    if not same:
        temperature = getattr(loss.objective, "temperature", None)
        if temperature is not None:
            causes.append(
                Cause(
                    "temperature",
                    f"At temperature {temperature:g} similarities hardly count: collapsed rows cost {collapsed:.4g}, "
                    f"rows spread evenly {spread:.4g}. Lower it, to 0.1 or 0.2.",
                )
            )
        return causes
    predictor = loss.modules.predictor
    if "prediction" in needs and (predictor is None or not any(True for _ in predictor.parameters())):
        causes.append(
            Cause(
                "predictor",
                f"{name} is as low at collapse as anywhere, and only a predictor that learns keeps it away: "
                "ProjectionHeadConfig(predictor={'head': 'mlp'}).",
            )
        )
    held = "prediction" in needs or "target" in needs
    if held and not any("Norm" in type(m).__name__ for m in loss.modules.modules()):
        causes.append(Cause("BatchNorm", f"{name} has no negatives, and the head no norm; make it with norm='batch'."))
    if not held and not trainer.regularizers:
        causes.append(
            Cause("objective", f"Nothing in {name} keeps rows apart; add a regularizer, for example vicreg_terms.")
        )
    return causes


def _gradient_of_projections(loss: HeadLoss) -> float:
    """Return the norm of ∂L/∂z with the predictions held still: 0 where z is detached, as it should be."""
    with torch.no_grad():
        z = loss.modules.head(loss.h)
        prediction = z if loss.modules.predictor is None else loss.modules.predictor(z)
    prediction = prediction.clone().requires_grad_()  # an identity returns z itself
    value = loss.of_projections(z.requires_grad_(), prediction)
    (gradient,) = torch.autograd.grad(value, z, allow_unused=True)
    own = z.new_zeros(()) if gradient is None else gradient.norm()
    return float(joint(own))


def _value(loss: HeadLoss, z: Tensor) -> float | None:
    """Return the loss where predictions and targets are the projections; None where it is not defined."""
    copies = loss.given["target"]
    try:
        with torch.no_grad():
            # Targets of other width are scores, which follow from z by the prototypes.
            target = None
            if copies is not None:
                rows = z[: len(copies)]
                target = rows if copies.shape[-1] == z.shape[-1] else loss.modules.prototypes(rows)
            return float(loss.of_projections(z, z, target))
    except UsageError:
        return None


def _collapsed(loss: HeadLoss) -> Tensor:
    views, images, _ = loss.h.shape
    return loss.h.new_ones(views, images, loss.modules.head.out_dim)


def _spread(loss: HeadLoss) -> Tensor:
    """Return independent directions for the images, the same in all views."""
    views, images, _ = loss.h.shape
    return _directions(images, loss.modules.head.out_dim, loss.h).expand(views, -1, -1).contiguous()


def _directions(images: int, dim: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(distributed.rank())
    rows = torch.randn(images, dim, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(rows, dim=-1).to(like)
