"""Paper 4: the projector as an information bottleneck.

References:
    Ouyang, Hu, Zhang, Wang, Wang 2025, "Projection Head is Secretly an Information Bottleneck", arXiv 2503.00507;
    PKU-ML/Projector_Theory (5c2e7d1), kaotty/Projector-Theory (5928007).
"""

from dataclasses import replace
from typing import Any

from hfproj.diagnostics import matrix_entropy, matrix_mutual_information
from hfproj.features.views import FixedViews
from hfproj.objectives.info_nce import info_nce_loss
from hfproj.presets.settings import (
    BYOL_VIEWS,
    BYOL_VIEWS_NOTE,
    CIFAR_RESNET_18,
    RESNET_18,
    SOLO_ASYMMETRIC_NOTE,
    SOLO_ASYMMETRIC_VIEWS,
    SOLO_LARS,
    SOLO_VIEWS,
    Preset,
    training,
)  # fmt: skip
from hfproj.reproduction import Agree, Cells, Claim, Column, More, Row, Study, Trend
from hfproj.reproduction.measures import Trained, register_measure
from hfproj.reproduction.watches import register_watch
from hfproj.studies.papers._reductions import CIFAR, FROM_SCRATCH, LINEAR_H, LINEAR_Z, RANK_H, RANK_Z, as_published
from hfproj.training.callbacks.watching import ProbeWatch

_IMAGES = 512  # test images that matrices of all pairs are made of

_BASES = {
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


PRESETS: dict[str, Preset] = {}
for _name, _base in _BASES.items():
    PRESETS |= _bottlenecks(_name, replace(_base, backbone=RESNET_18 if "imagenet" in _name else CIFAR_RESNET_18))


# Its tables: what each bottleneck gains; its figure 4: how strong they may be; the bounds of its theorems.

_METHODS = {"SimCLR": "bottleneck_simclr", "Barlow Twins": "bottleneck_barlow_twins"}
_BOUNDS = (
    Column(name="I(h; z)", measure="mutual_information", digits=2),
    Column(name="lower bound", measure="lower_bound", digits=2),
    Column(name="upper bound", measure="upper_bound", digits=2),
)
_COLUMNS = (LINEAR_H, *_BOUNDS)
_ALONG = tuple(
    Column(name=f"ρ of {bound} and accuracy along training", measure="along", digits=2,
           options={"of": bound.replace(" ", "_"), "what": "spearman", "with": "online_train_h"})
    for bound in ("lower bound", "upper bound")
)  # fmt: skip
_MEASURED = (LINEAR_Z, RANK_H, RANK_Z, *_ALONG)
_FOLLOWED = {
    "mutual_information": "I(h; z) (nats)", "lower_bound": "lower bound (nats)", "upper_bound": "upper bound (nats)",
}  # fmt: skip
_SCALES = {
    "paper": as_published(3600.0, "Left open by the paper: λ, 0.1 here; m = 32 d and top_k = m/100 of the sparse "
    "projector."),
    "mini": FROM_SCRATCH,
}  # fmt: skip
_ONE = {"CIFAR-10": CIFAR["CIFAR-10"]}
_PLAIN = "SimCLR"


def _common(**study: Any) -> Study:
    columns = study.get("columns", _COLUMNS)
    measured = tuple(column for column in (*_COLUMNS, *_MEASURED) if column not in columns)
    common = {"data": CIFAR, "scales": _SCALES, "watched": ("bounds", "online"), **study}
    return Study(**{**common, "columns": columns, "measured": measured})


def _gain(with_it: str, without: str, text: str, source: str, *data: str) -> Claim:
    better, worse = (Cells("linear of h", (name,), data) for name in (with_it, without))
    return Claim(text=text, source=source, tests=(More(better, worse),))


def _sweep(
    kind: str, title: str, figure: str, axis: str, points: dict[float | int, dict[str, Any]], none: float | int
) -> Study:
    """Return a sweep of one strength on SimCLR and CIFAR-10, with the plain projector at one end."""
    rows = [Row(name="SimCLR", preset="bottleneck_simclr", x=none)]
    for x, changes in points.items():
        rows.append(Row(name=f"{axis} {x:g}", preset=f"bottleneck_simclr_{kind}", changes=changes, x=x))
    inner = tuple(row.name for row in rows[1:-1])
    return _common(
        name=f"bottleneck.figure{figure}", title=title, source=f"Figure {figure}: curves, no numbers.", data=_ONE,
        rows=tuple(rows), axis=axis, axis_scale="symlog", followed=_FOLLOWED,
        claims=(
            Claim(
                text="Strengths in between are better than none and than the strongest", source=f"Figure {figure}",
                tests=tuple(More(Cells("linear of h", inner), Cells("linear of h", (end.name,)))
                            for end in (rows[0], rows[-1])),
            ),
            Claim(
                text="The stronger, the less h and z share, on average", source="Section 4", ours=True,
                tests=(Trend(Cells("I(h; z)", tuple(row.name for row in rows)), rises=False),),
            ),
        ),
    )  # fmt: skip


def studies() -> list[Study]:
    """Return tables 1 and 2, figure 4 and the bounds."""
    regularized = {name: f"{name} + regularizer" for name in _METHODS}
    table_1 = [Row(name=name, preset=preset) for name, preset in _METHODS.items()]
    table_1 += [Row(name=regularized[name], preset=f"{preset}_bottleneck") for name, preset in _METHODS.items()]
    table_2 = table_1[:2] + [
        Row(name=f"{name}, {kind}", preset=f"{preset}_{kind}")
        for name, preset in _METHODS.items() for kind in ("discretised", "sparse")
    ]  # fmt: skip
    gains = "Reported gains are of single runs, without error bars."
    figure_4 = [
        _sweep("bottleneck", "How strong may the regularizer be?", "4c", "λ",
               {x: {"regularizers": {"bottleneck": {"weight": x, "alpha": 2.0}}} for x in (0.01, 0.1, 1.0, 10.0)}, 0.0),
        _sweep("discretised", "How few levels may the projector have?", "4d", "levels",
               {x: {"head_options": {"levels": x}} for x in (30, 8, 5, 3, 2)}, 100.0),
        _sweep("sparse", "How few units may the projector have?", "4e", "top_k of 1,000",
               {x: {"head_options": {"width": 4096, "top_k": round(4.096 * x)}} for x in (500, 200, 50, 10, 1)},
               1000.0),
    ]  # fmt: skip
    heads = {row.name: replace(row, paper={}) for study in figure_4 for row in study.rows}
    return [
        _common(
            name="bottleneck.table1", title="What does the training regularizer gain?",
            source="Table 1; of its numbers the gains on CIFAR-10 are known: +0.26 (SimCLR), +0.32 (Barlow Twins). "
            + gains,
            rows=tuple(table_1),
            claims=tuple(
                _gain(regularized[name], name, f"{name}: the regularizer is better than none (reported +{gain} on "
                      "CIFAR-10)", "Table 1") for name, gain in (("SimCLR", 0.26), ("Barlow Twins", 0.32))
            ),
        ),
        _common(
            name="bottleneck.table2", title="What do discretised and sparse projectors gain?",
            source="Table 2; of its numbers the gains of the sparse projector on CIFAR-100 are known: +3.87 (SimCLR), "
            f"+3.99 (Barlow Twins). {gains}",
            rows=tuple(table_2),
            claims=(
                *(_gain(f"{name}, sparse", name,
                        f"{name}: the sparse projector is better (reported +{gain} on CIFAR-100)",
                        "Table 2", "CIFAR-100")
                  for name, gain in (("SimCLR", 3.87), ("Barlow Twins", 3.99))),
                *(_gain(f"{name}, discretised", name, f"{name}: the discretised projector is better", "Table 2")
                  for name in _METHODS),
            ),
        ),
        *figure_4,
        _common(
            name="bottleneck.bounds", title="Do the bounds of the theorems rank heads, and steps, as accuracy does?",
            source="Theorems 3.1 and 3.2, without their terms of R and Y; accuracy along training is that of a linear "
            "probe of h that learns with it. Both questions are ours. Along training both bounds and accuracy drift "
            "with the step: a correlation there is no evidence that a bound tells which of two models is better.",
            data=_ONE, rows=tuple(heads.values()), columns=(*_COLUMNS, *_ALONG),
            claims=(
                *(Claim(text=f"Heads with a higher {bound} have a better h", source="Theorems 3.1 and 3.2", ours=True,
                        tests=(Agree(Cells(bound), "linear of h"),)) for bound in ("lower bound", "upper bound")),
                *(Claim(text=f"Along training the {bound} rises with accuracy", source="Theorems 3.1 and 3.2",
                        ours=True, tests=(More(Cells(column.name), 0.0),))
                  for bound, column in zip(("lower bound", "upper bound"), _ALONG)),
            ),
        ),
    ]  # fmt: skip


class Bounds(ProbeWatch):
    """Records I_2(h; z), ``mutual_information``, and both bounds, of two views of 512 training images."""

    def measure(self) -> dict[str, float]:
        """Return them of the model in its present state."""
        h, z = self.views.features(self.trainer.model, self.trainer.args.device)
        shared = matrix_mutual_information(h[0], z[0], alpha=2.0)
        return {
            "mutual_information": shared, "lower_bound": -info_nce_loss(h, temperature=0.2).item() - shared,
            "upper_bound": matrix_entropy(h[0], alpha=2.0) - shared,
        }  # fmt: skip


@register_watch("bounds")
def _bounds(every: int) -> Bounds:
    return Bounds(every=every, images=_IMAGES)


@register_measure("mutual_information")
def _mutual_information(trained: Trained, column: Column) -> float:
    """I_2(h; z) of 512 test images, in nats."""
    return matrix_mutual_information(*(trained.of("test", layer)[:_IMAGES] for layer in ("h", "z")), alpha=2.0)


@register_measure("lower_bound")
def _lower_bound(trained: Trained, column: Column) -> float:
    """-L_NCE(h) - I(h; z), L_NCE of two views of 512 test images at τ = 0.2: theorem 3.1 without I(R; Y)."""
    options = {**trained.setting.preset.views, "num_views": 2, "seed": 0}
    views = trained.setting.source.views(trained.model, **options)
    h = FixedViews(trained.splits.test, views, images=_IMAGES, batch_size=_IMAGES).features(trained.model, None)[0]
    return -info_nce_loss(h, temperature=0.2).item() - _mutual_information(trained, column)


@register_measure("upper_bound")
def _upper_bound(trained: Trained, column: Column) -> float:
    """S_2(h) - I(h; z): theorem 3.2 without I(Y; z)."""
    return matrix_entropy(trained.of("test")[:_IMAGES], alpha=2.0) - _mutual_information(trained, column)
