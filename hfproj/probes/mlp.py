"""MLP probe: what one hidden layer can read from features that a linear probe can't.

    x = (f − mean)/std,   logits = W₂ relu(W₁ x + b₁) + b₂,   cross entropy by AdamW

Features from `extract_features` are the same on all processes, and each process computes the same fit: no collectives.

References:
    Chaudhry 2026, arXiv 2605.17180 (`MLPProbe.rotation`): d-256-4 on h, 2048-512-4 on z, Adam at 1e-3, 5 epochs.

Deviations:
    Of the rotation probe we know widths, optimizer, rate and epochs; ReLU, batches of 256, a constant rate and
    standardised features are our reconstruction.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfproj.checking import check_types, explained
from hfproj.errors import unknown
from hfproj.probes.base import Classifier, Scaling, check_decay, check_numbers, cosine, descend, scaled
from hfproj.typing import OneOf

SCHEDULES = ("cosine", "constant")
_ROTATION_WIDTHS = {"h": 256, "z": 512}


@explained
@dataclass(kw_only=True, repr=False, eq=False)
class MLPProbe(Classifier):
    """Accuracy of a classifier with one hidden layer, as an estimator of scikit-learn.

    Args:
        hidden: Units of the hidden layer.
        epochs: Passes over the training rows.
        batch_size: Rows per step; the last step of an epoch may have fewer.
        learning_rate: Learning rate of AdamW.
        weight_decay: On the two matrices; 0 makes it Adam.
        schedule: "cosine" to 0, or "constant".
        standardize: Centre columns and divide them by their standard deviation; constant columns are ignored.
        seed: Seed of the initial weights (those of `nn.Linear`) and of the order of rows.

    Attributes:
        classes_: `[classes]` labels, sorted.
        results_: After scoring: `{"value": accuracy, "protocol": {…}}`.
        correct_: After scoring: `[rows]` bool, for `paired_interval`.

    Raises:
        UsageError: If a number is below 1, a rate is not positive, the weight decay is negative or the schedule is
            unknown.

    Example (the product of two signs, which no linear classifier can read):
        >>> f = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).repeat(64, 1)
        >>> y = (f.prod(1) > 0).long()
        >>> MLPProbe(hidden=32, batch_size=32).fit(f, y).score(f, y)
        1.0
    """

    name = "mlp"

    hidden: int = 512
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: OneOf["cosine", "constant"] = "cosine"
    standardize: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))
        check_numbers(hidden=self.hidden, epochs=self.epochs, batch_size=self.batch_size)
        check_numbers(learning_rate=float(self.learning_rate))
        check_decay(self.weight_decay)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)

    @classmethod
    def rotation(cls, layer: str = "h", *, seed: int = 0) -> "MLPProbe":
        """Return the rotation probe of Chaudhry 2026 for "h" (256 hidden units) or "z" (512).

        Raises:
            UsageError: If it is another layer.

        Example:
            >>> MLPProbe.rotation("z").hidden
            512
        """
        if layer not in _ROTATION_WIDTHS:
            raise unknown("layer", layer, _ROTATION_WIDTHS)
        width = _ROTATION_WIDTHS[layer]
        return cls(hidden=width, epochs=5, learning_rate=1e-3, weight_decay=0.0, schedule="constant", seed=seed)

    def _fit(self, f: Tensor, codes: Tensor) -> None:
        # The caller's inference mode would let the backward pass fail, its autocast would lower the precision.
        with torch.inference_mode(False), torch.autocast(f.device.type, enabled=False), torch.enable_grad():
            self._scaling = Scaling.of(f.detach()) if self.standardize else None
            self._weights = self._train(scaled(f, self._scaling), codes)

    @torch.no_grad()
    def _codes(self, f: Tensor) -> Tensor:
        with torch.autocast(f.device.type, enabled=False):
            x = scaled(f, self._scaling).to(self._weights[0])
            return torch.cat([_logits(self._weights, part).argmax(1) for part in x.split(2**14)])

    def _train(self, x: Tensor, codes: Tensor) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        codes = codes.to(x.device)
        weights = []
        for rows, columns in ((self.hidden, x.shape[1]), (len(self.classes_), self.hidden)):
            for shape in ((rows, columns), (rows,)):
                drawn = torch.rand(shape, dtype=torch.float64, generator=generator) * 2 - 1
                weights.append((drawn / math.sqrt(columns)).to(x).requires_grad_())
        groups: list[dict[str, Any]] = [
            {"params": weights[::2], "lr": self.learning_rate, "weight_decay": self.weight_decay},
            {"params": weights[1::2], "lr": self.learning_rate, "weight_decay": 0.0},
        ]
        steps = self.epochs * math.ceil(len(x) / self.batch_size)
        orders = (torch.randperm(len(x), generator=generator).to(x.device) for _ in range(self.epochs))
        batches = (rows for order in orders for rows in order.split(self.batch_size))

        def loss_of(rows: Tensor) -> Tensor:
            return F.cross_entropy(_logits(weights, x[rows]), codes[rows])

        constant = self.schedule == "constant"
        descend(groups, batches, loss_of, lambda step: 1.0 if constant else cosine(step, steps), what="the MLP probe")
        return [weight.detach() for weight in weights]


def _logits(weights: list[Tensor], x: Tensor) -> Tensor:
    first, of_first, second, of_second = weights
    return F.linear(F.linear(x, first, of_first).relu(), second, of_second)
