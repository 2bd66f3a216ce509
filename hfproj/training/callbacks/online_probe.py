"""`OnlineProbeCallback`: linear classifiers and k-NN on h and z, with the labels of the batches, while training runs.

    W, b ← SGD with momentum on cross-entropy(W sg(f̂) + b, y),    f̂ = scale · f / ‖f‖,    f = h, f = z, of every view

The classifiers see each training batch once, as it comes, and pass no gradient on: model and objective train as they
would without them. Accuracies are of the batch before it is learned from, and of held-out images.

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
from hfproj.errors import UsageError
from hfproj.features import extract_features
from hfproj.probes import KNNProbe
from hfproj.training.callbacks.base import Watch
from hfproj.training.checks import is_stream

STATE_FILE = "online_probe.safetensors"
LAYERS = ("h", "z")
_MOST_CLASSES = 2**20  # a label above is no class number


class OnlineClassifier:
    """A linear classifier that takes one step of SGD with momentum for every batch; the same on all processes.

    The gradient is that of the mean cross-entropy over the rows of all processes. Classes join when their first label
    comes, with weights of zero.

    Args:
        learning_rate: Of SGD.
        momentum: Of SGD.

    Example:
        >>> classifier = OnlineClassifier(learning_rate=1.0)
        >>> f, y = torch.eye(2), torch.tensor([0, 1])
        >>> classifier.learn(f, y), classifier.learn(f, y)
        ((1.0, 2.0), (2.0, 2.0))
    """

    def __init__(self, *, learning_rate: float = 0.1, momentum: float = 0.9):
        self.learning_rate, self.momentum = learning_rate, momentum
        self.weight: Tensor | None = None  # [classes, dim + 1], the bias last
        self.velocity: Tensor | None = None

    @torch.no_grad()
    def learn(self, f: Float[Tensor, "rows dim"], y: Int[Tensor, " rows"]) -> tuple[float, float]:
        """Take a step; return how many rows of all processes were right before it, and how many there were.

        Raises:
            UsageError: a label is negative or no class number, on any process.
        """
        largest, negative = distributed.all_reduce_max(torch.stack([y.max(), -y.min()])).tolist()
        if negative > 0 or largest >= _MOST_CLASSES:
            raise UsageError(
                f"OnlineProbeCallback needs class numbers from 0; labels from {-negative} to {largest} came. Encode "
                "them: dataset.class_encode_column(…)."
            )
        weight, velocity = self._grown(largest + 1, f)
        rows = torch.cat([f, f.new_ones(len(f), 1)], 1)
        logits = rows @ weight.mT
        right = (logits.argmax(1) == y).sum()
        slope = logits.softmax(1)
        slope[torch.arange(len(y), device=y.device), y] -= 1
        own = [(slope.mT @ rows).flatten(), right.to(f.dtype)[None], f.new_full((1,), float(len(f)))]
        joint = distributed.all_reduce_sum(torch.cat(own))
        velocity.mul_(self.momentum).add_(joint[:-2].view_as(weight) / joint[-1])
        weight.sub_(velocity, alpha=self.learning_rate)
        return joint[-2].item(), joint[-1].item()

    @torch.no_grad()
    def accuracy(self, f: Float[Tensor, "rows dim"], y: Int[Tensor, " rows"]) -> float:
        """Return the share of rows that are right."""
        assert self.weight is not None
        logits = f.to(self.weight) @ self.weight[:, :-1].mT + self.weight[:, -1]
        return (logits.argmax(1).cpu() == y.cpu()).double().mean().item()

    def _grown(self, classes: int, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and velocity with a row for each class that was seen."""
        there = 0 if self.weight is None else len(self.weight)
        if classes > there:
            more = f.new_zeros(classes - there, f.shape[1] + 1)
            self.weight = more if self.weight is None else torch.cat([self.weight.to(f), more])
            self.velocity = more.clone() if self.velocity is None else torch.cat([self.velocity.to(f), more])
        assert self.weight is not None
        assert self.velocity is not None
        self.weight, self.velocity = self.weight.to(f), self.velocity.to(f)
        return self.weight, self.velocity


class OnlineProbeCallback(Watch):
    """Records what labels say of h and z while training: ``online_linear_h``, ``online_knn_h``, …, and those of z.

    ``online_train_h`` is the accuracy of the linear classifier on the training rows since the last measurement, each
    before it was learned from; ``online_linear_h`` that on held-out images, without augmentation, and ``online_knn_h``
    the k-NN accuracy on these with the last `bank` training rows as its bank. They are in `trainer.history`, and in the
    log as ``probe_online_linear_h``. Held-out accuracies need held-out images with labels. On several processes all is
    as on one with the joint batch.

    Labels come from the batches: the collator has to give "labels". The classifiers and the bank are written beside
    each checkpoint and found again when training resumes in the same `output_dir`; elsewhere they start anew, with a
    warning.

    Args:
        learning_rate: Of the classifiers' SGD.
        momentum: Of the same.
        scale: Length that rows of h and z are given; None: they are taken as they are.
        k: Neighbours that vote; 0 leaves the k-NN out.
        temperature: Of the k-NN.
        bank: Training rows that the k-NN searches, of the first view of each image.
        every: Steps between two measurements; None: so rarely that the passes over the held-out images take less than a
            hundredth of the time.
        images: Held-out images, evenly spaced.
        dataset: Where they come from; None: the trainer's `eval_dataset` (the first, of several), if there is one.

    Raises:
        UsageError: as `Watch`; an option out of its range; on training, batches without labels, a held-out set that is
            a stream or has no labels.

    Example:
        >>> OnlineProbeCallback(learning_rate=-1.0)
        Traceback (most recent call last):
        hfproj.errors.UsageError: Expected learning_rate > 0, 0 ≤ momentum < 1 and scale > 0, got -1.0, 0.9 and 4.0.
    """

    PASSES = 60  # as `ProbeWatch`: a forward pass is a third of a step

    def __init__(
        self,
        *,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        scale: float | None = 4.0,
        k: int = 20,
        temperature: float = 0.07,
        bank: int = 4096,
        every: int | None = None,
        images: int = 512,
        dataset: Any = None,
    ):
        super().__init__(every)
        if not learning_rate > 0 or not 0 <= momentum < 1 or (scale is not None and not scale > 0):
            raise UsageError(
                "Expected learning_rate > 0, 0 ≤ momentum < 1 and scale > 0, got "
                f"{learning_rate}, {momentum} and {scale}."
            )
        if k < 0 or bank < 1 or images < 1 or not temperature > 0:
            raise UsageError(
                f"Expected k ≥ 0, bank ≥ 1, images ≥ 1 and temperature > 0, got {k}, {bank}, {images}, {temperature}."
            )
        self.learning_rate, self.momentum, self.scale = learning_rate, momentum, scale
        self.k, self.temperature, self.bank = k, temperature, bank
        self.images, self.dataset = images, dataset
        self._labels: Tensor | None = None

    def bind(self, trainer: Any) -> None:
        """Join `trainer`, and note the labels of each batch that it computes the loss of."""
        if self.trainer is trainer:
            return
        super().bind(trainer)
        compute_loss = trainer.compute_loss

        def noting(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                self._labels = inputs.get("labels")
                if self._labels is None:
                    raise UsageError(
                        "OnlineProbeCallback learns from labels, but the batches have none: give the collator the name "
                        "of their column (label_column=…), or leave the callback out."
                    )
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = noting

    # --- when ---

    @property
    def steps_between(self) -> int:
        """Optimizer steps between two measurements."""
        if self.every is not None:
            return self.every
        args = self.trainer.args
        return max(1, math.ceil(self.PASSES * self.images / (self._joint * args.gradient_accumulation_steps)))

    @property
    def _joint(self) -> int:
        return self.trainer.args.train_batch_size * self.trainer.args.world_size

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start with classifiers of zero, or where a training that is resumed has left them."""
        if self.trainer is None:
            super().on_train_begin(args, state, control, **kwargs)
        self._measured_at = state.global_step
        self.classifiers = {
            layer: OnlineClassifier(learning_rate=self.learning_rate, momentum=self.momentum) for layer in LAYERS
        }
        self._right = dict.fromkeys(LAYERS, 0.0)
        self._seen = 0.0
        self._bank: dict[str, Tensor] = {}  # rows of all processes, as far as they were gathered
        self._recent: deque[dict[str, Tensor]] = deque(maxlen=math.ceil(self.bank / self._joint))  # of this process
        self._held_out = self._find_held_out()
        if state.global_step:
            self._load(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn from a batch that was no whole step yet."""
        self._learn()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn from the batch, and measure where it is time."""
        self._learn()
        super().on_step_end(args, state, control, **kwargs)

    # --- what ---

    @torch.no_grad()
    def _learn(self) -> None:
        labels, self._labels = self._labels, None
        if labels is None:
            return
        for layer in LAYERS:
            views = self.trainer.last_batch[layer]
            y = labels.repeat(len(views))
            rows = torch.cat([self._rows(view) for view in views])
            right, count = self.classifiers[layer].learn(rows, y)
            self._right[layer] += right
        self._seen += count
        if self.k and self._held_out is not None:
            kept = {layer: self.trainer.last_batch[layer][0].detach().float().clone() for layer in LAYERS}
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
            found = extract_features(
                self.trainer.model,
                self._held_out,
                batch_size=self.trainer.args.per_device_eval_batch_size,
                collator=self.trainer.eval_collator,
                device=self.trainer.args.device,
                num_workers=self.trainer.args.dataloader_num_workers,
            )
        if found.labels is None:
            raise UsageError(
                "The held-out images of OnlineProbeCallback have no labels: name their column in eval_collator "
                "(label_column=…), or pass a labelled dataset=."
            )
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
        probe = KNNProbe(k=self.k, temperature=self.temperature)
        bank = self._bank[layer]
        return probe.fit(bank, self._bank["labels"]).score(f.to(bank.device), y)

    def _gather(self) -> None:
        """Join what the processes have kept since the last time to the bank, batch by batch: the order of one."""
        for batch in self._recent:
            for name, rows in batch.items():
                joint = distributed.gather_rows(rows)
                there = [self._bank[name]] if name in self._bank else []
                self._bank[name] = torch.cat([*there, joint])[-self.bank :]
        self._recent.clear()

    def _find_held_out(self) -> Any:
        dataset = self.dataset
        if dataset is None:
            dataset = self.trainer.eval_dataset
            dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
        if dataset is None:
            return None
        if is_stream(dataset):
            raise UsageError(
                "OnlineProbeCallback measures on fixed images, and a stream has none: pass dataset=, for example "
                "list(itertools.islice(stream, 512))."
            )
        count = min(self.images, len(dataset))
        return Subset(dataset, [row * len(dataset) // count for row in range(count)])  # it may be sorted by class

    # --- checkpoints ---

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write classifiers and bank beside the checkpoint that was written."""
        self._gather()  # on all processes
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not args.should_save or not folder.is_dir() or self.classifiers["h"].weight is None:
            return
        tensors = {f"bank.{name}": rows for name, rows in self._bank.items()}
        for layer, classifier in self.classifiers.items():
            assert classifier.weight is not None
            assert classifier.velocity is not None
            tensors |= {f"{layer}.weight": classifier.weight, f"{layer}.velocity": classifier.velocity}
        counts = torch.tensor([self._seen, *self._right.values()], dtype=torch.float64)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in {**tensors, "counts": counts}.items()}
        part = folder / f".{STATE_FILE}.part"
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(folder / STATE_FILE)

    def _load(self, folder: Path) -> None:
        try:
            tensors = {n: t.to(self.trainer.args.device) for n, t in load_file(folder / STATE_FILE).items()}
            for layer, classifier in self.classifiers.items():
                classifier.weight, classifier.velocity = tensors[f"{layer}.weight"], tensors[f"{layer}.velocity"]
            self._seen, *right = tensors["counts"].tolist()
        except (OSError, KeyError, SafetensorError) as error:
            warnings.warn(
                f"The online probe starts anew: {folder} holds no {STATE_FILE} ({type(error).__name__}). It is found "
                "where training resumes in the output_dir that it was stopped in.",
                stacklevel=2,
            )
            return
        self._right = dict(zip(LAYERS, right))
        self._bank = {name.removeprefix("bank."): t for name, t in tensors.items() if name.startswith("bank.")}
