"""Paper 1: what a head does to distances, curvature and collapse.

References:
    Chaudhry 2026, "The Geometry of Projection Heads", arXiv 2605.17180; farischaudhry/projection-head-geometry
    (117231d) ``experiments.py``, ``head_depth_ablations.py``.
"""

from typing import Any

from hfproj.presets.settings import CIFAR_RESNET_18, SGD, Preset, only_crops, training
from hfproj.reproduction import Agree, Cells, Claim, Column, More, Row, Scale, Study, Trend
from hfproj.studies.papers import _geometry_measures  # noqa: F401  what its columns name
from hfproj.studies.papers._reductions import (
    CIFAR,
    FROM_SCRATCH,
    KNN_H,
    KNN_Z,
    RANK_H,
    RANK_Z,
    as_published,
)  # fmt: skip

_NO_NORM = {"norm": None, "last_norm": None}


def _collapse(line: str, **head: Any) -> Preset:
    return Preset(
        line=f"The Geometry of Projection Heads, escape from collapse: {line}",
        source="farischaudhry/projection-head-geometry (117231d) experiments.py, experiment 1, ResNet-18 on CIFAR; "
        "arXiv 2605.17180. Deviation: it multiplies the projector's weights by 0.1 before training; do so after "
        "attaching.",
        objective={"name": "simsiam"},
        backbone=CIFAR_RESNET_18,
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
        backbone=CIFAR_RESNET_18,
        head="geometry_mlp",
        head_options=head,
        views={
            "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "rotation_degrees": 45.0,
            "grayscale_probability": 0.0, "blur_probability": 0.0,
        },
        training=training(50.0, batch, 1e-3, 0.0, warmup_epochs=0.0, lr_scheduler_type="constant"),
    )  # fmt: skip


_BESIDE: dict[str, dict[str, Any]] = {
    "nt_xent": {"name": "nt_xent", "temperature": 0.1}, "vicreg": {"name": "vicreg"},
    "barlow_twins": {"name": "barlow_twins"},
}  # fmt: skip
_ONE_LAYER = {"depth": 1, **_NO_NORM, "out_dim": 128}

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
        f"geometry_{kind}_{name}": _geometry(f"{line} on {objective['name']}", 256, activation="silu", **head).but(
            f"The Geometry of Projection Heads, {line} on {objective['name']}",
            "The decorrelating objectives beside InfoNCE are the paper's, these runs ours.",
            objective=objective,
        )
        for name, objective in _BESIDE.items()
        for kind, line, head in (("linear", "one linear layer", _ONE_LAYER), ("mlp", "an MLP", {}))
    },
    **{
        f"geometry_depth_{depth}": _geometry(f"a head of depth {depth}, SiLU", 512, activation="silu", depth=depth)
        for depth in (1, 2, 3)
    },
}


# Its tables, whitening by linear heads, and degeneracy against what is lost.

_MINI = FROM_SCRATCH.but(
    views={"blur_probability": 0.0},
    note=f"{FROM_SCRATCH.note} Orbits, sweeps and probes are of rotated test images of CIFAR-10.",
)  # fmt: skip
_LORA = Scale(
    backbone={"name": "vit_nano"}, trainable="adapter", lora_rank=8, heads=0.25, images=10_000, test_images=5_000,
    training={
        "num_train_epochs": 2.0, "per_device_train_batch_size": 128, "learning_rate": 2e-3, "warmup_steps": 0.05,
        "lr_scheduler_type": "cosine", "lars": False, "optim": "adamw_torch", "optim_args": None, "max_grad_norm": 1.0,
        "patch_dropout": 0.5,
    },
    views={"scale": (0.3, 1.0), "blur_probability": 0.0}, seconds=110.0, machine="one CPU core",
    note="vit_nano, pretrained, with a LoRA of rank 8, in place of what is not pretrained or not to be had here; "
    "10,000 images, 2 epochs of batch 128.",
)  # fmt: skip
_SCALES = {
    "paper": as_published(1800.0, "Settings of the official code; nothing is left open."),
    "mini": _MINI,
}  # fmt: skip
_CIFAR_10 = {"CIFAR-10": CIFAR["CIFAR-10"]}


def _on_pretrained(mini: Scale) -> dict[str, Scale]:
    """Return the scales on a pretrained backbone: at "paper" whole heads and all images, five times as many."""
    return {"paper": mini.but(heads=1.0, images=None, test_images=None, seconds=5 * mini.seconds), "mini": mini}


def _rotation(probe: str, layer: str) -> Column:
    name = "MLP" if probe == "mlp" else probe
    return Column(name=f"{name} probe of rotation, {layer}", measure="rotation", layer=layer, unit="%",
                  options={"probe": probe})  # fmt: skip


_PROBED = tuple(_rotation(probe, layer) for probe in ("linear", "mlp") for layer in ("h", "z"))
_GAP = Column(name="linear probe of rotation, h − z", measure="rotation_gap", unit="%")
_BENT = tuple(
    Column(name=f"curvature, {layer}", measure="curvature", layer=layer, digits=4, log=True) for layer in ("h", "z")
)
_SPREAD, _APART = (
    tuple(Column(name=f"{title}, {layer}", measure="orbits", layer=layer, options={"of": of}, digits=digits, log=True)
          for layer in ("h", "z"))
    for title, of, digits in (("spread", "spread", 4), ("D_inter / D_intra", "ratio", 2))
)  # fmt: skip
_COMPRESSION = (
    Column(name="compression", measure="orbits", options={"of": "compression"}, digits=2, log=True),
    Column(name="compression, h of unit length", measure="orbits", digits=2, log=True,
           options={"of": "compression", "unit_input": True}),
)  # fmt: skip
_VARIATION = Column(name="variation of the metric", measure="metric", options={"of": "variation"}, digits=2)
_CONDITION = Column(name="condition of the metric", measure="metric", options={"of": "condition"}, log=True)
_DEGENERACY = Column(name="degeneracy along rotation", measure="degeneracy", digits=3, log=True)
_ORBITS = (*_BENT, *_SPREAD, *_APART, *_COMPRESSION)


def _less_in_z(rows: tuple[str, ...], source: str) -> tuple[Claim, ...]:
    return tuple(
        Claim(text=f"{'A linear' if i == 0 else 'An MLP'} probe reads rotation better from h than from z",
              source=source,
              tests=(More(Cells(_PROBED[2 * i].name, rows), Cells(_PROBED[2 * i + 1].name, rows)),))
        for i in (0, 1)
    )  # fmt: skip


def _tables() -> list[Study]:
    columns = (*_PROBED, *_BENT, *_SPREAD, *_APART, _COMPRESSION[1])
    numbers = (52.27, 37.55, 55.46, 43.56, 0.1254, 0.2423, 0.0225, 0.0010, 2.04, 2.50, 21.85)
    table_1 = {"CIFAR-10": {column.name: number for column, number in zip(columns, numbers, strict=True)}}
    trained, untrained = "SimCLR", "untrained"
    rows = (
        Row(name=trained, preset="geometry_simclr", paper=table_1),
        Row(name=untrained, preset="geometry_simclr", trained=False),
        Row(name="SimCLR, z as wide as h", preset="geometry_simclr", changes={"out_dim": 512}),
    )  # fmt: skip
    bends = Claim(text="A sweep of rotations is more curved in z than in h", source="Table 1",
                  tests=(More(Cells(_BENT[1].name, (trained,)), Cells(_BENT[0].name, (trained,))),))  # fmt: skip
    contracts = Claim(text="The head contracts orbits of rotation (h of unit length, as its script has it)",
                      source="Table 1",
                      tests=(More(Cells(_COMPRESSION[1].name, (trained,)), 1.0),))  # fmt: skip
    more_than_untrained = Claim(
        text="… more than an untrained head does", source="control", ours=True,
        tests=(More(Cells(_COMPRESSION[1].name, (trained,)), Cells(_COMPRESSION[1].name, (untrained,))),),
    )  # fmt: skip
    narrow = Claim(
        text="… also where z is no wider than h", source="control", ours=True,
        tests=(More(Cells(_PROBED[0].name, (rows[2].name,)), Cells(_PROBED[1].name, (rows[2].name,))),),
    )  # fmt: skip
    table_5 = {
        "CIFAR-100": {_PROBED[0].name: 42.01, _PROBED[1].name: 31.19, _PROBED[2].name: 44.53, _PROBED[3].name: 34.16}
    }
    return [
        Study(
            name="geometry.table1", title="Does the head forget rotations, bend sweeps and contract orbits?",
            source="Table 1; arrays of the official code.", data=_CIFAR_10, scales=_SCALES, rows=rows,
            columns=(*_PROBED, *_ORBITS),
            claims=(*_less_in_z((trained,), "Table 1"), narrow, bends, contracts, more_than_untrained),
        ),
        Study(
            name="geometry.table5", title="… on CIFAR-100, and on a ViT?", data=CIFAR,
            source="Table 5: those of a ResNet-18 on CIFAR-100; of ViT-tiny it has linear 40.75 / 34.92, MLP "
            "44.22 / 40.87.",
            scales={"paper": _SCALES["paper"], "mini": _LORA}, columns=(*_PROBED, *_BENT),
            rows=(Row(name="SimCLR, ViT at scale mini", preset="geometry_simclr", paper=table_5),),
            claims=_less_in_z(("SimCLR, ViT at scale mini",), "Table 5"),
        ),
    ]  # fmt: skip


def _depth() -> Study:
    paper = {1: (0.475, 0.474, 1.89), 2: (0.528, 0.397, 2.61), 3: (0.524, 0.356, 3.29)}
    names = {depth: f"depth {depth}" for depth in paper}
    rows = tuple(
        Row(name=names[depth], preset=f"geometry_depth_{depth}", x=depth,
            paper={"CIFAR-10": {_PROBED[0].name: round(100 * h, 1), _PROBED[1].name: round(100 * z, 1),
                                _APART[1].name: apart}})
        for depth, (h, z, apart) in paper.items()
    )  # fmt: skip
    every = tuple(names.values())
    return Study(
        name="geometry.depth", title="What changes with the depth of the head?",
        source="Depth ablation; arrays of the official code.", data=_CIFAR_10, scales=_SCALES, rows=rows, axis="layers",
        columns=(*_PROBED[:2], *_APART, _VARIATION, _CONDITION, _COMPRESSION[1]),
        claims=(
            Claim(text="The deeper the head, the less a linear probe reads of rotation in z, on average",
                  source="Depth ablation",
                  tests=(Trend(Cells(_PROBED[1].name, every), rises=False),)),
            Claim(text="The deeper, the further apart lie classes against orbits in z, on average",
                  source="Depth ablation",
                  tests=(Trend(Cells(_APART[1].name, every)),)),
            Claim(text="The deeper, the more the metric varies from image to image, on average",
                  source="Abstract: depth dictates the capacity to adapt local metrics",
                  tests=(Trend(Cells(_VARIATION.name, every)),)),
        ),
    )  # fmt: skip


def _collapse_studies() -> list[Study]:
    std = Column(name="std of z", measure="std", layer="z", digits=4, log=True)
    reported = {"linear": 1.9e-3, "relu": 5e-5, "gelu": 2.0e-3, "silu": 1.7e-3, "relu_bn": 0.0088, "silu_bn": 0.0126}
    titles = {"linear": "linear", "relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "relu_bn": "ReLU, BN",
              "silu_bn": "SiLU, BN"}  # fmt: skip
    rows = tuple(
        Row(name=title, preset=f"geometry_collapse_{key}", paper={"CIFAR-10": {std.name: reported[key]}}, start=0.1)
        for key, title in titles.items()
    )  # fmt: skip
    smooth = ("SiLU", "GELU")
    followed = [
        Column(name="ρ of std and condition along training", measure="along", digits=2,
               options={"of": "std_z", "what": "spearman", "with": "condition_number_z"}),
        Column(name="steps with λ_min < 0", measure="along", unit="%",
               options={"of": "lambda_min", "what": "negative", "error": "lambda_min_error"}),
    ]  # fmt: skip
    spearman = {"normal_silu": (0.339, 69.0), "collapsed_silu": (0.609, 72.0), "collapsed_relu": (0.669, 1.0)}
    shown = {"normal_silu": "SiLU", "collapsed_silu": "SiLU, small weights", "collapsed_relu": "ReLU, small weights"}
    hessian = tuple(
        Row(name=shown[key], preset=f"geometry_hessian_{key}", start=0.1 if "collapsed" in key else 1.0,
            paper={"CIFAR-10": {followed[0].name: rho, followed[1].name: negative}})
        for key, (rho, negative) in spearman.items()
    )  # fmt: skip
    return [
        Study(
            name="geometry.collapse", title="Which heads escape from collapse?",
            source="Experiment 1: std of unit z after 50 epochs, three starts; ReLU without BatchNorm below 5e-5.",
            data=_CIFAR_10, scales=_SCALES, rows=rows, columns=(std,),
            claims=(
                Claim(text="Smooth heads escape and ReLU does not: std of z is larger with SiLU and GELU",
                      source="Abstract",
                      tests=(More(Cells(std.name, smooth), Cells(std.name, ("ReLU",))),)),
                Claim(text="With BatchNorm every head escapes: std of z is larger than without", source="Abstract",
                      tests=(More(Cells(std.name, ("ReLU, BN", "SiLU, BN")), Cells(std.name, ("ReLU", "SiLU"))),)),
                Claim(text="The linear head does not escape: its std is below that of smooth heads",
                      source="Abstract, which says so of gradient flow in continuous time; its own numbers do not",
                      tests=(More(Cells(std.name, smooth), Cells(std.name, ("linear",))),)),
            ),
        ),
        Study(
            name="geometry.hessian", title="Is there negative curvature along training, and what goes with it?",
            source="Hessian tracking, 100 epochs; |λ| ≤ 6e-6 there, below its estimator's resolution. Here Lanczos "
            "with an error bound, at 25 steps.", data=_CIFAR_10, scales=_SCALES, rows=hessian, columns=tuple(followed),
            watched=("std", "condition_number", "curvature"), followed={
                "std_z": "std of unit z", "condition_number_z": "condition number of the covariance of z",
                "lambda_min": "least eigenvalue of the head's Hessian",
            },
            claims=(
                Claim(text="Spread and condition number of z rise together", source="Hessian tracking",
                      tests=tuple(More(Cells(followed[0].name, (row.name,)), 0.0) for row in hessian)),
                Claim(text="Negative curvature is seen with SiLU more often than with ReLU", source="Hessian tracking",
                      tests=(More(Cells(followed[1].name, (shown["collapsed_silu"],)),
                                  Cells(followed[1].name, (shown["collapsed_relu"],))),)),
            ),
        ),
    ]  # fmt: skip


def _timescale() -> Study:
    ratio = Column(name="update of the head over that of the backbone", measure="along", log=True,
                   options={"of": "timescale_ratio", "what": "median"})  # fmt: skip
    norms = {
        name: f"geometry_collapse_{key}"
        for name, key in (("ReLU", "relu"), ("SiLU", "silu"), ("ReLU, BN", "relu_bn"), ("SiLU, BN", "silu_bn"))
    }
    without, with_norm = tuple(norms)[:2], tuple(norms)[2:]
    return Study(
        name="geometry.table3", title="Does the head move faster than the backbone?",
        source="Table 3, recomputed from arrays of the official code: 31 to 653 without BatchNorm, 0.41 to 2.7 with.",
        data=_CIFAR_10, scales=_SCALES, columns=(ratio,), watched=("update_ratio",),
        rows=tuple(Row(name=name, preset=preset, start=0.1) for name, preset in norms.items()),
        claims=(
            Claim(text="Without BatchNorm the head moves faster than the backbone", source="Table 3",
                  tests=(More(Cells(ratio.name, without), 1.0),)),
            Claim(text="BatchNorm brings the two closer", source="Table 3",
                  tests=(More(Cells(ratio.name, without), Cells(ratio.name, with_norm)),)),
        ),
    )  # fmt: skip


_OBJECTIVES = {"NT-Xent": "nt_xent", "VICReg": "vicreg", "Barlow Twins": "barlow_twins"}


def _whitening(alone: bool = False) -> Study:
    """Return the study of linear heads that learn with a backbone, or `alone` on a pretrained one."""
    score = Column(name="isotropy of the loss in h", measure="whitening", digits=3)
    rows = tuple(
        Row(name=f"{name}{'' if trained else ', untrained'}", preset=f"geometry_linear_{key}", trained=trained)
        for name, key in _OBJECTIVES.items() for trained in (True, False)
    )  # fmt: skip
    mini = _LORA.but(trainable="head", lora_rank=0, note="vit_nano, pretrained and frozen; 10,000 images, 2 epochs of "
                     "batch 128; a head of a quarter of the width.")  # fmt: skip
    return Study(
        name=f"geometry.whitening{'_alone' if alone else ''}",
        title="… if only the head learns, on a pretrained backbone?" if alone else "Do linear heads whiten the loss?",
        source="Theorem 3.1 and section 3; no numbers. Isotropy of the effective Hessian of single rows, 1/r to 1. The "
        + ("backbone is frozen: what changes is of the head." if alone else
           "backbone is trained with the head, so that both have a part in it."),
        data=_CIFAR_10, scales=_on_pretrained(mini) if alone else _SCALES, rows=rows, columns=(score,),
        measured=(KNN_H, RANK_H, RANK_Z),
        claims=tuple(
            Claim(text=f"Training a linear head on {name} makes the loss more isotropic in h", source="Theorem 3.1",
                  tests=(More(Cells(score.name, (name,)), Cells(score.name, (f"{name}, untrained",))),))
            for name in _OBJECTIVES
        ),
    )  # fmt: skip


def _tradeoff() -> Study:
    heads = {
        "one layer": {"depth": 1}, "two layers": {"depth": 2}, "three layers": {"depth": 3},
        "no BN": {"depth": 2, **_NO_NORM},
    }  # fmt: skip
    rows = tuple(
        Row(name=f"{name}, {title}", preset=f"geometry_mlp_{key}", changes={"head_options": options})
        for name, key in _OBJECTIVES.items() for title, options in heads.items()
    )  # fmt: skip
    every = tuple(row.name for row in rows)
    return Study(
        name="geometry.tradeoff", title="Does degeneracy of the metric along rotations say what z has lost of them?",
        source="Section 5, theorem 5.3; no numbers. Twelve heads on three objectives; ours.",
        data=_CIFAR_10, scales=_SCALES, rows=rows, columns=(_DEGENERACY, _GAP, *_PROBED[:2], KNN_H),
        measured=(KNN_Z, RANK_H, RANK_Z),
        claims=(
            Claim(text="The more degenerate the metric along rotations, the more of them h has and z has not",
                  source="Section 5",
                  tests=(Agree(Cells(_DEGENERACY.name), _GAP.name, sign=-1),)),
            Claim(text="A linear probe reads rotation better from h than from z, over all heads", source="Abstract",
                  tests=(More(Cells(_PROBED[0].name, every), Cells(_PROBED[1].name, every)),)),
        ),
    )  # fmt: skip


def _foundation() -> Study:
    heads = {"DINO": "dino_cifar", "VICReg": "vicreg_cifar", "Barlow Twins": "barlow_twins_cifar"}
    gain = Column(name="compression", measure="orbits", options={"of": "compression"}, digits=2, log=True)
    return Study(
        name="geometry.checkpoints",
        title="Do heads of DINO contract orbits, and those of VICReg and Barlow Twins not?",
        source="Public checkpoints, 50 images of CIFAR-10; alignment gain +.04 to +.46 for DINO, −.04 to −.40 for "
        "the others. The checkpoints' heads are read by hfproj.convert; here such heads are trained.",
        data=_CIFAR_10, scales=_on_pretrained(_LORA),
        rows=tuple(Row(name=name, preset=preset) for name, preset in heads.items()), columns=(gain, *_BENT),
        claims=(
            Claim(text="DINO's head contracts orbits of rotation", source="Foundation models",
                  tests=(More(Cells("compression", ("DINO",)), 1.0),)),
            Claim(text="DINO's contracts more than the others", source="Foundation models",
                  tests=(More(Cells("compression", ("DINO",)), Cells("compression", ("VICReg", "Barlow Twins"))),)),
        ),
    )  # fmt: skip


def studies() -> list[Study]:
    """Return tables 1 and 5, depth, collapse, the Hessian, whitening, the trade-off and foundation models."""
    whitening = [_whitening(alone=alone) for alone in (False, True)]
    return [*_tables(), _timescale(), _depth(), *_collapse_studies(), *whitening, _tradeoff(), _foundation()]
