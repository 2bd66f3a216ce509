"""`OnlineProbeCallback`: linear classifiers and k-NN on h and z, with the labels of the batches, while training runs.

    W, b ← SGD with momentum on cross-entropy(W sg(f̂) + b, y),    f̂ = scale · f / ‖f‖,    f = h, f = z, of every view

The classifiers see each training batch once and pass no gradient on: model and objective train as they would without
them. Accuracies are of the batch before it is learned from, and of held-out images.

References:
    Classifiers that train beside the backbone are solo-learn's (learning rate 0.1) and SimCLR's; their momentum is 0.9.
    The k-NN is DINO's (`hfproj.KNNProbe`), whose bank here is the last training rows, as they were computed.

Deviations:
    Rows get a length of their own: the rows of transformers are often too long for a learning rate of 0.1. No curvature
    of the loss exceeds (scale² + 1)/2, so that SGD is stable below scale² + 1 = 4 (1 + momentum)/learning_rate, 76 at
    the defaults. The classifiers start at zero, and draw no random numbers.
"""

import math
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Subset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hfproj import distributed
from hfproj.checking import checked
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.functional.labels import UNLABELLED, check_classes
from hfproj.probes import KNNProbe
from hfproj.training import evaluation
from hfproj.training.callbacks.watching import ImageWatch, check_bound
from hfproj.training.setup import Args, Control, State
from hfproj.typing import Data

STATE_FILE = "online_probe.safetensors"
LAYERS = ("h", "z")
_STATE = ("weight", "velocity")  # of a classifier, as a checkpoint names them
_MOST_CLASSES = 2**20  # a larger label is no class number


class OnlineClassifier:
    """A linear classifier that takes one step of SGD with momentum for every batch; the same on all processes.

    The gradient is that of the mean cross-entropy over the rows of all processes. A class gets weights of zero when its
    first label is seen.
    """

    def __init__(self, *, learning_rate: float = 0.1, momentum: float = 0.9):
        self.learning_rate, self.momentum = learning_rate, momentum
        self.weight: Tensor | None = None  # [classes, dim + 1], the bias last
        self.velocity: Tensor | None = None

    @torch.no_grad()
    def learn(self, f: Float[Tensor, "rows dim"], y: Int[Tensor, " rows"]) -> tuple[float, float]:
        """Take a step on the rows whose label is not −1; return how many of all processes were right before it."""
        f, y = f[y != UNLABELLED], y[y != UNLABELLED]
        ends = torch.stack([y.max(), -y.min()]) if len(y) else torch.tensor([-1, 0], device=y.device)
        largest, negative = distributed.all_reduce_max(ends).tolist()
        if largest < 0 and negative <= 0:
            return 0.0, 0.0
        if negative > 0 or largest >= _MOST_CLASSES:
            found = f"labels from {-negative} to {largest}. Encode them: dataset.class_encode_column(…)"
            raise UsageError(f"OnlineProbeCallback needs class numbers from 0, got {found}.")
        weight, velocity = self._grown(largest + 1, f)
        rows = torch.cat([f, f.new_ones(len(f), 1)], 1)
        logits = rows @ weight.mT
        right = (logits.argmax(1) == y).sum()
        slope = logits.softmax(1)
        slope[torch.arange(len(y), device=y.device), y] -= 1
        own = [(slope.mT @ rows).flatten(), right.to(f.dtype)[None], f.new_full((1,), float(len(f)))]
        summed = distributed.all_reduce_sum(torch.cat(own))
        velocity.mul_(self.momentum).add_(summed[:-2].view_as(weight) / summed[-1])
        weight.sub_(velocity, alpha=self.learning_rate)
        return summed[-2].item(), summed[-1].item()

    @torch.no_grad()
    def accuracy(self, f: Float[Tensor, "rows dim"], y: Int[Tensor, " rows"]) -> float:
        """Return the fraction of the rows with a label that are right; NaN if there are none."""
        assert self.weight is not None
        f, y = f[(y != UNLABELLED).to(f.device)], y[y != UNLABELLED]
        logits = f.to(self.weight) @ self.weight[:, :-1].mT + self.weight[:, -1]
        return (logits.argmax(1).cpu() == y.cpu()).double().mean().item()

    def _grown(self, classes: int, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and velocity with a row for each class that was seen."""
        kept = [f.new_zeros(0, f.shape[1] + 1) if t is None else t.to(f) for t in (self.weight, self.velocity)]
        more = f.new_zeros(max(classes - len(kept[0]), 0), f.shape[1] + 1)
        self.weight, self.velocity = (torch.cat([tensor, more]) for tensor in kept)
        return self.weight, self.velocity


class OnlineProbeCallback(ImageWatch):
    """Records what labels say of h and z while training: ``online_linear_h``, ``online_knn_h``, …, and those of z.

    ``online_train_h`` is the accuracy of the linear classifier on the training rows since the last measurement, each
    before it was learned from; ``online_linear_h`` that on held-out images, without augmentation, and ``online_knn_h``
    the k-NN accuracy on these with the last `bank` training rows as its bank. They are in `trainer.history`, and in the
    log as ``probe_online_linear_h``. Held-out accuracies need held-out images with labels. Several processes give the
    numbers of one process with the global batch.

    Labels come from the batches: the collator has to give "labels". The classifiers and the bank are written beside
    each checkpoint and found again when training resumes in the same `output_dir`; elsewhere they start anew, with a
    warning.

    Args:
        learning_rate: Of the classifiers' SGD.
        momentum: Of the same.
        scale: Length that rows of h and z are given; None leaves them unchanged.
        k: Neighbours that vote; 0 leaves the k-NN out.
        temperature: Of the k-NN.
        bank: Training rows that the k-NN searches, of the first view of each image.
        every: Steps between two measurements; None: so many that these take less than 1 % of the time.
        images: Number of held-out images, evenly spaced.
        dataset: Their source; None: the trainer's `eval_dataset` (the first, of several), if it has one.

    Raises:
        UsageError: As `Watch`; if an option is out of its range; on training, if batches have no labels, or the
            held-out set is a stream or has no labels.

    Example:
        >>> OnlineProbeCallback(learning_rate=-1.0)
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected learning_rate > 0, 0 ≤ momentum < 1 and scale > 0, got -1.0, 0.9 and 4.0.
    """

    @checked
    def __init__(
        self, *, learning_rate: float = 0.1, momentum: float = 0.9, scale: float | None = 4.0, k: int = 20,
        temperature: float = 0.07, bank: int = 4096, every: int | None = None, images: int = 512,
        dataset: Data | None = None,
    ):  # fmt: skip
        super().__init__(every=every, images=images, dataset=dataset)
        if not learning_rate > 0 or not 0 <= momentum < 1 or (scale is not None and not scale > 0):
            wanted = "learning_rate > 0, 0 ≤ momentum < 1 and scale > 0"
            raise UsageError(f"Expected {wanted}, got {learning_rate}, {momentum} and {scale}.")
        if k < 0 or bank < 1 or images < 1 or not temperature > 0:
            wanted = "k ≥ 0, bank ≥ 1, images ≥ 1 and temperature > 0"
            raise UsageError(f"Expected {wanted}, got {k}, {bank}, {images} and {temperature}.")
        self.learning_rate, self.momentum, self.scale = learning_rate, momentum, scale
        self.k, self.temperature, self.bank = k, temperature, bank

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Start with classifiers of zero, or where a training that is resumed has left them."""
        check_bound(self)
        self._measured_at = state.global_step
        options = {"learning_rate": self.learning_rate, "momentum": self.momentum}
        self.classifiers = {layer: OnlineClassifier(**options) for layer in LAYERS}
        self._right, self._seen = dict.fromkeys(LAYERS, 0.0), 0.0
        self._bank: dict[str, Tensor] = {}  # rows of all processes, as far as they were gathered
        batches = math.ceil(self.bank / (args.train_batch_size * args.world_size))
        self._recent: deque[dict[str, Tensor]] = deque(maxlen=batches)  # of this process
        dataset: Any = self.find_dataset()
        count = 0 if dataset is None else min(self.images, len(dataset))  # spread: the set may be sorted by class
        self._held_out = Subset(dataset, [row * len(dataset) // count for row in range(count)]) if count else None
        if state.global_step:
            self._load(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_substep_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Learn from a batch that was no whole step yet."""
        self._learn()

    def check_batch(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a batch without labels; the trainer calls it before the batch is learned from."""
        if inputs.get("labels") is None:
            hint = "give the collator the name of their column (label_column=…), or leave the callback out"
            raise UsageError(f"OnlineProbeCallback learns from labels, but the batches have none: {hint}.")

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Learn from the batch, and measure when it is due."""
        self._learn()
        super().on_step_end(args, state, control, **kwargs)

    @torch.no_grad()
    def _learn(self) -> None:
        batch = self.trainer.last_batch
        labels = batch["labels"]
        for layer in LAYERS:
            rows = torch.cat([self._rows(view) for view in batch[layer]])
            right, count = self.classifiers[layer].learn(rows, labels.repeat(len(batch[layer])))
            self._right[layer] += right
        self._seen += count
        if self.k and self._held_out is not None:
            kept = {layer: batch[layer][0].detach().float().clone() for layer in LAYERS}
            self._recent.append({**kept, "labels": labels.clone()})

    def _rows(self, f: Tensor) -> Tensor:
        """Return rows as the classifiers see them, in float32 or better."""
        f = f.detach().to(torch.promote_types(f.dtype, torch.float32))
        return f if self.scale is None else torch.nn.functional.normalize(f, dim=-1) * self.scale

    def measure(self) -> dict[str, float]:
        """Return the accuracies since the last measurement, and those on held-out images."""
        values = {f"online_train_{layer}": right / self._seen for layer, right in self._right.items() if self._seen}
        self._right, self._seen = dict.fromkeys(LAYERS, 0.0), 0.0
        if self._held_out is None or self.classifiers["h"].weight is None:
            return values
        with self.trainer.accelerator.autocast():
            found = evaluation.features(self.trainer, self._held_out)
        if found.labels is None:
            hint = "name their column in eval_collator (label_column=…), or pass a labelled dataset="
            raise UsageError(f"The held-out images of OnlineProbeCallback have no labels: {hint}.")
        self._gather()
        if distributed.rank() == 0:
            for layer in LAYERS:
                f = getattr(found, layer)
                values[f"online_linear_{layer}"] = self.classifiers[layer].accuracy(self._rows(f), found.labels)
                if self._bank:
                    finite = bool(torch.isfinite(f).all() and torch.isfinite(self._bank[layer]).all())
                    values[f"online_knn_{layer}"] = self._knn(layer, f, found.labels) if finite else math.nan
        return distributed.broadcast_object(values)  # the same on all processes, to the last bit

    def _knn(self, layer: str, f: Tensor, y: Tensor) -> float:
        bank, probe = self._bank[layer], KNNProbe(k=self.k, temperature=self.temperature)
        try:
            check_classes(self._bank["labels"], "bank")
            return probe.fit(bank, self._bank["labels"]).score(f.to(bank.device), y)
        except NotMeasurableError:  # no label, or those of one class
            return math.nan

    def _gather(self) -> None:
        """Add what the processes have kept since the last time to the bank, in the order of one process."""
        for batch in self._recent:
            for name, rows in batch.items():
                there = [self._bank[name]] if name in self._bank else []
                self._bank[name] = torch.cat([*there, distributed.gather_rows(rows)])[-self.bank :]
        self._recent.clear()

    def on_save(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Write classifiers and bank beside the checkpoint that was written."""
        self._gather()  # on all processes
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not args.should_save or not folder.is_dir() or self.classifiers["h"].weight is None:
            return
        tensors = {f"bank.{name}": rows for name, rows in self._bank.items()}
        tensors |= {f"{n}.{what}": getattr(c, what) for n, c in self.classifiers.items() for what in _STATE}
        tensors["counts"] = torch.tensor([self._seen, *self._right.values()], dtype=torch.float64)
        part = folder / f".{STATE_FILE}.part"
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, part, metadata={"format": "pt"})
        part.replace(folder / STATE_FILE)

    def _load(self, folder: Path) -> None:
        try:
            tensors = {n: t.to(self.trainer.args.device) for n, t in load_file(folder / STATE_FILE).items()}
            for layer, classifier in self.classifiers.items():
                classifier.weight, classifier.velocity = (tensors[f"{layer}.{what}"] for what in _STATE)
            self._seen, *right = tensors["counts"].tolist()
        except (OSError, KeyError, SafetensorError) as error:
            cause = f"{folder} holds no {STATE_FILE} ({type(error).__name__})"
            warnings.warn(f"The online probe starts anew: {cause}; resume in the same output_dir.", stacklevel=2)
            return
        self._right = dict(zip(LAYERS, right))
        self._bank = {name.removeprefix("bank."): t for name, t in tensors.items() if name.startswith("bank.")}
