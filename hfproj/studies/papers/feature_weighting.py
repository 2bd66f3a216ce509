"""Paper 2: features are weighted more unequally with every layer, and the fixed reweighting head.

References:
    Xue, Gan, Ni, Joshi, Mirzasoleiman 2024, "Investigating the Benefits of Projection Head for Representation
    Learning", arXiv 2403.11391; jiayini1119/projection-head-experiments (a145e06); settings on CIFAR from the
    reimplementation boboxa2010/ssl-projection-head-study ``experiments.md``.
"""

from typing import Any

from hfproj.reproduction.study import Study
from hfproj.presets.settings import SGD, SOLO_VIEWS, Preset, only_crops, training

_HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no_head": ("no head", "identity", {}),
    "mlp": ("an MLP", "mlp", {"hidden_dim": None, "out_dim": None, "norm": None}),
    "reweight": ("the fixed reweighting head", "reweight", {}),
}
_OPEN = (
    "arXiv 2403.11391; settings from the reimplementation boboxa2010/ssl-projection-head-study, experiments.md, which "
    "says that they are the paper's (not confirmed in official code). Widths of the MLP (those of h), schedule and "
    "augmentation are ours."
)


def _row(kind: str, kappa: float, line: str, **setting: Any) -> Preset:
    title, head, options = _HEADS[kind]
    if kind == "reweight":
        title, options = f"{title}, kappa {kappa}", {"kappa": kappa}
    return Preset(line=f"{line}, {title}", source=_OPEN, head=head, head_options=options, **setting)


def _supcon_cifar100(kind: str) -> Preset:
    return _row(
        kind, 1.5, "SupCon on coarse classes of CIFAR-100",
        objective={"name": "supcon", "temperature": 0.5},
        views={"num_views": 1, **SOLO_VIEWS},
        training=training(400.0, 512, 0.1, 1e-6, warmup_epochs=0.0, **SGD),
    )  # fmt: skip


def _simclr_mnist_on_cifar(kind: str) -> Preset:
    return _row(
        kind, 1.05, "SimCLR on MNIST-on-CIFAR-10",
        objective={"name": "nt_xent", "temperature": 0.5},
        views=SOLO_VIEWS,
        training=training(400.0, 512, 1e-3, 1e-6, warmup_epochs=0.0),
    )  # fmt: skip


PRESETS = {
    **{f"reweighting_supcon_{kind}": _supcon_cifar100(kind) for kind in _HEADS},
    **{f"reweighting_simclr_{kind}": _simclr_mnist_on_cifar(kind) for kind in _HEADS},
    "reweighting_supcon_waterbirds": Preset(
        line="SupCon on Waterbirds or CelebA, a pretrained ResNet-50",
        source="jiayini1119/projection-head-experiments (a145e06) pretrain.py, method SCL; arXiv 2403.11391. The "
        "schedule is constant; its crops are ours.",
        objective={"name": "supcon", "temperature": 0.5},
        head="mlp",
        head_options={"hidden_dim": 2048, "norm": None},
        out_dim=2048,
        views={"num_views": 1, **only_crops((0.7, 1.0))},
        training=training(100.0, 32, 1e-3, 1e-3, warmup_epochs=0.0, lr_scheduler_type="constant", **SGD),
    ),
}


def studies() -> list[Study]:
    """Return its tables."""
    return []
