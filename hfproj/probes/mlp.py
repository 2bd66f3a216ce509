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

import torch
from torch import Tensor
from torch.nn import functional as F

from hfproj.errors import NonFiniteLossError, UsageError, unknown
from hfproj.probes.base import Classifier, Scaling, check_numbers, scaled

SCHEDULES = ("cosine", "constant")
_ROTATION_WIDTHS = {"h": 256, "z": 512}


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

    def __init__(
        self,
        *,
        hidden: int = 512,
        epochs: int = 20,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: str = "cosine",
        standardize: bool = True,
        seed: int = 0,
    ):
        check_numbers(hidden=hidden, epochs=epochs, batch_size=batch_size, learning_rate=float(learning_rate))
        if not 0 <= weight_decay < math.inf:
            raise UsageError(f"Expected a finite weight_decay ≥ 0, got {weight_decay}.")
        if schedule not in SCHEDULES:
            raise unknown("schedule", schedule, SCHEDULES)
        self.hidden, self.epochs, self.batch_size = hidden, epochs, batch_size
        self.learning_rate, self.weight_decay, self.schedule = learning_rate, weight_decay, schedule
        self.standardize, self.seed = standardize, seed

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
        decayed = {"params": weights[::2], "weight_decay": self.weight_decay}
        optimizer = torch.optim.AdamW([decayed, {"params": weights[1::2], "weight_decay": 0.0}], lr=self.learning_rate)
        steps, done = self.epochs * math.ceil(len(x) / self.batch_size), 0
        for _ in range(self.epochs):
            for batch in torch.randperm(len(x), generator=generator).to(x.device).split(self.batch_size):
                loss = F.cross_entropy(_logits(weights, x[batch]), codes[batch])
                if not torch.isfinite(loss):
                    raise NonFiniteLossError(
                        f"The loss of the MLP probe became {loss.item()} at step {done + 1} of {steps}; lower "
                        f"learning_rate, {self.learning_rate:g} now."
                    )
                optimizer.zero_grad()
                loss.backward()
                if self.schedule == "cosine":
                    for group in optimizer.param_groups:
                        group["lr"] = self.learning_rate * (1 + math.cos(math.pi * done / steps)) / 2
                optimizer.step()
                done += 1
        return [weight.detach() for weight in weights]


def _logits(weights: list[Tensor], x: Tensor) -> Tensor:
    first, of_first, second, of_second = weights
    return F.linear(F.linear(x, first, of_first).relu(), second, of_second)
