"""SimCSE: a sentence finds its second reading among those of other sentences, and, supervised, among hard negatives.

The two views are two passes of the same sentence under dropout (so dropout must be on), or a pair such as premise and
entailment; a third view z_n, if asked for, is a hard negative such as the contradiction. With unit rows ẑ,

    L = mean_i [ −⟨ẑ_a,i, ẑ_b,i⟩/τ + log Σ_j ( exp(⟨ẑ_a,i, ẑ_b,j⟩/τ) + exp(⟨ẑ_a,i, ẑ_n,j⟩/τ + w·[i = j]) ) ],

in one direction: the rows of view a are the anchors.

References:
    Gao et al. 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", arXiv 2104.08821, eq. 4, 5 and
    appendix on hard-negative weights; princeton-nlp/SimCSE (206d7ae) ``simcse/models.py``.

Deviations:
    Over processes the gradient is that of the global batch; the official code keeps that of the local shard, which is
    1/processes of it after the mean over processes. No masked-language term.
"""

import math

import torch

from hfproj.errors import UsageError
from hfproj.functional.rows import cosine_logits, positive_cosine
from hfproj.objectives.base import Objective, ObjectiveOutput, check_temperature
from hfproj.typing import Scalar, Views


def simcse_loss(z: Views, *, temperature: float = 0.05, hard_negative_weight: float = 0.0) -> Scalar:
    """Return SimCSE's loss at τ of two views, or of three, the hard negatives, whose own logit gets the weight w.

    Example:
        >>> round(simcse_loss(torch.ones(3, 4, 8)).exp().item(), 3)  # 4 positives, 4 hard negatives
        8.0
    """
    logits = cosine_logits(z[0], z[1:].flatten(0, 1), temperature=temperature)
    if len(z) == 3:
        own = torch.eye(len(logits), dtype=logits.dtype, device=z.device)
        logits = logits + hard_negative_weight * torch.cat([torch.zeros_like(own), own], 1)
    return (logits.logsumexp(1) - logits.diagonal()).mean()


class SimCSE(Objective):
    """SimCSE over the global batch.

    When to use: sentences, where dropout is the only augmentation needed; batches of 64 do, an epoch suffices. Without
    dropout (evaluation mode, or a model that has none) both views are equal and nothing is learned.

    Args:
        temperature: τ. 0.05: the paper.
        hard_negatives: Whether the last of three views is a hard negative of each sentence; else there are two views.
        hard_negative_weight: w, the log of how many times an anchor's own hard negative counts. 0: the official
            script's default, no preference.

    Raises:
        UsageError: If an option is out of range or the weight has no hard negatives; in a call, with another number of
            views or one sentence over all processes.

    Example:
        >>> round(SimCSE(temperature=1.0)(torch.eye(4).expand(2, 4, 4)).loss.item(), 4)  # ln(e + 3) - 1
        0.7437
    """

    def __init__(self, *, temperature: float = 0.05, hard_negatives: bool = False, hard_negative_weight: float = 0.0):
        super().__init__()
        self.temperature, self.hard_negatives = check_temperature(temperature), hard_negatives
        if not math.isfinite(hard_negative_weight):
            raise UsageError(f"Expected hard_negative_weight to be a finite number, got {hard_negative_weight}.")
        if hard_negative_weight and not hard_negatives:
            hint = "set hard_negatives=True and give each sentence its hard negative as a third view"
            raise UsageError(f"hard_negative_weight={hard_negative_weight} has nothing to weigh: {hint}.")
        self.hard_negative_weight = hard_negative_weight
        self.views = (3, 3) if hard_negatives else (2, 2)

    def compute(self, z: Views, **given: object) -> ObjectiveOutput:
        """Return the loss, ``positive_cosine`` of the first two views and, with a third, ``hard_negative_cosine``."""
        z = self.global_batch(z)
        loss = simcse_loss(z, temperature=self.temperature, hard_negative_weight=self.hard_negative_weight)
        terms = {"positive_cosine": positive_cosine(z[:2])}
        if self.hard_negatives:
            terms["hard_negative_cosine"] = positive_cosine(z[::2])
        return ObjectiveOutput(loss, terms)
