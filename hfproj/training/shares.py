"""How large the gradient of each regularizer is beside the objective's, at logging steps, without a pass through the
backbone.

    share = |w| · ‖∂R/∂v‖ / ‖∂L/∂v‖,    R the term, w its weight, L the objective, of the global batch

| term | v |
|---|---|
| on z | the head's output z |
| on h, or on h and z | the head's input h: what the objective, and the term itself, pass through the head counts |
| on weights | the trained parameters that it reaches; L is then all but the terms on weights, of the whole step |

A term without a gradient has the share 0, unless it acts in its ``after_step``. Under accumulation the last micro-batch
is measured.

Not measured under FSDP and DeepSpeed, which do work of their own in each backward pass, and under ``torch_compile``.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy

from hfproj import distributed
from hfproj.diagnostics.global_batch import Rows
from hfproj.functional.feature_rows import double
from hfproj.training.setup import ProjectionTrainer
from hfproj.tuner.active import active_modules

LEAST = 1e-4  # a smaller share is next to nothing …
STEPS = 5  # … where so many logging steps in a row find it
Terms = Mapping[str, Tensor]


class GradientShares:
    """Measures the shares of one trainer's regularizers and keeps them in `values` until they are logged."""

    def __init__(self, trainer: ProjectionTrainer):
        self.trainer = trainer
        self.values: dict[str, float] = {}
        self._low: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._read: list[tuple[Tensor, Tensor]] = []  # input and output of the head, of each forward pass
        self._on_weights: dict[str, dict[nn.Parameter, Tensor]] = {}

    def due(self) -> bool:
        """Whether the micro-batch that comes now is the last one of a step that will be logged."""
        trainer, args, state = self.trainer, self.trainer.args, self.trainer.state
        split = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or args.torch_compile
        accelerator = trainer.accelerator
        if not trainer.regularizers or split or not accelerator.sync_gradients or not trainer.is_in_train:
            return False
        if args.logging_strategy == IntervalStrategy.EPOCH:
            return accelerator.gradient_state.end_of_dataloader
        step = state.global_step + 1
        every, first = max(int(state.logging_steps or 1), 1), args.logging_first_step and step == 1
        return args.logging_strategy == IntervalStrategy.STEPS and (step % every == 0 or first)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep what goes into the active head and what comes out of it, in forward passes inside."""

        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._read.append((args[0], output))

        self._read.clear()
        handle = active_modules(self.trainer.bare_model()).head.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def take(self, h: Rows, objective: Tensor, terms: Terms) -> None:
        """Measure the `terms`, before their weights, against the objective; those on weights wait for `finish`."""
        scale = self._scale()
        inputs, outputs = ([pair[i] for pair in self._read if pair[i].requires_grad] for i in (0, 1))
        self._read.clear()
        rows = [r for r in ([h] if isinstance(h, Tensor) else h) if r.requires_grad]
        parameters = [p for p in self.trainer.bare_model().parameters() if p.requires_grad]
        self._on_weights.clear()
        squares: dict[str, Tensor] = {}
        for name, term in terms.items():
            if not term.requires_grad:
                if not hasattr(self.trainer.regularizers[name].module, "after_step"):
                    squares[name] = squares[f"{name}: objective"] = objective.detach().new_zeros(())
                continue
            direct, at, found = _gradients(term, rows, scale), inputs, None
            if direct is not None:
                through = _gradients(term, inputs, scale)
                found = direct if through is None else _flat(direct) + _flat(through)
            else:
                at, found = outputs, _gradients(term, outputs, scale)
            if found is not None:
                squares[name] = _square(found)
                squares[f"{name}: objective"] = _square(_gradients(objective, at, scale))
                continue
            own = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True) if parameters else ()
            self._on_weights[name] = {p: g for p, g in zip(parameters, own) if g is not None}
        self._add(squares)

    def finish(self) -> None:
        """Measure the terms on weights, after the backward pass: what it left is the gradient of all together."""
        if not self._on_weights:
            return
        weights, scale = self._weights(), self._scale()
        squares: dict[str, Tensor] = {}
        for name, own in self._on_weights.items():
            rest = [
                p.grad / scale - sum(weights[n] * g[p] for n, g in self._on_weights.items() if p in g)
                for p in own if p.grad is not None
            ]  # fmt: skip
            squares[name], squares[f"{name}: objective"] = _square(list(own.values())), _square(rest)
        self._on_weights.clear()
        self._add({n: s.to(self.trainer.args.device) for n, s in squares.items()})

    def _add(self, squares: Terms) -> None:
        """Turn squared norms of this process's part into shares, and warn of what stays small."""
        if not squares:
            return
        weights = self._weights()
        summed = distributed.all_reduce_sum(torch.stack([double(s) for s in squares.values()]))
        norms = dict(zip(squares, summed.sqrt().tolist()))
        for name in [n for n in squares if n in weights]:
            above, below = abs(weights[name]) * norms[name], norms[f"{name}: objective"]
            share = above / below if below else math.nan if above else 0.0
            if math.isfinite(share):
                self.values[f"{name}_grad_share"] = share
                self._judge(name, share, weights[name])

    def _judge(self, name: str, share: float, weight: float) -> None:
        regularizer, at_most = self.trainer.regularizers[name], share
        if (largest := regularizer.largest()) > abs(weight):  # of a weight that moves the largest is judged
            at_most = share * largest / abs(weight) if weight else math.inf
        self._low[name] = self._low[name] + 1 if at_most < LEAST else 0
        if self._low[name] < STEPS or name in self._warned:
            return
        self._warned.add(name)
        if share > 0:
            larger = 0.01 * weight / share
            cure = f"Raise its weight, {weight:g} now ({larger:.1g} makes it a hundredth of the objective's)"
        else:
            cure = "It is at its minimum, its weight is 0, or it reaches nothing that is trained: see what it acts on"
        if distributed.rank() == 0:
            warnings.warn(
                f"The regularizer {name!r} does next to nothing: at {STEPS} logging steps in a row its gradient, "
                f"weight included, was below {LEAST:g} of the objective's ({name}_grad_share, {share:.1e} now). "
                f"{cure}, or leave it out.",
                stacklevel=2,
            )

    def _weights(self) -> dict[str, float]:
        progress = self.trainer.progress()
        return {name: regularizer.at(progress) for name, regularizer in self.trainer.regularizers.items()}

    def _scale(self) -> float:
        """Return what fp16 training multiplies the loss with: small gradients of the half precision would be lost."""
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0


def _gradients(loss: Tensor, at: Sequence[Tensor], scale: float) -> list[Tensor] | None:
    """Return the gradients of `loss` at each tensor in order, zeros for some; None if it depends on none of them."""
    if not at or not loss.requires_grad:
        return None
    found = torch.autograd.grad(loss, at, torch.full_like(loss, scale), retain_graph=True, allow_unused=True)
    if all(g is None for g in found):
        return None
    zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(found, at)]
    return [g.to(torch.promote_types(g.dtype, torch.float32)) / scale for g in zeros]


def _flat(rows: Sequence[Tensor]) -> Any:
    return torch.cat([r.reshape(-1, r.shape[-1]) for r in rows])


def _square(gradients: Any) -> Tensor:
    parts = gradients if isinstance(gradients, list) else [] if gradients is None else [gradients]
    return torch.stack([double(g).square().sum() for g in parts]).sum() if parts else torch.zeros(())
