"""Paper 2: features are weighted more unequally with every layer, and the fixed reweighting head.

References:
    Xue, Gan, Ni, Joshi, Mirzasoleiman 2024, "Investigating the Benefits of Projection Head for Representation
    Learning", arXiv 2403.11391; jiayini1119/projection-head-experiments (a145e06); settings on CIFAR from the
    reimplementation boboxa2010/ssl-projection-head-study ``experiments.md``.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hfproj.diagnostics import feature_weights, weight_inequality
from hfproj.presets.settings import CIFAR_RESNET_18, SGD, SOLO_VIEWS, Preset, only_crops, training
from hfproj.probes import LinearProbe
from hfproj.probes.group_robust import GroupRobustProbe, group_accuracies
from hfproj.reproduction import Cells, Claim, Column, More, Row, Same, Study
from hfproj.reproduction.measures import Trained, register_measure
from hfproj.shifts.corruptions import CorruptedDataset
from hfproj.studies.papers._reductions import (
    CIFAR,
    FROM_SCRATCH,
    KNN_H,
    KNN_Z,
    LINEAR_H,
    LINEAR_Z,
    RANK_H,
    RANK_Z,
    as_published,
)  # fmt: skip
from hfproj.studies.sources import CoarseToFine, Digits, Mixture

CIFAR_10 = {"CIFAR-10": CIFAR["CIFAR-10"]}
_CORRUPTIONS = ("gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression")

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
    setting.setdefault("backbone", CIFAR_RESNET_18)
    return Preset(line=f"{line}, {title}", source=_OPEN, head=head, head_options=options, **setting)


def _supcon_cifar100(kind: str) -> Preset:
    return _row(
        kind, 1.5, "SupCon on coarse classes of CIFAR-100",
        objective={"name": "supcon", "temperature": 0.5},
        views={"num_views": 1, **SOLO_VIEWS},
        training=training(400.0, 512, 0.1, 1e-6, warmup_epochs=0.0, **SGD),
    )  # fmt: skip


def _supervised_cifar100(kind: str) -> Preset:
    return _row(
        kind, 1.2, "Supervised on coarse classes of CIFAR-100",
        objective={"name": "cross_entropy"},
        predictor={"head": "linear", "out_dim": 20, "bias": True},
        views={"num_views": 1, **SOLO_VIEWS},
        training=training(200.0, 128, 0.1, 5e-4, warmup_epochs=0.0, **SGD),
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
    **{f"reweighting_supervised_{kind}": _supervised_cifar100(kind) for kind in _HEADS},
    **{f"reweighting_simclr_{kind}": _simclr_mnist_on_cifar(kind) for kind in _HEADS},
    "reweighting_supcon_waterbirds": Preset(
        line="SupCon on Waterbirds or CelebA, a pretrained ResNet-50",
        source="jiayini1119/projection-head-experiments (a145e06) pretrain.py, method SCL; arXiv 2403.11391. The "
        "schedule is constant; its crops are ours.",
        objective={"name": "supcon", "temperature": 0.5},
        backbone={"name": "timm/resnet50.tv_in1k"},
        head="mlp",
        head_options={"hidden_dim": 2048, "norm": None},
        out_dim=2048,
        views={"num_views": 1, **only_crops((0.7, 1.0))},
        training=training(100.0, 32, 1e-3, 1e-3, warmup_epochs=0.0, lr_scheduler_type="constant", **SGD),
    ),
}


# Its experiments: known factors, coarse to fine classes, a spurious attribute, corruptions, and the reweighting head.

_KINDS = {"no head": "no_head", "MLP": "mlp", "reweighting": "reweight"}
_LAYERS = {"penultimate block": "layer4.0", "h": "h", "first layer of the head": "head.0", "z": "z"}
_DROPPED = {f"p = {p:g}": Digits("cifar10", drop_probability=p, train_labels=None) for p in (0.0, 0.5, 1.0)}
_SCALES = {
    "paper": as_published(
        3600.0, "Digits are scikit-learn's, in place of MNIST's. Learning rates, epochs and batches of CIFAR are "
        "those of a reimplementation, which says that they are the paper's.",
    ),
    "mini": FROM_SCRATCH.but(
        note=f"{FROM_SCRATCH.note} Digits are scikit-learn's, 28 pixels wide at opacity 0.7.",
    ),
}  # fmt: skip


def _read(label: str, layer: str, measure: str = "linear") -> Column:
    like = {("linear", "h"): LINEAR_H, ("linear", "z"): LINEAR_Z, ("knn", "h"): KNN_H, ("knn", "z"): KNN_Z}
    column = like[measure, layer]
    return replace(column, name=f"{label} from {layer}{', 20-NN' * (measure == 'knn')}", labels=label)


def _gap(text: str, better: str, worse: str, rows: tuple[str, ...], source: str, data: tuple[str, ...] = ()) -> Claim:
    return Claim(text=text, source=source, tests=(More(Cells(better, rows, data), Cells(worse, rows, data)),))


def _digits() -> Study:
    weights = tuple(
        Column(name=f"inequality in {name}", measure="weight_inequality", layer=layer, digits=2, log=True)
        for name, layer in _LAYERS.items()
    )  # fmt: skip
    read = [_read(label, layer) for label in ("digit", "class") for layer in ("h", "z")]
    mlp = ("MLP",)
    return Study(
        name="feature_weighting.digits", title="Which features do views and the head take away, layer by layer?",
        source="Section 5, MNIST on CIFAR-10; no table values are known. Weights of known factors (the ten digits, "
        "the ten classes): ‖E[f φ]‖ of each, and their coefficient of variation.",
        data=_DROPPED, scales=_SCALES, columns=(*read, *weights),
        measured=(_read("digit", "h", "knn"), _read("digit", "z", "knn"), RANK_H, RANK_Z),
        rows=tuple(Row(name=name, preset=f"reweighting_simclr_{kind}") for name, kind in _KINDS.items()),
        claims=(
            Claim(text="Features get more unequal with every layer: from h to the head's first layer, from there to z",
                  source="Abstract, section 3",
                  tests=tuple(More(Cells(f"inequality in {deep}", mlp), Cells(f"inequality in {low}", mlp))
                              for low, deep in (("h", "first layer of the head"), ("first layer of the head", "z")))),
            Claim(text="Inequality grows from h to z", source="Abstract, section 3",
                  tests=(More(Cells("inequality in z", mlp), Cells("inequality in h", mlp)),)),
            _gap("With digits dropped from half of the views h still has the digit that z lost", "digit from h",
                 "digit from z", mlp, "Section 4", ("p = 0.5",)),
            Claim(text="With digits dropped from half of the views h has more of the digit with a head than without",
                  source="Section 4", tests=(More(Cells("digit from h", ("MLP", "reweighting"), ("p = 0.5",)),
                                                  Cells("digit from h", ("no head",), ("p = 0.5",))),)),
        ),
    )  # fmt: skip


def _coarse() -> Study:
    rows = [
        Row(name=f"{name}, {title}", preset=f"reweighting_{training}_{kind}")
        for title, training in (("SupCon", "supcon"), ("supervised", "supervised")) for name, kind in _KINDS.items()
    ]  # fmt: skip
    supcon, supervised = (
        tuple(f"{name}, {title}" for name in ("MLP", "reweighting")) for title in ("SupCon", "supervised")
    )
    none = {"SupCon": ("no head, SupCon",), "supervised": ("no head, supervised",)}
    both = {"SupCon": supcon, "supervised": supervised}
    return Study(
        name="feature_weighting.coarse_to_fine",
        title="Trained on 20 coarse classes, who still tells the 100 fine ones?",
        source="Section 6, CIFAR-100; no table values are known.", data={"CIFAR-100": CoarseToFine()},
        scales={**_SCALES, "mini": FROM_SCRATCH}, rows=tuple(rows),
        columns=tuple(_read(label, layer) for label in ("fine", "coarse") for layer in ("h", "z")),
        measured=(_read("fine", "h", "knn"), _read("fine", "z", "knn"), RANK_H, RANK_Z),
        claims=(
            *(_gap(f"{title}: h tells fine classes better than z", "fine from h", "fine from z",
                   (f"MLP, {title}",), "Section 6") for title in both),
            *(Claim(text=f"{title}: h tells fine classes better with a head than without", source="Section 6",
                    tests=(More(Cells("fine from h", both[title]), Cells("fine from h", none[title])),))
              for title in both),
            Claim(text="The reweighting head is as good as the MLP: within 2 points",
                  source="Section 6, the margin is ours",
                  tests=tuple(Same(Cells("fine from h", (f"reweighting, {title}",)),
                                   Cells("fine from h", (f"MLP, {title}",)), 0.02) for title in both)),
        ),
    )  # fmt: skip


def _spurious() -> Study:
    rows = tuple(
        Row(name=f"{name}, {title}", preset=f"reweighting_{training}_{kind}",
            changes={"predictor": {"head": "linear", "out_dim": 2, "bias": True}} if training == "supervised" else {})
        for title, training in (("SupCon", "supcon"), ("supervised", "supervised")) for name, kind in _KINDS.items()
    )  # fmt: skip
    worst = {layer: Column(name=f"worst group, {layer}", measure="worst_group", layer=layer, labels="class", unit="%",
                           options={"groups": "group"}) for layer in ("h", "z")}  # fmt: skip
    dfr = {layer: replace(worst[layer], name=f"worst group after DFR, {layer}",
                          options={"groups": "group", "dfr": True}) for layer in ("h", "z")}  # fmt: skip
    heads = tuple(row.name for row in rows if row.name.startswith("MLP"))
    return Study(
        name="feature_weighting.spurious",
        title="A digit goes with the class in 95 % of the images: who still sees the class?",
        source="Section 6 and appendix: UrbanCars, Waterbirds; no table values are known. Here two classes of CIFAR-10 "
        "with a digit on each image.",
        data={"CIFAR-10": Mixture("cifar10")},
        scales={**_SCALES, "mini": FROM_SCRATCH.but(images=None, test_images=None)},
        rows=rows, columns=(worst["h"], worst["z"], dfr["h"], dfr["z"]),
        measured=(_read("class", "h"), _read("class", "z")),
        claims=(
            _gap("Worst-group accuracy is better from h than from z", "worst group, h", "worst group, z", heads,
                 "Section 6"),
            _gap("… and with a last layer retrained on balanced groups", "worst group after DFR, h",
                 "worst group after DFR, z", heads, "Section 6"),
        ),
    )  # fmt: skip


def _corruptions() -> Study:
    columns = tuple(
        Column(name=f"{kind} from {layer}", measure="corrupted", layer=layer, unit="%",
               options={"corruptions": () if kind == "clean" else _CORRUPTIONS, "severity": 3})
        for kind in ("clean", "corrupted") for layer in ("h", "z")
    )  # fmt: skip
    return Study(
        name="feature_weighting.corruptions", title="Is h more robust to corruptions of test images than z?",
        source="Section 6 and appendix: shifted versions of ImageNet; of its numbers those of a notebook are known "
        "(ImageNet-R .551, ImageNet-A .372). Here five corruptions of CIFAR-10 at severity 3.",
        data=CIFAR_10, scales={**_SCALES, "mini": FROM_SCRATCH},
        rows=tuple(Row(name=name, preset=f"reweighting_simclr_{kind}") for name, kind in _KINDS.items()),
        columns=columns,
        claims=(_gap("Corrupted images are classified better from h than from z", "corrupted from h",
                     "corrupted from z", ("MLP",), "Section 6"),),
    )  # fmt: skip


def _reweighting() -> Study:
    kappas = (1.0, 1.02, 1.05, 1.2, 1.5)
    rows = tuple(
        Row(name=f"κ = {kappa:g}", preset="reweighting_simclr_reweight",
            changes={"head_options": {"kappa": kappa}}, x=kappa)
        for kappa in kappas
    )  # fmt: skip
    reweighted = tuple(row.name for row in rows[1:])
    return Study(
        name="feature_weighting.reweighting", title="How strong may the fixed reweighting head be?",
        source="Section 7: κ of each experiment; no table values are known.", scales=_SCALES, axis="κ",
        data={"p = 0.5": _DROPPED["p = 0.5"]}, rows=rows,
        columns=(_read("class", "h"), _read("digit", "h"), RANK_H), measured=(_read("class", "h", "knn"),),
        claims=(
            Claim(text="A reweighting head keeps more of the dropped digit in h than none (κ = 1)", source="Section 7",
                  tests=(More(Cells("digit from h", reweighted), Cells("digit from h", ("κ = 1",))),)),
        ),
    )  # fmt: skip


def studies() -> list[Study]:
    """Return known factors, coarse to fine, spurious mixtures, corruptions and the reweighting head."""
    return [_digits(), _coarse(), _spurious(), _corruptions(), _reweighting()]


@register_measure("weight_inequality")
def _weight_inequality(trained: Trained, column: Column) -> float:
    """Coefficient of variation of the weights of known factors: one for each value of each label of the data."""
    labels = [trained.labels(name, "test") for name in trained.splits.labels]
    phi = torch.cat([nn.functional.one_hot(label) for label in labels], dim=1).double()
    phi = phi[:, phi.var(0) > 0]
    return weight_inequality(feature_weights(trained.of("test", column.layer), phi)).variation


@register_measure("worst_group", needs=("groups",), may=("dfr",))
def _worst_group(trained: Trained, column: Column) -> float:
    """Accuracy on the worst group of test images, of a linear probe or of one retrained on balanced groups (DFR)."""
    train, test = (trained.of(split, column.layer) for split in ("train", "test"))
    (y, g), (truth, groups) = (
        [trained.labels(name, split) for name in (column.labels, column.options["groups"])]
        for split in ("train", "test")
    )
    if column.options.get("dfr"):
        return GroupRobustProbe().fit(train, y, groups=g).score(test, truth, groups=groups)
    probe = LinearProbe(l2=1e-3).fit(train, y)
    probe.score(test, truth)
    return min(group_accuracies(probe.correct_, groups).values())


@register_measure("corrupted", needs=("corruptions", "severity"))
def _corrupted(trained: Trained, column: Column) -> float:
    """Mean accuracy over corruptions of the test images (none: clean), of a linear probe fitted on clean ones."""
    probe = LinearProbe(l2=1e-3).fit(trained.of("train", column.layer), trained.labels("label", "train"))
    truth, scores = trained.labels("label", "test"), []
    for name in column.options["corruptions"] or [None]:
        key = "test" if name is None else f"{name} test"
        if key not in trained.features and name is not None:
            other = CorruptedDataset(trained.splits.test, name, severity=column.options["severity"])
            trained.features[key] = trained.read(other)
        f = trained.of("test", column.layer) if name is None else trained.features[key].by_name()[column.layer]
        scores.append(probe.score(f, truth))
    return sum(scores) / len(scores)
