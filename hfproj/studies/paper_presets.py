"""The rows of the tables of five papers on projection heads.

References:
    Paper 1 (``geometry_…``): Chaudhry 2026, "The Geometry of Projection Heads", arXiv 2605.17180;
    farischaudhry/projection-head-geometry (117231d) ``experiments.py``, ``head_depth_ablations.py``.
    Paper 2 (``reweighting_…``): Xue, Gan, Ni, Joshi, Mirzasoleiman 2024, arXiv 2403.11391;
    jiayini1119/projection-head-experiments (a145e06); settings on CIFAR from the reimplementation
    boboxa2010/ssl-projection-head-study ``experiments.md``.
    Paper 3 (``inside_projector_…``): OpenReview PD532fs8b1, first version, tables 1 and 2.
    Paper 4 (``bottleneck_…``): Ouyang, Hu, Zhang, Wang, Wang 2025, "Projection Head is Secretly an Information
    Bottleneck", arXiv 2503.00507; PKU-ML/Projector_Theory (5c2e7d1), kaotty/Projector-Theory (5928007).
    Paper 5 (``sparsehead_…``): Song et al. 2023, "SparseHead", arXiv 2307.08913.
"""

from typing import Any

from hfproj.presets.published import PUBLISHED
from hfproj.presets.settings import (
    BYOL_VIEWS,
    BYOL_VIEWS_NOTE,
    NO_CLIPPING,
    SGD,
    SOLO_ASYMMETRIC_NOTE,
    SOLO_ASYMMETRIC_VIEWS,
    SOLO_LARS,
    SOLO_VIEWS,
    Preset,
    only_crops,
    training,
)

# Paper 1: activation and BatchNorm of the head under collapse, the Hessian in training, and its depth under SimCLR.

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


_PAPER_1 = {
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

# Paper 2: the fixed reweighting head against an MLP and none.

_PAPER_2_HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no_head": ("no head", "identity", {}),
    "mlp": ("an MLP", "mlp", {"hidden_dim": None, "out_dim": None, "norm": None}),
    "reweight": ("the fixed reweighting head", "reweight", {}),
}
_PAPER_2_OPEN = (
    "arXiv 2403.11391; settings from the reimplementation boboxa2010/ssl-projection-head-study, experiments.md, which "
    "says that they are the paper's (not confirmed in official code). Widths of the MLP (those of h), schedule and "
    "augmentation are ours."
)


def _paper_2(kind: str, kappa: float, line: str, **setting: Any) -> Preset:
    title, head, options = _PAPER_2_HEADS[kind]
    if kind == "reweight":
        title, options = f"{title}, kappa {kappa}", {"kappa": kappa}
    return Preset(line=f"{line}, {title}", source=_PAPER_2_OPEN, head=head, head_options=options, **setting)


def _supcon_cifar100(kind: str) -> Preset:
    return _paper_2(
        kind, 1.5, "SupCon on coarse classes of CIFAR-100",
        objective={"name": "supcon", "temperature": 0.5},
        views={"num_views": 1, **SOLO_VIEWS},
        training=training(400.0, 512, 0.1, 1e-6, warmup_epochs=0.0, **SGD),
    )  # fmt: skip


def _simclr_mnist_on_cifar(kind: str) -> Preset:
    return _paper_2(
        kind, 1.05, "SimCLR on MNIST-on-CIFAR-10",
        objective={"name": "nt_xent", "temperature": 0.5},
        views=SOLO_VIEWS,
        training=training(400.0, 512, 1e-3, 1e-6, warmup_epochs=0.0),
    )  # fmt: skip


_PAPER_2 = {
    **{f"reweighting_supcon_{kind}": _supcon_cifar100(kind) for kind in _PAPER_2_HEADS},
    **{f"reweighting_simclr_{kind}": _simclr_mnist_on_cifar(kind) for kind in _PAPER_2_HEADS},
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

# Paper 3: what the projector is replaced by × what is added.

_PAPER_3_SOURCE = (
    "OpenReview PD532fs8b1, first version, tables 1 and 2: ResNet-18 on CIFAR, batch 128, SGD, temperature 0.2. Epochs "
    "and learning rate are not published: give them (num_train_epochs=…, learning_rate=…). Momentum 0.9, no weight "
    "decay and SimCLR's augmentation are ours, and so are negatives from both views (info_nce has the other view's "
    "only)."
)
_PAPER_3_TRAINING: dict[str, Any] = {
    **NO_CLIPPING, **SGD, "weight_decay": 0.0, "per_device_train_batch_size": 128,
}  # fmt: skip
_PAPER_3_HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "simclr": ("SimCLR", "simclr_solo", {}),
    "no_projector": ("without projector", "identity", {}),
    "directclr": ("DirectCLR", "subvector", {"d0": 480}),
    "constant_subvector": ("constant subvector", "constant_subvector", {"d0": 480, "constant": 0.0}),
}
_PAPER_3_HEAD_NOTES = {
    "simclr": "Its projector's widths are solo-learn's, ours.",
    "no_projector": "",
    "directclr": "Its d0 is not published; 480 of 512 is that of the constant subvector.",
    "constant_subvector": "d0 = 480 of 512, c = 0.",
}
_PAPER_3_ADDED: dict[str, tuple[str, dict[str, Any], str]] = {
    "": ("", {}, ""),
    "_werank": (
        " + WERank",
        {"werank": {"weight": 0.01, "layers": "all"}},
        "The weights of WERank are not published; 0.01 on every layer is ours. Train the backbone with it.",
    ),
    "_last_layer": (
        " + orthogonal last layer",
        {"orthogonality": {"weight": 1.0, "side": "WWt"}},
        "Eq. 11, coefficient 1; without a projector it reaches the encoder's last layer, which must be trained.",
    ),
}


def _paper_3(head: str, added: str) -> Preset:
    title, name, options = _PAPER_3_HEADS[head]
    suffix, regularizers, note = _PAPER_3_ADDED[added]
    return Preset(
        line=f"{title}{suffix}, CIFAR",
        source=" ".join(filter(None, (_PAPER_3_SOURCE, _PAPER_3_HEAD_NOTES[head], note))),
        objective={"name": "nt_xent", "temperature": 0.2},
        head=name,
        head_options=options,
        regularizers=regularizers,
        training=_PAPER_3_TRAINING,
    )


_PAPER_3 = {
    f"inside_projector_{head}{added}": _paper_3(head, added) for head in _PAPER_3_HEADS for added in _PAPER_3_ADDED
}
# Its table 1: how many entries are kept, and which constant the others have.
_PAPER_3 |= {
    f"inside_projector_constant_{d0}_{name}": Preset(
        line=f"Constant subvector, d0 = {d0} of 512, c = {c}, CIFAR",
        source=_PAPER_3_SOURCE,
        objective={"name": "nt_xent", "temperature": 0.2},
        head="constant_subvector",
        head_options={"d0": d0, "constant": constant},
        training=_PAPER_3_TRAINING,
    )
    for d0 in (200, 400, 480)
    for name, c, constant in (("zero", "0", 0.0), ("inverse_sqrt", "1/√512", "inverse_sqrt"), ("one", "1", 1.0))
}
_PAPER_3["werank_last_layer"] = _paper_3("simclr", "").but(
    "SimCLR + WERank's term on the last layer only, CIFAR",
    "The squared ‖WWᵀ − I‖² of the projector's last layer, coefficient 1: eq. 11, in the options of WERank; the same "
    "as inside_projector_simclr_last_layer.",
    regularizers={"werank": {"weight": 1.0, "layers": "last", "squared": True, "side": "WWt"}},
)

# Paper 4: three bottlenecks for two methods on two data sets.

_PAPER_4_BASES = {
    "bottleneck_simclr": Preset(
        line="SimCLR, baseline of the bottlenecks, CIFAR",
        source="PKU-ML/Projector_Theory (5c2e7d1) scripts/pretrain/cifar/simclr.yaml, ResNet-18; arXiv 2503.00507. "
        "fp16 there.",
        objective={"name": "nt_xent", "temperature": 0.2},
        head="simclr_solo",
        views=SOLO_VIEWS,
        training=training(200.0, 256, 0.4, 1e-4, **SOLO_LARS),
    ),
    "bottleneck_barlow_twins": Preset(
        line="Barlow Twins, baseline of the bottlenecks, CIFAR",
        source="PKU-ML/Projector_Theory (5c2e7d1) scripts/pretrain/cifar/barlow.yaml, ResNet-18; arXiv 2503.00507. "
        f"Epochs and batch as for SimCLR. fp16 there. {SOLO_ASYMMETRIC_NOTE}",
        objective={"name": "barlow_twins", "scale": 0.1},
        head="barlow_twins",
        head_options={"hidden_dim": 2048},
        out_dim=2048,
        views=SOLO_ASYMMETRIC_VIEWS,
        training=training(200.0, 256, 0.3, 1e-4, **SOLO_LARS),
    ),
    # solo-learn's batch is that of a GPU, of two here, and its learning rate is for 256
    "bottleneck_simclr_imagenet100": Preset(
        line="SimCLR, baseline of the bottlenecks, ImageNet-100",
        source="kaotty/Projector-Theory (5928007) scripts/pretrain/imagenet-100/simclr.yaml, ResNet-18, 128 images on "
        "each of 2 GPUs; arXiv 2503.00507. fp16 there.",
        objective={"name": "nt_xent", "temperature": 0.2},
        head="simclr_solo",
        head_options={"hidden_dim": 4096},
        out_dim=512,
        views=SOLO_VIEWS,
        training=training(100.0, 256, 0.3, 1e-4, **SOLO_LARS),
    ),
    "bottleneck_barlow_twins_imagenet100": Preset(
        line="Barlow Twins, baseline of the bottlenecks, ImageNet-100",
        source="kaotty/Projector-Theory (5928007) scripts/pretrain/imagenet-100/barlow.yaml, ResNet-18, 256 images on "
        f"each of 2 GPUs, learning rate 0.3·batch/256; arXiv 2503.00507. fp16 there. {BYOL_VIEWS_NOTE}",
        objective={"name": "barlow_twins", "scale": 0.1},
        head="barlow_twins",
        head_options={"hidden_dim": 2048},
        out_dim=2048,
        views=BYOL_VIEWS,
        training=training(100.0, 512, 0.6, 1e-4, **SOLO_LARS),
    ),
}
_SPARSE_NOTE = "m = 32·d and top_k = m/100 are ours; m = 100000, top_k = 1000 there."
# Barlow Twins' first layer stays, the autoencoder follows it.
_SPARSE_STEM = {"depth": 1, "last_norm": "batch", "last_bias": True, "last_activation": "relu"}


def _bottlenecks(name: str, base: Preset) -> dict[str, Preset]:
    """Return the baseline and its three variants."""
    method, _, data = base.line.split(", ")
    is_simclr = method == "SimCLR"
    changed, suffix = name.removesuffix("_imagenet100"), "_imagenet100" if name.endswith("_imagenet100") else ""
    levels = 30 if is_simclr else 3
    inner = {"head": base.head, "head_options": base.head_options}
    sparse = {} if is_simclr else {"stem": "mlp", "stem_options": _SPARSE_STEM}
    return {
        name: base,
        f"{changed}_bottleneck{suffix}": base.but(
            f"{method} + bottleneck regularizer, {data}",
            "λ is not published (0, off, in the official configurations); 0.1 is ours.",
            regularizers={"bottleneck": {"weight": 0.1, "alpha": 2.0}},
        ),
        f"{changed}_discretised{suffix}": base.but(
            f"{method} with a discretised projector of {levels} levels, {data}",
            head="quantized",
            head_options={**inner, "levels": levels},
        ),
        f"{changed}_sparse{suffix}": base.but(
            f"{method} with a sparse autoencoder {'as' if is_simclr else 'in the'} projector, {data}",
            _SPARSE_NOTE,
            head="topk",
            head_options=sparse,
            out_dim=None if is_simclr else base.out_dim,  # the autoencoder keeps the width of h
        ),
    }


_PAPER_4: dict[str, Preset] = {}
for _name, _base in _PAPER_4_BASES.items():
    _PAPER_4 |= _bottlenecks(_name, _base)

# Paper 5: SparseHead on three methods.

_PAPER_5 = {
    f"sparsehead_{name}": PUBLISHED[name].but(
        f"{PUBLISHED[name].line} + SparseHead",
        "SparseHead: arXiv 2307.08913, from a summary, no code. λ, the grouping (input features) and the layer (the "
        "first) are not published; they are ours, λ = 1e-4, and so is the division by ‖W‖_F, since a BatchNorm "
        "follows.",
        regularizers={"sparse_head": {"weight": 1e-4, "normalise": True}},
    )
    for name in ("simclr", "byol", "barlow_twins")
}

PAPERS: dict[str, Preset] = {**_PAPER_1, **_PAPER_2, **_PAPER_3, **_PAPER_4, **_PAPER_5}
