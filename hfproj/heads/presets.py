"""Heads of the papers, as names with the options of :class:`hfproj.heads.mlp.MLPHead` that make them.

``create_head("simclr", in_dim=2048)`` is the head of the source named beside it; every option can be given anew
(``depth=2`` makes MoCo v3's head for a ResNet). Where a source says "the width of the backbone", ``hidden_dim`` or
``out_dim`` is None. Predictors (from z to p) are heads as well.

References:
    google-research/simclr ``model_util.py``; facebookresearch/{moco, moco-v3} ``moco/builder.py``, {simsiam}
    ``simsiam/builder.py``, {barlowtwins, vicreg} ``main*.py``, {swav} ``src/resnet50.py``, {dino}
    ``vision_transformer.py``, {directclr} ``directclr/main.py``; HobbitLong/SupContrast ``networks/resnet_big.py``;
    princeton-nlp/SimCSE ``simcse/models.py``; Sherrylone/Zero-CL ``cifar/main.py``; rbalestr-lab/lejepa ``MINIMAL.md``;
    vturrisi/solo-learn (9187ea3) ``solo/methods``; farischaudhry/projection-head-geometry (117231d) ``experiments.py``,
    ``head_depth_ablations.py``.

Deviations:
    BatchNorm has torch's momentum 0.1 and ε 1e-5, and linear layers torch's initialisation, except for DINO's; Google's
    SimCLR draws its weights with standard deviation 0.01, which its BatchNorm undoes.
    SimSiam's last linear layer has a frozen bias in the official code. The BatchNorm behind it cancels it, so there is
    none here: PEFT makes all parameters of an adapter trainable.
    No preset normalises the rows of z: objectives and prototypes do that themselves.
    DINO's head is the MLP up to the bottleneck; normalisation and weight-normalised last layer are the adapter's
    prototypes, whose logits are cosines.
"""

from typing import Any

_UNBIASED = {"bias": False, "last_bias": False}
_BIASED = {"bias": True, "last_bias": True}  # also before a BatchNorm, which cancels it: as in the source
# google-research/simclr: BatchNorm (over both views) in every layer, the last one without a shift
_SIMCLR = {
    "hidden_dim": None, "out_dim": 128, **_UNBIASED, "last_norm": "batch", "last_affine": "scale",
    "batch_statistics": "joint",
}  # fmt: skip


def _mlp(line: str, **options: Any) -> tuple[str, str, dict[str, Any]]:
    return "hfproj.heads.mlp:MLPHead", line, options


PRESETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "simclr": _mlp(
        "SimCLR (Google): d-d-128, BatchNorm over both views in every layer, the last without shift", **_SIMCLR
    ),
    "simclr_v2": _mlp("SimCLR v2 (Google): d-d-d-128, otherwise as 'simclr'", depth=3, **_SIMCLR),
    # solo-learn, methods/simclr.py with the widths of its CIFAR configs
    "simclr_solo": _mlp(
        "SimCLR (solo-learn): d-2048-256, no norm", hidden_dim=2048, out_dim=256, norm=None, **_BIASED
    ),
    # facebookresearch/directclr, mode "simclr"
    "directclr_simclr": _mlp(
        "SimCLR in DirectCLR's code: d-2048-128, BatchNorm in both layers",
        hidden_dim=2048, out_dim=128, **_UNBIASED, last_norm="batch",
    ),
    # HobbitLong/SupContrast, head "mlp"
    "supcon": _mlp("SupCon: d-d-128, no norm", hidden_dim=None, out_dim=128, norm=None, **_BIASED),
    # facebookresearch/moco, --mlp
    "moco": _mlp("MoCo v2: d-d-128, no norm", hidden_dim=None, out_dim=128, norm=None, **_BIASED),
    # facebookresearch/moco-v3, _build_mlp; for a ResNet: depth=2, and a predictor with last_norm=None
    "moco_v3": _mlp(
        "MoCo v3 for ViTs: d-4096-4096-256, last BatchNorm without parameters; ResNet: depth=2",
        depth=3, hidden_dim=4096, out_dim=256, **_UNBIASED, last_norm="batch", last_affine=False,
    ),
    "moco_v3_predictor": _mlp(
        "predictor of MoCo v3 for ViTs: k-4096-k, last BatchNorm without parameters; ResNet: last_norm=None",
        hidden_dim=4096, out_dim=None, **_UNBIASED, last_norm="batch", last_affine=False,
    ),
    # solo-learn, methods/byol.py
    "byol": _mlp("BYOL: d-4096-256", hidden_dim=4096, out_dim=256, **_BIASED),
    "byol_predictor": _mlp("predictor of BYOL: k-4096-k", hidden_dim=4096, out_dim=None, **_BIASED),
    # facebookresearch/simsiam
    "simsiam": _mlp(
        "SimSiam: d-d-d-2048, last BatchNorm without parameters",
        depth=3, hidden_dim=None, out_dim=2048, **_UNBIASED, last_norm="batch", last_affine=False,
    ),
    "simsiam_predictor": _mlp(
        "predictor of SimSiam: k-512-k", hidden_dim=512, out_dim=None, bias=False, last_bias=True
    ),
    # solo-learn, methods/nnclr.py
    "nnclr": _mlp(
        "NNCLR: d-2048-2048-256, BatchNorm in every layer",
        depth=3, hidden_dim=2048, out_dim=256, **_BIASED, last_norm="batch",
    ),
    "nnclr_predictor": _mlp("predictor of NNCLR: k-4096-k", hidden_dim=4096, out_dim=None, **_BIASED),
    # facebookresearch/barlowtwins, --projector 8192-8192-8192
    "barlow_twins": _mlp("Barlow Twins: d-8192-8192-8192", depth=3, hidden_dim=8192, out_dim=8192, **_UNBIASED),
    # facebookresearch/vicreg, --mlp 8192-8192-8192
    "vicreg": _mlp("VICReg: d-8192-8192-8192", depth=3, hidden_dim=8192, out_dim=8192, bias=True, last_bias=False),
    # Sherrylone/Zero-CL, --projector 2048-2048-2048
    "zero_cl": _mlp("Zero-CL on CIFAR: d-2048-2048-2048", depth=3, hidden_dim=2048, out_dim=2048, **_UNBIASED),
    # solo-learn, methods/wmse.py with the widths of its CIFAR config
    "wmse": _mlp("W-MSE: d-1024-64", hidden_dim=1024, out_dim=64, **_BIASED),
    # facebookresearch/swav, --hidden_mlp 2048 --feat_dim 128
    "swav": _mlp("SwAV: d-2048-128, before prototypes", hidden_dim=2048, out_dim=128, **_BIASED),
    # facebookresearch/dino, DINOHead
    "dino": _mlp(
        "DINO: d-2048-2048-256 with GELU, the bottleneck before prototypes",
        depth=3, hidden_dim=2048, out_dim=256, norm=None, activation="gelu", **_BIASED, init="trunc_normal",
    ),
    # rbalestr-lab/lejepa: torchvision's MLP(512, [2048, 2048, 16], norm_layer=BatchNorm1d)
    "lejepa": _mlp("LeJEPA: d-2048-2048-16", depth=3, hidden_dim=2048, out_dim=16, **_BIASED),
    # princeton-nlp/SimCSE, MLPLayer
    "simcse": _mlp(
        "SimCSE: one linear layer d-d, then Tanh",
        depth=1, out_dim=None, norm=None, last_bias=True, last_activation="tanh",
    ),
    # farischaudhry/projection-head-geometry, ProjectionHead: activation relu, gelu, silu, or "identity" without norms
    # for its linear head; use_bn=False: norm=None, last_norm=None; depth 1 to 3 for its depth ablation
    "geometry_mlp": _mlp(
        "The Geometry of Projection Heads: d-2048-2048, BatchNorm in both layers; choose activation, norms and depth",
        hidden_dim=2048, out_dim=2048, **_UNBIASED, last_norm="batch",
    ),
}  # fmt: skip
