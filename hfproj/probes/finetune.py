"""Fine-tuning probe: what a network learns from few labels, or from all, when backbone and classifier train together.

    logits = W h(x) + b,    AdamW on cross-entropy, linear warm-up, a cosine to 0

with a `fraction` of each class's training images: 0.01 and 0.1 are the usual semi-supervised evaluations, 1 is full
fine-tuning. What is fine-tuned is a copy of the backbone as it computes h, with its adapter merged in; heads are not
used. The model that is given stays as it is, bit for bit.

References:
    SimCLR (Chen et al. 2020, arXiv 2002.05709, appendix B.5): 1 % and 10 % of the images in a class-balanced way,
    random crops and flips alone, 60 and 30 epochs.

Deviations:
    AdamW with a smaller learning rate for the backbone and a warm-up instead of SGD with Nesterov momentum, as is usual
    for transformers; learning rates, weight decay and warm-up are our choice. Each class keeps this fraction of its
    images, and at least one; SimCLR's classes are of about one size. The classifier starts at zero. No augmentation
    beyond crops and flips, no mix-up, no layer-wise decay.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hfproj.checking import check_types, explained
from hfproj.data.augment import Augmentation
from hfproj.data.images import EvalImages, ImageViews
from hfproj.data.indexing import IndexedDataset, as_item
from hfproj.errors import UsageError, unknown
from hfproj.features.reader import run_head, view_batches
from hfproj.functional.feature_rows import describe_bad_rows
from hfproj.functional.labels import labelled_rows
from hfproj.functional.modes import evaluating
from hfproj.probes.base import Named, as_labels, check_decay, check_numbers, cosine, descend, left_out, shuffled_classes
from hfproj.tuner.network import network_of
from hfproj.typing import Data, OneOf, Pooling

Collator = Callable[[list], Mapping[str, Any]]
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
CROP_AND_FLIP = Augmentation.none(scale=(0.08, 1.0), flip_probability=0.5)  # SimCLR's, for fine-tuning


@explained
@dataclass(kw_only=True, repr=False, eq=False)
class FineTuneProbe(Named):
    """Accuracy after fine-tuning on a fraction of the labels: `fit(model, train)`, `predict(test)`, `score(test)`.

    Data sets have a length, integer indices, and items with a label: dicts (🤗 datasets) or ``(image, label)`` pairs. A
    copy of the backbone is trained and kept until the probe is dropped; in training, its gradients and AdamW's two
    moments come on top. On several processes each trains by itself. On the CPU the same inputs give the same result.

    Args:
        fraction: Of the training images of each class, in (0, 1]; at least one image of each.
        epochs: Passes over these images. 30 as in SimCLR at 10 %; few images need more.
        batch_size: Images per step; an epoch is divided evenly.
        learning_rate: Peak learning rate of the classifier.
        backbone_learning_rate: Peak learning rate of the backbone.
        weight_decay: Of matrices; not of biases, norms and scales.
        warmup: Fraction of the steps in which the learning rates rise, in [0, 1).
        max_grad_norm: Gradients are scaled down to this norm; None: never.
        augmentation: Of training images; None: the same preprocessing as in testing.
        precision: None: that of the weights, float32 or better. "bf16" or "fp16": autocast.
        collator: Makes training batches of items with "index" and "epoch": ``{"pixel_values"}``, ``{"inputs"}`` or
            ``{"views"}`` of one view. None: `augmentation` and the preprocessing of `eval_collator`.
        eval_collator: Makes test batches; None: ``EvalImages.for_model(model)``.
        label_column: Entry of an item that holds its class number; −1, None and NaN are no label.
        pooling, layer: Of a model without a projection head, see `ProjectionHeadConfig`; a head has its own.
        in_dim: Likewise, if the width of h can't be inferred from the backbone.
        seed: Seed of the chosen images, of their order, of their augmentation and of dropout.
        device: Where to train; None: where the model is.
        num_workers: Processes that load data.

    Attributes:
        indices_: After fitting: the rows of `train` that were used.
        results_: After scoring: `{"value": accuracy, "protocol": {…}}`.
        correct_: After scoring: `[labelled rows]` bool, for `paired_interval`.

    Raises:
        UsageError: If an option is out of its range.

    Example (a plain module as the backbone; the first number tells the class):
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(64, 12), torch.arange(64) % 2
        >>> x[:, 0] = 3 * y
        >>> data = [{"x": row, "label": int(label)} for row, label in zip(x, y)]
        >>> collate = lambda items: {"pixel_values": torch.stack([item["x"] for item in items])}
        >>> probe = FineTuneProbe(learning_rate=0.1, backbone_learning_rate=0.1, batch_size=16,
        ...                       eval_collator=collate)
        >>> probe.fit(nn.Linear(12, 8), data[:48]).score(data[48:])
        1.0
    """

    name = "fine_tune"
    on = "model"
    _left_out = ("augmentation", "collator", "eval_collator", "label_column", "pooling", "layer", "in_dim", "device",
                 "num_workers")  # fmt: skip

    fraction: float = 1.0
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    backbone_learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup: float = 0.1
    max_grad_norm: float | None = 1.0
    augmentation: Augmentation | None = CROP_AND_FLIP
    precision: OneOf["bf16", "fp16"] | None = None
    collator: Collator | None = None
    eval_collator: Collator | None = None
    label_column: str = "label"
    pooling: Pooling | None = None
    layer: int = -1
    in_dim: int | None = None
    seed: int = 0
    device: torch.device | str | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))
        if not 0 < self.fraction <= 1 or not 0 <= self.warmup < 1:
            raise UsageError(f"Expected 0 < fraction ≤ 1 and 0 ≤ warmup < 1, got {self.fraction} and {self.warmup}.")
        check_numbers(epochs=self.epochs, batch_size=self.batch_size, learning_rate=float(self.learning_rate))
        check_decay(self.weight_decay)
        if not 0 <= self.backbone_learning_rate < math.inf:
            raise UsageError(f"Expected a finite backbone_learning_rate ≥ 0, got {self.backbone_learning_rate}.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UsageError(f"Expected max_grad_norm > 0, or None for no limit, got {self.max_grad_norm}.")
        if self.precision is not None and self.precision not in _PRECISIONS:
            raise unknown("precision", self.precision, _PRECISIONS)

    def fit(self, model: nn.Module, train: Data) -> "FineTuneProbe":
        """Fine-tune a copy of `model` on a fraction of `train`.

        Args:
            model: A model with a projection head, a backbone (transformers, timm, or a module that returns h) or a
                backbone with another PEFT method; an adapter in use is merged into the copy.
            train: Labelled items.

        Raises:
            UsageError: If there are no items, if they have no integer labels, if a backbone has no parameters or its
                width is unknown, if an adapter can't be merged, or if a pooling is given for a head that has its own.
            NonFiniteLossError: If the loss became NaN or infinite.
        """
        device = torch.device(self.device) if self.device is not None else _device_of(model)
        items: Any = train  # torch's Dataset shows no length
        if not len(items):
            raise UsageError("The data set is empty: there is nothing to fine-tune on.")
        labels = labels_of(train, self.label_column)
        known = labelled_rows(labels, "training").nonzero().flatten()
        chosen = fraction_of_each_class(labels[known], self.fraction, self.seed)
        self.indices_, self._train_unlabelled = known[chosen].tolist(), len(labels) - len(known)
        self.classes_, codes = torch.unique(labels[self.indices_], return_inverse=True)
        self._train_rows = len(items)
        self._collate, self._collate_train = self._collators(model)
        # The caller's inference mode would let the backward pass fail, its autocast would lower the precision.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            _own_random_state(self.seed, device),
        ):
            network: Any = network_of(model, pooling=self.pooling, layer=self.layer, in_dim=self.in_dim).to(device)
            config = network.peft_config[network.active_adapter]
            like = next((p for p in network.parameters() if p.requires_grad), None)
            if like is None:
                hint = "nothing to fine-tune. Probe its features instead, for example with the linear probe"
                raise UsageError(f"The representation of {type(model).__name__} depends on no parameters: {hint}.")
            classifier = nn.Linear(config.in_dim, len(self.classes_), device=device, dtype=like.dtype)
            nn.init.zeros_(classifier.weight)
            nn.init.zeros_(classifier.bias)
            self._read = {"pooling": config.pooling, "layer": config.layer, "dim": config.in_dim}
            self._network, self._classifier, self._device, self._dtype = network, classifier, device, like.dtype
            self._train(Subset(items, self.indices_), codes.to(device))
        return self

    def predict(self, test: Data) -> Int[Tensor, " rows"]:
        """Return the predicted label of every item, on the CPU.

        Raises:
            UsageError: If the probe is not fitted, if there are no items, or if logits are not finite.
        """
        self._check_fitted()
        items: Any = test
        if not len(items):
            raise UsageError("The data set is empty: there is nothing to predict.")
        loader = self._loader(items, self._collate, batch_size=self.batch_size)
        with evaluating(self._network), torch.inference_mode():
            logits = torch.cat([self._logits(batch).float().cpu() for batch in loader])
        if refusal := describe_bad_rows(logits, what="logits"):
            raise UsageError(refusal)
        _check_rows(logits, items)
        return self.classes_[logits.argmax(1)]

    def score(self, test: Data) -> float:
        """Return the accuracy on `test`, and keep it with its protocol in `results_` and row by row in `correct_`.

        Raises:
            UsageError: As `predict`, or if items have no integer labels.
            NotMeasurableError: If no item has a label.
        """
        self._check_fitted()
        labels = labels_of(test, self.label_column)
        known = labelled_rows(labels, "test").nonzero().flatten()
        unlabelled, labels = len(labels) - len(known), labels[known]
        items: Any = test
        predicted = self.predict(Subset(items, known.tolist()) if unlabelled else items)
        self.correct_ = predicted == labels
        value = self.correct_.double().mean().item()
        rows = hashlib.sha256(np.asarray(self.indices_, dtype=np.int64).tobytes()).hexdigest()[:16]
        sizes = {"train_rows": len(self.indices_), "train_rows_of": self._train_rows, "train_rows_sha256": rows,
                 "test_rows": len(known), "classes": len(self.classes_),
                 **left_out(self._train_unlabelled, unlabelled)}  # fmt: skip
        named = {} if self.label_column == "label" else {"labels": self.label_column}
        protocol = {**self._settings("seed"), **self._read, **self._images(), **sizes, **named}
        self.results_ = {"value": value, "protocol": protocol}
        return value

    def _check_fitted(self) -> None:
        if not hasattr(self, "_network"):
            raise UsageError("This probe is not trained yet: call fit(model, train) first.")

    def _collators(self, model: nn.Module) -> tuple[Callable, Callable]:
        """Return the collators of testing and of training."""
        collate = self.eval_collator if self.eval_collator is not None else EvalImages.for_model(model)
        if self.collator is not None:
            return collate, self.collator
        if self.augmentation is None or not isinstance(collate, EvalImages):
            return collate, collate
        mean, std = collate.mean.flatten().tolist(), collate.std.flatten().tolist()
        views = ImageViews(size=collate.size, mean=mean, std=std, num_views=1, seed=self.seed, label_column=None,
                           image_column=collate.image_column, augmentation=self.augmentation,
                           flip_channels=collate.flip_channels)  # fmt: skip
        return collate, views

    def _images(self) -> dict[str, Any]:
        """Return what the protocol says of the images."""
        said: dict[str, Any] = {"collator": type(self._collate).__name__}
        if isinstance(self._collate, EvalImages):
            collate = self._collate
            said |= {"size": collate.size, "interpolation": collate.interpolation}
            if (collate.resize, collate.resize_mode) != (collate.size, "shortest"):
                said |= {"resize": collate.resize, "resize_mode": collate.resize_mode}
        if isinstance(self._collate_train, ImageViews) and self.collator is None:
            off = Augmentation.none()
            parts = asdict(self._collate_train.augmentations[0])
            chosen = {name: value for name, value in parts.items() if value != getattr(off, name)}
            said["augmentation"] = {n: list(v) if isinstance(v, tuple) else v for n, v in chosen.items()}
        elif self._collate_train is not self._collate:
            said["augmentation"] = type(self._collate_train).__name__
        else:
            said["augmentation"] = None
        return said

    def _loader(self, dataset: Any, collate: Callable, **options: Any) -> DataLoader:
        # A loader without its own generator advances the global one.
        options |= {"num_workers": self.num_workers, "generator": torch.Generator()}
        return DataLoader(dataset, collate_fn=collate, **options)

    def _logits(self, batch: Mapping[str, Any]) -> Float[Tensor, "rows classes"]:
        # Without its cache: in the caller's or fit's own autocast, which is not left between steps, the half-precision
        # copies of the first step's weights would be used in all later ones.
        dtype = _PRECISIONS.get(self.precision or "")
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            h = run_head(self._network, _inputs(batch, self._dtype), self._device).representation
            return self._classifier(h)

    def _train(self, images: Any, codes: Tensor) -> None:
        groups = [
            *_groups(self._network, self.backbone_learning_rate, self.weight_decay),
            *_groups(self._classifier, self.learning_rate, self.weight_decay),
        ]
        batches = math.ceil(len(images) / self.batch_size)
        steps = self.epochs * batches

        def loaded() -> Iterator[tuple[list[int], Mapping[str, Any]]]:
            for epoch in range(self.epochs):
                order = np.random.default_rng([self.seed % 2**64, epoch]).permutation(len(images))
                parts = [part.tolist() for part in np.array_split(order, batches)]  # no last batch of a single image
                keys = [[(epoch, position) for position in part] for part in parts]
                loader = self._loader(IndexedDataset(images), self._collate_train, batch_sampler=keys)
                yield from zip(parts, loader, strict=True)

        def loss_of(batch: tuple[list[int], Mapping[str, Any]]) -> Tensor:
            rows, inputs = batch
            logits = self._logits(inputs)
            _check_rows(logits, rows)
            return F.cross_entropy(logits.to(self._dtype), codes[rows])

        self._network.train()
        scaler = torch.amp.GradScaler(self._device.type, enabled=self.precision == "fp16")
        rate = partial(schedule, steps=steps, warmup=self.warmup)
        descend(groups, loaded(), loss_of, rate, what="fine-tuning", scaler=scaler, max_norm=self.max_grad_norm)
        for parameter in self._network.parameters():
            parameter.grad = None


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the fraction of the peak learning rate in step `step` of `steps`: a line up, then half a cosine down.

    Example:
        >>> [round(schedule(step, 8, 0.25), 3) for step in (0, 1, 2, 5)]
        [0.5, 1.0, 1.0, 0.5]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return cosine(step - rising, steps - rising)


def _check_rows(logits: Tensor, items: Sized) -> None:
    if len(logits) != len(items):
        raise UsageError(f"Expected a row for each of {len(items)} items from the collator, got {len(logits)} rows.")


def fraction_of_each_class(labels: Int[Tensor, " rows"], fraction: float, seed: int = 0) -> list[int]:
    """Return random rows, this fraction of every class and at least one each, in ascending order.

    Example:
        >>> labels = torch.tensor([0] * 90 + [1] * 9 + [2])
        >>> labels[fraction_of_each_class(labels, 1 / 3)].bincount().tolist()
        [30, 3, 1]
    """
    _, codes, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    wanted = torch.tensor([max(1, round(fraction * size)) for size in sizes.tolist()])
    _, place = shuffled_classes(codes, torch.Generator().manual_seed(seed))
    return (place < wanted[codes]).nonzero().flatten().tolist()


def labels_of(dataset: Any, column: str) -> Int[Tensor, " rows"]:
    """Return the labels of a data set, −1 where there is none; of a 🤗 data set without decoding its images."""
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, Sequence) and column in columns:
        return as_labels(list(dataset[column]), len(dataset))
    found = []
    for row in range(len(dataset)):
        item = as_item(dataset[row])
        found.append(item.get(column))
        if column not in item and row == 0:
            have = ", ".join(map(repr, item))
            raise UsageError(f"Item {row} has no label: it has {have}. Name the column: label_column=….")
    return as_labels(found, len(found))


def _groups(module: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups with and without weight decay, those that are not empty."""
    trained = [p for p in module.parameters() if p.requires_grad]
    split = [([p for p in trained if p.ndim > 1], weight_decay), ([p for p in trained if p.ndim <= 1], 0.0)]
    return [{"params": params, "lr": rate, "weight_decay": decay} for params, decay in split if params]


def _inputs(batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a batch as `forward` takes it, floating-point numbers in the dtype of the weights."""
    views = view_batches(batch)
    if len(views) != 1:
        raise UsageError(f"Expected one view of each image for fine-tuning, got {len(views)} from the collator.")

    def cast(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: cast(part) for name, part in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return cast(views[0])


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def _own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, which dropout uses, and give them back as they were."""
    others = random.getstate(), np.random.get_state()  # noqa: NPY002  what a collator may use
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002
