"""How the papers' runs on CIFAR are reduced to two CPU cores, the same for all of them so that they can be compared."""

from typing import Any

from hfproj.presets.settings import CIFAR_RESNET_18
from hfproj.reproduction import Column, Scale
from hfproj.reproduction.sources import Source

RESNET_18: dict[str, Any] = CIFAR_RESNET_18
CIFAR: dict[str, Source] = {"CIFAR-10": Source("cifar10"), "CIFAR-100": Source("cifar100")}

FROM_SCRATCH = Scale(
    backbone={**RESNET_18, "width": 0.25}, heads=0.25, images=10_000, test_images=5_000,
    training={
        "num_train_epochs": 4.0, "per_device_train_batch_size": 64, "learning_rate": 0.1, "lars": False, "optim": "sgd",
        "optim_args": "momentum=0.9", "weight_decay": 0.0, "warmup_steps": 0.05, "lr_scheduler_type": "cosine",
    },
    views={"size": 16, "scale": (0.3, 1.0), "blur_probability": 0.0}, seconds=110.0, machine="one CPU core",
    note="From scratch: a ResNet-18 of a quarter of the width but for its stem (h has 128 entries), heads of a "
    "quarter, images of 16 pixels, 10,000 of them and 5,000 test images, 4 epochs of batch 64 by SGD at 0.1 with "
    "momentum 0.9, warm-up of 5 % and a cosine; crops of 0.3 to 1 of the image, no blur.",
)  # fmt: skip

LINEAR_H = Column(name="linear of h", measure="linear", options={"l2": 1e-3}, unit="%")
LINEAR_Z = Column(name="linear of z", measure="linear", layer="z", options={"l2": 1e-3}, unit="%")
KNN_H = Column(name="20-NN of h", measure="knn", options={"k": 20}, unit="%")
KNN_Z = Column(name="20-NN of z", measure="knn", layer="z", options={"k": 20}, unit="%")
RANK_H = Column(name="rank of h", measure="covariance_rank", log=True)
RANK_Z = Column(name="rank of z", measure="covariance_rank", layer="z", log=True)


def as_published(seconds: float | int, note: str, **training: Any) -> Scale:
    """Return the scale of a paper on CIFAR with a ResNet-18: as the presets have it, and what `training` adds.

    Args:
        seconds: What a run takes on one H200, about.
        note: What the paper leaves open, and how it is filled in.
        training: Values that the presets leave open.
    """
    return Scale(
        backbone=RESNET_18, training=training, views={"size": 32}, seconds=seconds,
        machine="one H200 (an estimate from the number of operations, not measured)", note=note,
    )  # fmt: skip
