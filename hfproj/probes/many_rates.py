"""DINOv2's linear protocol: a classifier for each learning rate of a grid, all trained at once in one pass.

    W_r ← W_r − η_r(t) m_r,  m_r ← 0.9 m_r + ∇ℓ(W_r),  η_r(t) = rate_r · batch/256 · (1 + cos(πt/T))/2

The classifiers of all rates are one tensor `[rates, classes, dim]`: a step is two matrix products for all of them.

Features from `extract_features` are the same on all processes, and each process computes the same fit: no collectives.

References:
    Oquab et al. 2023, DINOv2, arXiv 2304.07193; facebookresearch/dinov2 ``dinov2/eval/linear.py``: 13 rates from 1e-5
    to 0.1, scaled by the batch over 256, SGD with momentum 0.9 and no weight decay, cosine to 0, 10 epochs of 1250
    steps, weights from N(0, 0.01²), biases 0.

Deviations:
    The best rate is chosen on held-out rows of the training set; DINOv2 chooses it on the evaluation set, which
    flatters the number. An epoch is one pass over the training rows, and features are those of one view: DINOv2 crops
    and flips images, and chooses the number of blocks and the pooling as it chooses the rate. All rates start from the
    same weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfproj.checking import check_types, explained
from hfproj.errors import UsageError
from hfproj.functional.rows import full_precision
from hfproj.probes.base import Classifier, Scaling, check_fraction, check_numbers, check_path, cosine, hold_out, scaled

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)

_MOMENTUM = 0.9


@explained
@dataclass(kw_only=True, repr=False, eq=False)
class ManyRatesProbe(Classifier):
    """Accuracy of a linear classifier trained by SGD, with the best rate of a learning-rate grid.

    Args:
        rates: Learning rates for a batch of 256.
        epochs: Passes over the training rows.
        batch_size: Rows per step; the last step of an epoch may have fewer.
        holdout: Fraction of each class held out, on which the rate is chosen (by accuracy, then by loss). A class of
            one row gives none; where no class has two, the training rows decide.
        standardize: Centre columns and divide them by their standard deviation. DINOv2 does not.
        seed: Seed of the held-out part, the initial weights and the order of rows.

    Attributes:
        classes_: `[classes]` labels, sorted.
        rate_: The rate chosen.
        held_out_: Accuracy on the held-out rows, by rate; 0 where training diverged.
        results_: After scoring: `{"value": accuracy, "protocol": {…}}`.
        correct_: After scoring: `[rows]` bool, for `paired_interval`.

    Raises:
        UsageError: If an option is not positive, if there are no rates, or if the fraction is outside (0, 1); on `fit`,
            if training diverged at every rate.

    Example:
        >>> y = torch.arange(200) % 2
        >>> f = torch.stack([2.0 * y - 1, torch.ones(200)], 1)
        >>> probe = ManyRatesProbe(rates=(1e-9, 0.1)).fit(f, y)
        >>> probe.score(f, y), probe.rate_
        (1.0, 0.1)
    """

    name = "many_rates"

    rates: Sequence[float] = RATES
    epochs: int = 10
    batch_size: int = 128
    holdout: float = 0.1
    standardize: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))
        check_numbers(epochs=self.epochs, batch_size=self.batch_size)
        check_fraction(holdout=self.holdout)
        self.rates = check_path("rates", self.rates)

    def _fit(self, f: Tensor, codes: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad(), full_precision(f):
            self._scaling = Scaling.of(f.detach()) if self.standardize else None
            generator = torch.Generator().manual_seed(self.seed)
            kept, held = hold_out(codes, self.holdout, generator)
            x = scaled(f, self._scaling)
            codes = codes.to(x.device)
            weight, bias = self._train(x, codes, kept.to(x.device), generator)
            chooses = (held if len(held) else kept).to(x.device)
            self._weight, self._bias = self._choose(x[chooses], codes[chooses], weight, bias)
            self._chosen = {"rate": self.rate_, "on_rows": len(held)}

    @torch.no_grad()
    def _codes(self, f: Tensor) -> Tensor:
        with full_precision(f):
            return torch.addmm(self._bias, scaled(f, self._scaling).to(self._weight), self._weight.T).argmax(1)

    def _protocol(self) -> dict[str, Any]:
        return {**self._settings(), "chosen": self._chosen}

    def _train(self, x: Tensor, codes: Tensor, kept: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rates, classes, dim = len(self.rates), len(self.classes_), x.shape[1]
        weight = 0.01 * torch.randn(classes, dim, dtype=torch.float64, generator=generator)
        weight = weight.repeat(rates, 1).to(x)
        bias = x.new_zeros(rates * classes)
        velocity, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        rate = torch.tensor(self.rates, dtype=torch.float64).mul(self.batch_size / 256).repeat_interleave(classes).to(x)
        steps = self.epochs * math.ceil(len(kept) / self.batch_size)
        done = 0
        for _ in range(self.epochs):
            order = kept[torch.randperm(len(kept), generator=generator).to(kept.device)]
            for rows in order.split(self.batch_size):
                batch, truth = x[rows], codes[rows]
                p = torch.addmm(bias, batch, weight.T).view(len(rows), rates, classes).softmax(2)
                p.scatter_add_(2, truth[:, None, None].expand(-1, rates, 1), p.new_full((len(rows), rates, 1), -1.0))
                p = p.view(len(rows), -1).div_(len(rows))
                velocity.mul_(_MOMENTUM).addmm_(p.T, batch)
                of_bias.mul_(_MOMENTUM).add_(p.sum(0))
                now = rate * cosine(done, steps)
                weight.addcmul_(now[:, None], velocity, value=-1)
                bias.addcmul_(now, of_bias, value=-1)
                done += 1
        return weight.view(rates, classes, dim), bias.view(rates, classes)

    def _choose(self, x: Tensor, codes: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classifier of the best rate."""
        self.held_out_, best = {}, None
        for rate, w, b in zip(self.rates, weight, bias):
            logits = torch.addmm(b, x, w.T).double()
            if not torch.isfinite(logits).all():
                self.held_out_[rate] = 0.0
                continue
            accuracy = (logits.argmax(1) == codes).double().mean().item()
            rating = accuracy, -torch.nn.functional.cross_entropy(logits, codes).item()
            self.held_out_[rate] = accuracy
            if best is None or rating > best[0]:
                best = rating, rate, w, b
        if best is None:
            hint = "give lower rates, or standardize=True for features of a large scale"
            raise UsageError(f"Training diverged at every rate (the lowest is {min(self.rates):g}): {hint}.")
        self.rate_ = best[1]
        return best[2].clone(), best[3].clone()
