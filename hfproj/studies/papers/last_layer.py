"""Paper 3: what happens inside the projector, and weight regularization in the last layer.

References:
    OpenReview PD532fs8b1, first version, "Can Weight Regularization in the Last Layer Reduce Dimensional Collapse?"
"""

from dataclasses import replace
from typing import Any

from hfproj.presets.settings import CIFAR_RESNET_18, NO_CLIPPING, SGD, Preset
from hfproj.reproduction import Cells, Claim, Column, More, Row, Same, Study, Trend, ordered
from hfproj.studies.papers._reductions import CIFAR, FROM_SCRATCH, as_published

_SOURCE = (
    "OpenReview PD532fs8b1, first version, tables 1 and 2: ResNet-18 on CIFAR, batch 128, SGD, temperature 0.2. Epochs "
    "and learning rate are not published: give them (num_train_epochs=…, learning_rate=…). Momentum 0.9, no weight "
    "decay and SimCLR's augmentation are ours, and so are negatives from both views (info_nce has the other view's "
    "only)."
)
_TRAINING: dict[str, Any] = {
    **NO_CLIPPING, **SGD, "weight_decay": 0.0, "per_device_train_batch_size": 128,
}  # fmt: skip
_HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "simclr": ("SimCLR", "directclr_simclr", {"hidden_dim": None}),  # lightly's: d-d-128 with BatchNorm
    "no_projector": ("without projector", "identity", {}),
    "directclr": ("DirectCLR", "subvector", {"d0": 480 / 512}),
    "constant_subvector": ("constant subvector", "constant_subvector", {"d0": 480 / 512, "constant": 0.0}),
}
_HEAD_NOTES = {
    "simclr": "Its projector is lightly's, which it says it was written with: d-d-128, BatchNorm in both layers.",
    "no_projector": "",
    "directclr": "Its d0 is not published; 480 of 512 is that of the constant subvector.",
    "constant_subvector": "d0 = 480 of 512, c = 0.",
}
_ADDED: dict[str, tuple[str, dict[str, Any], str]] = {
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


def _row(head: str, added: str) -> Preset:
    title, name, options = _HEADS[head]
    suffix, regularizers, note = _ADDED[added]
    return Preset(
        line=f"{title}{suffix}, CIFAR",
        source=" ".join(filter(None, (_SOURCE, _HEAD_NOTES[head], note))),
        objective={"name": "nt_xent", "temperature": 0.2},
        backbone=CIFAR_RESNET_18,
        head=name,
        head_options=options,
        regularizers=regularizers,
        training=_TRAINING,
    )


PRESETS = {f"inside_projector_{head}{added}": _row(head, added) for head in _HEADS for added in _ADDED}
# Its table 1: how many entries are kept, and which constant the others have.
PRESETS |= {
    f"inside_projector_constant_{d0}_{name}": Preset(
        line=f"Constant subvector, d0 = {d0} of 512, c = {c}, CIFAR",
        source=_SOURCE,
        objective={"name": "nt_xent", "temperature": 0.2},
        backbone=CIFAR_RESNET_18,
        head="constant_subvector",
        head_options={"d0": d0 / 512, "constant": constant},
        training=_TRAINING,
    )
    for d0 in (200, 400, 480)
    for name, c, constant in (("zero", "0", 0.0), ("inverse_sqrt", "1/√512", "inverse_sqrt"), ("one", "1", 1.0))
}
PRESETS["werank_last_layer"] = _row("simclr", "").but(
    "SimCLR + WERank's term on the last layer only, CIFAR",
    "The squared ‖WWᵀ − I‖² of the projector's last layer, coefficient 1: eq. 11, in the options of WERank; the same "
    "as inside_projector_simclr_last_layer.",
    regularizers={"werank": {"weight": 1.0, "layers": "last", "squared": True, "side": "WWt"}},
)
PRESETS["inside_projector_no_projector_barlow_twins"] = _row("no_projector", "").but(
    "Barlow Twins without projector, CIFAR",
    "Of its figure 1b; scale and λ are solo-learn's.",
    objective={"name": "barlow_twins", "scale": 0.1},
)

# What its tables and figures show: the same 200-NN and spectra of two sets of runs.

_KNN = Column(name="200-NN", measure="knn", layer="evaluated", options={"k": 200, "temperature": 0.1}, unit="%")
_LAYERS = {
    "penultimate block": "layer4.0", "h": "h", "first layer of the head": "head.0", "z": "z",
}  # fmt: skip
_RANKS = tuple(
    Column(name=f"rank of {name}", measure="covariance_rank", layer=layer, log=True) for name, layer in _LAYERS.items()
)
_OTHERS = (
    Column(name="correlation in h", measure="offdiag_energy", layer="h", digits=3),
    Column(name="correlation in z", measure="offdiag_energy", layer="z", digits=3),
    Column(name="rows of collapsed dimensions of h", measure="collapsed_row_norms", layer="h", digits=2, log=True),
    Column(name="rows of collapsed dimensions of z", measure="collapsed_row_norms", layer="z", digits=2, log=True),
    Column(name="200-NN of h", measure="knn", options=_KNN.options, unit="%"),
    Column(name="200-NN of z", measure="knn", layer="z", options=_KNN.options, unit="%"),
)
_MEASURED = (*_RANKS, *_OTHERS)
_SPECTRA = tuple(_LAYERS.values())

_SCALES = {
    "paper": as_published(
        3600.0, "Left open by the paper, chosen here: 200 epochs, learning rate 0.06, warm-up of 5 %, cosine.",
        num_train_epochs=200.0, learning_rate=0.06, warmup_steps=0.05,
    ),
    "mini": FROM_SCRATCH,
}  # fmt: skip

_TABLE_2 = {  # CIFAR-10, CIFAR-100
    "simclr": (86.1, 56.3), "simclr_werank": (86.5, 56.8), "simclr_last_layer": (86.3, 57.5),
    "no_projector": (84.5, 52.8), "no_projector_werank": (84.9, 52.6), "no_projector_last_layer": (85.1, 53.1),
    "directclr": (85.2, 53.2), "directclr_werank": (85.4, 53.0), "directclr_last_layer": (85.5, 53.2),
    "constant_subvector": (84.7, 52.5), "constant_subvector_werank": (85.0, 53.0),
    "constant_subvector_last_layer": (85.5, 53.1),
}  # fmt: skip


def _name(key: str) -> str:
    """Return how the table calls a row: "SimCLR + WERank"."""
    head = next(head for head in _HEADS if key.startswith(head))
    title = _HEADS[head][0].removesuffix(", CIFAR")
    title = title[0].upper() + title[1:]
    return {"": title, "_werank": f"{title} + WERank", "_last_layer": f"{title} + last layer"}[key.removeprefix(head)]


def _percent(column: str, both: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {data: {column: number} for data, number in zip(CIFAR, both, strict=True)}


_ROWS_2 = {
    key: Row(
        name=_name(key),
        preset=f"inside_projector_{key}",
        paper=_percent("200-NN", both),
        evaluated="z" if key.startswith("constant") else "h",
    )
    for key, both in _TABLE_2.items()
}
_PLAIN, _WERANK, _LAST = (tuple(_name(f"{head}{added}") for head in _HEADS) for added in ("", "_werank", "_last_layer"))


def _rows(*keys: str) -> tuple[Row, ...]:
    """Return rows of table 2 without the paper's numbers, for the figures, which show others of the same runs."""
    return tuple(replace(_ROWS_2[key], paper={}) for key in keys)


_C = {"zero": "0", "inverse_sqrt": "1/√512", "one": "1"}
_TABLE_1 = {
    200: {"zero": (83.2, 49.4), "inverse_sqrt": (82.5, 48.6), "one": (78.9, 41.1)},
    400: {"zero": (84.2, 52.2), "inverse_sqrt": (84.0, 50.9), "one": (79.8, 44.3)},
    480: {"zero": (84.7, 52.5), "inverse_sqrt": (84.4, 51.8), "one": (80.9, 45.9)},
}


def _constant(d0: int, c: str) -> str:
    return f"d0 = {d0 / 512:.2f} d, c = {'1/√d' if c == 'inverse_sqrt' else _C[c]}"


def _cells(column: str, *rows: str) -> Cells:
    return Cells(column, rows)


def _common(**study: Any) -> Study:
    columns = {column.name for column in study["columns"]}
    measured = tuple(column for column in (_KNN, *_MEASURED) if column.name not in columns)
    study["claims"] = tuple(claim.on(data) for claim in study["claims"] for data in CIFAR)
    return Study(data=CIFAR, scales=_SCALES, measured=measured, spectra=_SPECTRA, **study)


_SIMCLR, _BARE = _name("simclr"), _name("no_projector")


def _table_1() -> Study:
    return _common(
        name="last_layer.table1", title="Constant subvectors: which d0 and which constant?",
        source="Table 1: 200-NN of the constant vector, which is z; here of h, too.",
        rows=tuple(
            Row(name=_constant(d0, c), preset=f"inside_projector_constant_{d0}_{c}",
                paper=_percent("200-NN", _TABLE_1[d0][c]), evaluated="z")
            for d0 in _TABLE_1 for c in _C
        ),
        columns=(_KNN, Column(name="200-NN of h", measure="knn", options=_KNN.options, unit="%")),
        claims=(
            Claim(text="A larger constant is worse: 0 before 1/√d before 1", source="Table 1 and section 3.4",
                  tests=tuple(More(_cells("200-NN", *(_constant(d0, a) for d0 in _TABLE_1)),
                                   _cells("200-NN", *(_constant(d0, b) for d0 in _TABLE_1)))
                              for a, b in (("zero", "inverse_sqrt"), ("inverse_sqrt", "one")))),
            Claim(text="More trained entries are better: d0 of 0.94 d before 0.78 d before 0.39 d",
                  source="Table 1",
                  tests=tuple(More(_cells("200-NN", *(_constant(a, c) for c in _C)),
                                   _cells("200-NN", *(_constant(b, c) for c in _C)))
                              for a, b in ((480, 400), (400, 200)))),
        ),
    )  # fmt: skip


def _table_2() -> Study:
    return _common(
        name="last_layer.table2", title="Does regularizing the last layer beat regularizing them all?",
        source="Table 2.", rows=tuple(_ROWS_2.values()), columns=(_KNN,),
        claims=(
            Claim(text="With a projector 200-NN is better than without", source="Table 2, rows 1 and 4",
                  tests=(More(_cells("200-NN", _SIMCLR), _cells("200-NN", _BARE)),)),
            Claim(text="The orthogonal last layer is better than none", source="Section 3.6, table 2",
                  tests=(More(_cells("200-NN", *_LAST), _cells("200-NN", *_PLAIN)),)),
            Claim(text="The orthogonal last layer is better than WERank on all layers", source="Abstract, table 2",
                  tests=(More(_cells("200-NN", *_LAST), _cells("200-NN", *_WERANK)),)),
            Claim(text="DirectCLR lies between SimCLR without and with a projector", source="Table 2",
                  tests=ordered("200-NN", _SIMCLR, _name("directclr"), _BARE)),
        ),
    )  # fmt: skip


def _figure_1() -> Study:
    barlow_twins = Row(name="Barlow Twins without projector", preset="inside_projector_no_projector_barlow_twins")
    return _common(
        name="last_layer.figure1", title="How many directions has h with and without a projector?",
        source="Figure 1: covariance spectra of h, ImageNet-100 there; no numbers.",
        rows=(*_rows("simclr", "no_projector", "directclr"), barlow_twins), columns=(_RANKS[1],),
        drawn=("h",),
        claims=(
            Claim(text="h has more directions with a projector than without", source="Figure 1a",
                  tests=(More(_cells("rank of h", _SIMCLR), _cells("rank of h", _BARE)),)),
            Claim(text="DirectCLR's h has more directions than h without a projector", source="Figure 1b",
                  tests=(More(_cells("rank of h", _name("directclr")), _cells("rank of h", _BARE)),)),
            Claim(text="Without a projector h has fewer directions with Barlow Twins than with SimCLR",
                  source="Section 3.4, figure 1b",
                  tests=(More(_cells("rank of h", _BARE), _cells("rank of h", barlow_twins.name)),)),
        ),
    )  # fmt: skip


def _figure_2() -> Study:
    return _common(
        name="last_layer.figure2", title="Does InfoNCE decorrelate z, and not h?",
        source="Figure 2: covariance matrices on CIFAR-100 and ImageNet-100, no numbers; here the share of the energy "
            "off the diagonal. z is a quarter as wide as h.",
        rows=_rows("simclr"), columns=_OTHERS[:2],
        claims=(
            Claim(text="z is less correlated than h", source="Section 3.3, figure 2",
                  tests=(More(Cells("correlation in h"), Cells("correlation in z")),)),
        ),
    )  # fmt: skip


def _figure_3() -> Study:
    return _common(
        name="last_layer.figure3", title="Where in the encoder are directions lost without a projector?",
        source="Figure 3: spectra of the encoder's penultimate and last layer, no numbers.",
        rows=_rows("simclr", "no_projector"), columns=_RANKS[:2],
        drawn=("layer4.0", "h"),
        claims=(
            Claim(text="Without a projector the last layer has fewer directions", source="Section 3.4, figure 3",
                  tests=(More(_cells("rank of h", _SIMCLR), _cells("rank of h", _BARE)),)),
            Claim(text="In the penultimate block nothing changes: less than 10 %",
                  source="Section 3.4, figure 3; the 10 % are ours",
                  tests=(Same(_cells("rank of penultimate block", _SIMCLR),
                              _cells("rank of penultimate block", _BARE), 0.1),)),
        ),
    )  # fmt: skip


def _figure_4() -> Study:
    return _common(
        name="last_layer.figure4", title="Where in the projector are directions lost?",
        source="Figure 4: spectra of the projector's penultimate and last layer, no numbers. z is a quarter as wide as "
            "the layer before, so that part of the claim is given by the widths.",
        rows=_rows("simclr", "simclr_last_layer"), columns=_RANKS[1:],
        drawn=("head.0", "z"),
        claims=(
            Claim(text="The projector's last layer has fewer directions than the one before",
                  source="Section 3.4, figure 4",
                  tests=(More(_cells("rank of first layer of the head", _SIMCLR), _cells("rank of z", _SIMCLR)),)),
        ),
    )  # fmt: skip


def _figure_5() -> Study:
    return _common(
        name="last_layer.figure5", title="How many directions has h if some entries are constant?",
        source="Figure 5: spectra of h for each d0, no numbers.",
        rows=tuple(Row(name=_constant(d0, "zero"), preset=f"inside_projector_constant_{d0}_zero", x=d0 / 512,
                       evaluated="z")
                   for d0 in _TABLE_1),
        columns=(_RANKS[1], _RANKS[3]),
        drawn=("h",),
        claims=(
            Claim(text="h has the more directions, the more entries are trained, on average",
                  source="Section 3.4, figure 5",
                  tests=(Trend(_cells("rank of h", *(_constant(d0, "zero") for d0 in _TABLE_1))),)),
        ),
    )  # fmt: skip


def _figure_6() -> Study:
    return _common(
        name="last_layer.figure6", title="Does an orthogonal last layer keep directions of h?",
        source="Figure 6: spectra of h without a projector, no numbers; and proposition 1.",
        rows=_rows("no_projector", "no_projector_last_layer"),
        columns=(_RANKS[1], _OTHERS[2]),
        drawn=("h",),
        claims=(
            Claim(text="With the orthogonal last layer h has more directions", source="Section 3.7, figure 6",
                  tests=(More(_cells("rank of h", _name("no_projector_last_layer")), _cells("rank of h", _BARE)),)),
            Claim(text="Weights of collapsed dimensions vanish: rows of the tenth of the dimensions with the least "
                  "variance are less than half as long as the others (the raw weights, to whose length the BatchNorm "
                  "behind them makes the loss blind)", source="Proposition 1, the half is ours", ours=True,
                  tests=(More(_cells("rows of collapsed dimensions of h", _BARE), 0.5, less=True),)),
        ),
    )  # fmt: skip


def studies() -> list[Study]:
    """Return tables 1 and 2 and figures 1 to 6."""
    return [
        _table_1(), _table_2(), _figure_1(), _figure_2(), _figure_3(), _figure_4(), _figure_5(), _figure_6(),
    ]  # fmt: skip
