"""DINO: the student's views predict the distribution over prototypes that a teacher gives the other large views.

The EMA teacher sees the T large views only. With prototype logits s of the student's V views, t̄ of the teacher's and a
centre c,

    P_i = softmax((t̄_i − c)/τ_t),   p_v = softmax(s_v/τ_s),
    L = 1/(T(V−1)) Σ_i Σ_{v≠i} mean_n [ −Σ_j P_inj log p_vnj ],

and after the loss c ← m c + (1 − m) mean(t̄), which keeps a prototype from taking everything.

References:
    Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294, eqs. 1 to 4;
    facebookresearch/dino ``main_dino.py`` (``DINOLoss``, ``cancel_gradients_last_layer``).

Deviations:
    The centre moves in training mode only, and processes count by their rows. The score of a prototype is its cosine
    with z, times its length if learned: the official last layer does not learn the length either by default.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.functional.assignments import cross_view_entropy, log_probabilities
from hfproj.functional.rows import at_least_float32
from hfproj.objectives.base import Objective, ObjectiveOutput, Step, check_at_least, check_between, check_positive
from hfproj.typing import Scalar, Views


def dino_loss(
    scores: Float[Tensor, "views batch prototypes"], target: Float[Tensor, "target_views batch prototypes"],
    center: Float[Tensor, " prototypes"], *, student_temperature: float = 0.1, teacher_temperature: float = 0.04,
) -> Scalar:  # fmt: skip
    """Return DINO's loss of one batch; the class is `DINO`. Computed in float32 or better.

    Args:
        scores: Prototype logits s of all views.
        target: The teacher's, t̄, of the first views; it gets no gradient.
        center: c, subtracted from t̄.
        student_temperature: τ_s.
        teacher_temperature: τ_t.

    Example:
        >>> round(dino_loss(torch.zeros(4, 8, 16), torch.zeros(2, 8, 16), torch.zeros(16)).exp().item(), 4)
        16.0
    """
    p = teacher_probabilities(target, center, teacher_temperature)
    return cross_view_entropy(p, log_probabilities(scores, student_temperature)).mean()


def teacher_probabilities(
    target: Float[Tensor, "*rows prototypes"], center: Float[Tensor, " prototypes"], temperature: float
) -> Float[Tensor, "*rows prototypes"]:
    """Return softmax((t̄ − c)/τ_t) in float32 or better, without a gradient.

    Example:
        >>> teacher_probabilities(torch.tensor([3.0, -1.0]), torch.tensor([3.0, -1.0]), 0.04).tolist()
        [0.5, 0.5]
    """
    return ((at_least_float32(target.detach()) - center) / temperature).softmax(-1)


class DINO(Objective):
    """DINO over the global batch, with the centre as a buffer ``center [prototypes]``.

    When to use: vision transformers with multi-crop views, whose nearest neighbours it serves well, at small batches
    too. It costs a teacher and many prototypes. Centre, temperatures and momentum must fit together, or all images get
    one prototype or all prototypes alike: ``teacher_entropy`` then goes to 0 or to ln K.

    Args:
        prototypes: Number of the adapter's prototypes; `ProjectionTrainer` fills it in. 65536: the paper, for ImageNet.
        student_temperature: τ_s.
        teacher_temperature: τ_t after the warm-up. 0.07: the official recipes; their script's default is 0.04.
        warmup_teacher_temperature: τ_t in the first epoch; it rises epoch by epoch.
        warmup_epochs: Epochs until τ_t has risen. 0: no warm-up.
        center_momentum: m.
        freeze_prototypes_epochs: Epochs at the beginning in which the prototypes are not trained.

    Raises:
        UsageError: If an option is out of range; in a call, if there are fewer than two views, something is missing or
            of another shape, or the number of prototypes is another.

    Example:
        >>> objective, scores = DINO(prototypes=5), torch.ones(4, 8, 5)
        >>> terms = objective(torch.randn(4, 8, 3), scores=scores, target=scores[:2]).terms
        >>> terms["teacher_entropy"].exp().round().item(), objective.center[0].allclose(torch.tensor(0.1))
        (5.0, True)
    """

    needs = frozenset({"scores", "target"})
    target_of = "scores"
    ema_momentum = (0.996, 1.0)
    center: Tensor

    def __init__(
        self, *, prototypes: int = 65536, student_temperature: float = 0.1, teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04, warmup_epochs: int = 30, center_momentum: float = 0.9,
        freeze_prototypes_epochs: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        check_positive("student_temperature", student_temperature, usual="0.1")
        check_positive("teacher_temperature", teacher_temperature, usual="0.04 to 0.07")
        check_positive("warmup_teacher_temperature", warmup_teacher_temperature, usual="0.04")
        check_between(0, 1, center_momentum=center_momentum)
        check_at_least(2, prototypes=prototypes)
        check_at_least(0, warmup_epochs=warmup_epochs, freeze_prototypes_epochs=freeze_prototypes_epochs)
        self.prototypes = prototypes
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.warmup_teacher_temperature, self.warmup_epochs = warmup_teacher_temperature, warmup_epochs
        self.center_momentum, self.freeze_prototypes_epochs = center_momentum, freeze_prototypes_epochs
        self.register_buffer("center", torch.zeros(prototypes))

    def teacher_temperature_at(self, step: Step | None) -> float:
        """Return τ_t in the step's epoch; without a step that after the warm-up.

        Example:
            >>> DINO(prototypes=5).teacher_temperature_at(Step.at(0, 0, 0.9))
            0.04
        """
        epoch = math.inf if step is None else math.floor(step.epoch)
        if epoch >= self.warmup_epochs:
            return self.teacher_temperature
        progress = epoch / max(self.warmup_epochs - 1, 1)  # the last epoch of the warm-up has the full temperature
        return self.warmup_teacher_temperature + progress * (self.teacher_temperature - self.warmup_teacher_temperature)

    def frozen(self, step: Step) -> set[str]:
        """Return the parts of the adapter that get no gradient in this step."""
        return {"prototypes"} if step.epoch < self.freeze_prototypes_epochs else set()

    def compute(
        self, z: Views, *, scores: Tensor, target: Tensor, step: Step | None = None, **given: object
    ) -> ObjectiveOutput:
        """Return the loss, ``teacher_entropy`` in nats and ``kl``, the loss minus it; in training, move the centre.

        `scores` are s of all views of `z`, `target` is t̄ of the first two. Without `step`, τ_t is that after warm-up.
        """
        if scores.shape[-1] != self.prototypes:
            raise UsageError(
                f"The scores are of {scores.shape[-1]} prototypes and DINO was made for {self.prototypes}: pass "
                f"prototypes={scores.shape[-1]}."
            )
        self.check_shape("scores", scores, z, dim=self.prototypes)
        self.check_shape("target", target, z, views=2, dim=self.prototypes)
        p = teacher_probabilities(target[:2], self.center, self.teacher_temperature_at(step))
        loss = cross_view_entropy(p, log_probabilities(scores, self.student_temperature))
        entropy = torch.special.entr(p).sum(-1).mean(0)
        rows = distributed.gather_rows(torch.stack([loss, entropy], 1))
        loss, entropy = rows.mean(0)
        if self.training:
            with torch.no_grad():
                total = distributed.all_reduce_sum(target[:2].sum((0, 1), dtype=self.center.dtype))
                mean = total / (2 * len(rows))
                self.center.lerp_(torch.where(mean.isfinite().all(), mean, self.center), 1 - self.center_momentum)
        return ObjectiveOutput(loss, {"teacher_entropy": entropy.detach(), "kl": (loss - entropy).detach()})
