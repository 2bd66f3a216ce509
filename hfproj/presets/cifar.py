"""solo-learn's settings for CIFAR-10 and CIFAR-100: ResNet-18 with a 3×3 stem and without max-pool, 1000 epochs.

References:
    vturrisi/solo-learn (9187ea3) ``scripts/pretrain/cifar/*.yaml``, ``augmentations/*.yaml``.

Deviations:
    Adam there couples weight decay with the gradient, AdamW here does not. The warm-up of 10 epochs is solo-learn's
    default.
"""

from typing import Any

from hfproj.presets.base import Preset
from hfproj.presets.settings import (
    SGD,
    SOLO_ASYMMETRIC_NOTE,
    SOLO_ASYMMETRIC_VIEWS,
    SOLO_LARS,
    SOLO_VIEWS,
    SOLO_WEAK_VIEWS,
    training,
)


def _solo(title: str, file: str, learning_rate: float, weight_decay: float, *, note: str = "",
          optimizer: dict[str, Any] = SOLO_LARS, **others: Any) -> Preset:  # fmt: skip
    source = f"vturrisi/solo-learn (9187ea3), scripts/pretrain/cifar/{file}.yaml."
    if others["views"] is SOLO_ASYMMETRIC_VIEWS:
        note = f"{note} {SOLO_ASYMMETRIC_NOTE}"
    return Preset(
        line=f"{title} on CIFAR, solo-learn",
        source=f"{source} {note.strip()}".strip(),
        training=training(1000.0, 256, learning_rate, weight_decay, **optimizer, **others.pop("schedule", {})),
        **others,
    )


CIFAR: dict[str, Preset] = {
    "simclr_cifar": _solo(
        "SimCLR", "simclr", 0.4, 1e-4,
        objective={"name": "nt_xent", "temperature": 0.2}, head="simclr_solo", views=SOLO_VIEWS,
    ),
    "byol_cifar": _solo(
        "BYOL", "byol", 1.0, 1e-5,
        objective={"name": "byol", "ema_momentum": (0.99, 1.0)}, head="byol", predictor={"head": "byol_predictor"},
        views=SOLO_ASYMMETRIC_VIEWS,
    ),
    "simsiam_cifar": _solo(
        "SimSiam", "simsiam", 0.5, 1e-5, optimizer=SGD, schedule={"fixed_predictor_rate": True},
        note="solo-learn sums the loss over both directions; here, as officially, it is their mean.",
        objective={"name": "simsiam"}, head="simsiam", head_options={"hidden_dim": 2048},
        predictor={"head": "simsiam_predictor"}, views=SOLO_WEAK_VIEWS,
    ),
    "barlow_twins_cifar": _solo(
        "Barlow Twins", "barlow", 0.3, 1e-4,
        objective={"name": "barlow_twins", "scale": 0.1}, head="barlow_twins",
        head_options={"hidden_dim": 2048}, out_dim=2048, views=SOLO_ASYMMETRIC_VIEWS,
    ),
    "vicreg_cifar": _solo(
        "VICReg", "vicreg", 0.3, 1e-4,
        note="The variance term is the sum over the views, as in its losses/vicreg.py.",
        objective={"name": "vicreg", "variance_reduction": "sum"}, head="vicreg", head_options={"hidden_dim": 2048},
        out_dim=2048, views={**SOLO_ASYMMETRIC_VIEWS, "scale": (0.2, 1.0)},  # its own yaml, the same in both views
    ),
    "moco_v2_plus_cifar": _solo(
        "MoCo v2+", "mocov2plus", 0.3, 1e-4, optimizer=SGD,
        objective={
            "name": "moco", "temperature": 0.2, "queue_size": 32768, "symmetric": True, "ema_momentum": (0.99, 0.999),
        },
        head="moco", head_options={"hidden_dim": 2048}, out_dim=256, views=SOLO_WEAK_VIEWS,
    ),
    "swav_cifar": _solo(
        "SwAV", "swav", 0.6, 1e-6,
        objective={
            "name": "swav", "queue_size": 3840, "queue_start_epoch": 50.0, "freeze_prototypes_epochs": 2.0,
        },
        head="swav", prototypes=3000, views=SOLO_VIEWS,
    ),
    "w_mse_cifar": _solo(
        "W-MSE", "wmse", 2e-3, 1e-6, optimizer={},
        objective={"name": "w_mse", "w_size": 128}, head="wmse", views={"scale": (0.2, 1.0), "blur_probability": 0.0},
    ),
    "supcon_cifar": _solo(
        "SupCon", "supcon", 0.4, 1e-5, optimizer=SGD,
        objective={"name": "supcon", "temperature": 0.2}, head="supcon", head_options={"hidden_dim": 2048}, out_dim=256,
        views=SOLO_VIEWS,
    ),
    "nnclr_cifar": _solo(
        "NNCLR", "nnclr", 0.4, 1e-5,
        objective={"name": "nnclr", "temperature": 0.2, "queue_size": 65536}, head="nnclr",
        predictor={"head": "nnclr_predictor"}, views=SOLO_ASYMMETRIC_VIEWS,
    ),
    "moco_v3_cifar": _solo(
        "MoCo v3", "mocov3", 0.3, 1e-6, note="Projector and predictor are those for a ResNet.",
        objective={"name": "moco_v3", "temperature": 0.2, "ema_momentum": (0.99, 1.0)}, head="moco_v3",
        head_options={"depth": 2}, predictor={"head": "moco_v3_predictor", "last_norm": None},
        views=SOLO_ASYMMETRIC_VIEWS,
    ),
    "dino_cifar": _solo(
        "DINO", "dino", 0.3, 1e-6, schedule={"ema_momentum": 0.9995, "ema_momentum_end": 1.0},
        note="Teacher temperature: 0.04 to 0.07 over 30 epochs, as in the recommended official run.",
        objective={"name": "dino"}, head="dino", prototypes=4096, views=SOLO_ASYMMETRIC_VIEWS,
    ),
}  # fmt: skip
