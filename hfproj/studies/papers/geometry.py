"""Paper 1: what a head does to distances, curvature and collapse.

References:
    Chaudhry 2026, "The Geometry of Projection Heads", arXiv 2605.17180; farischaudhry/projection-head-geometry
    (117231d) ``experiments.py``, ``head_depth_ablations.py``.
"""

from typing import Any

from hfproj.reproduction.study import Study
from hfproj.presets.settings import SGD, Preset, only_crops, training

_NO_NORM = {"norm": None, "last_norm": None}


def _collapse(line: str, **head: Any) -> Preset:
    return Preset(
        line=f"The Geometry of Projection Heads, escape from collapse: {line}",
        source="farischaudhry/projection-head-geometry (117231d) experiments.py, experiment 1, ResNet-18 on CIFAR; "
        "arXiv 2605.17180. Deviation: it multiplies the projector's weights by 0.1 before training; do so after "
        "attaching.",
        objective={"name": "simsiam"},
        head="geometry_mlp",
        head_options=head,
        predictor={"head": "geometry_mlp", "hidden_dim": 512, **head},
        views=only_crops((0.2, 1.0)),
        training=training(50.0, 512, 0.05, 0.0, warmup_epochs=0.0, lr_scheduler_type="constant", **SGD),
    )


def _hessian(line: str, activation: str, init: str) -> Preset:
    """Return a run along which the smallest Hessian eigenvalue and the condition number are tracked."""
    weights = "as in experiment 1" if init == "collapsed" else "which leaves the weights as they are"
    return _collapse(line, activation=activation, **_NO_NORM).but(
        f"The Geometry of Projection Heads, the Hessian in training: {line}",
        f"Here hessian_tracker.py --init {init}, {weights}.",
        training=training(100.0, 256, 0.05, 0.0, warmup_epochs=0.0, lr_scheduler_type="constant", **SGD),
    )


def _geometry(line: str, batch: int, **head: Any) -> Preset:
    return Preset(
        line=f"The Geometry of Projection Heads, {line}",
        source="farischaudhry/projection-head-geometry (117231d), ResNet-18 on CIFAR; arXiv 2605.17180. InfoNCE in one "
        "direction, without a gather.",
        objective={"name": "info_nce", "temperature": 0.1, "symmetric": False, "gather": False},
        head="geometry_mlp",
        head_options=head,
        views={
            "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "rotation_degrees": 45.0,
            "grayscale_probability": 0.0, "blur_probability": 0.0,
        },
        training=training(50.0, batch, 1e-3, 0.0, warmup_epochs=0.0, lr_scheduler_type="constant"),
    )  # fmt: skip


PRESETS = {
    "geometry_collapse_linear": _collapse("two linear layers", activation="identity", **_NO_NORM),
    "geometry_collapse_relu": _collapse("ReLU", activation="relu", **_NO_NORM),
    "geometry_collapse_gelu": _collapse("GELU", activation="gelu", **_NO_NORM),
    "geometry_collapse_silu": _collapse("SiLU", activation="silu", **_NO_NORM),
    "geometry_collapse_relu_bn": _collapse("ReLU and BatchNorm", activation="relu"),
    "geometry_collapse_silu_bn": _collapse("SiLU and BatchNorm", activation="silu"),
    "geometry_hessian_normal_silu": _hessian("SiLU, usual weights at first", "silu", "normal"),
    "geometry_hessian_collapsed_silu": _hessian("SiLU, small weights at first", "silu", "collapsed"),
    "geometry_hessian_collapsed_relu": _hessian("ReLU, small weights at first", "relu", "collapsed"),
    "geometry_simclr": _geometry("probes, curvature and orbits of SimCLR (table 1)", 256, activation="relu"),
    **{
        f"geometry_depth_{depth}": _geometry(f"a head of depth {depth}, SiLU", 512, activation="silu", depth=depth)
        for depth in (1, 2, 3)
    },
}


def studies() -> list[Study]:
    """Return its tables."""
    return []
