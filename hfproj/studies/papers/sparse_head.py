"""Paper 5: a sparse projection head.

References:
    Song et al. 2023, "Towards the Sparseness of Projection Head in Self-Supervised Learning", arXiv 2307.08913.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from hfproj.presets.published import PUBLISHED
from hfproj.regularizers.sparse_head import sparsity
from hfproj.reproduction import Cells, Claim, Column, More, Row, Scale, Study, Trend
from hfproj.reproduction.measures import Trained, register_measure
from hfproj.reproduction.setting import active_head
from hfproj.studies.papers._reductions import FROM_SCRATCH, KNN_H, LINEAR_H, LINEAR_Z, RANK_H, RANK_Z
from hfproj.studies.sources import Tasks, Transfer

PRESETS = {
    f"sparsehead_{name}": PUBLISHED[name].but(
        f"{PUBLISHED[name].line} + SparseHead",
        "SparseHead: arXiv 2307.08913, from a summary, no code. λ, the grouping (input features) and the layer (the "
        "first) are not published. λ has no scale that carries over (recipes/benchmarks/results/sparsity.json): the "
        "target here, half of the input columns, is ours.",
        regularizers={"sparse_head": {"sparsity": 0.5}},
    )
    for name in ("simclr", "byol", "barlow_twins")
}


# Linear evaluation, few labels, transfer, effective dimensions of the same runs; other penalties; a sequence of tasks.

_METHODS = {"SimCLR": "simclr", "BYOL": "byol", "Barlow Twins": "barlow_twins"}
_SPARSITIES = (0.5, 0.75, 0.9)
_TRANSFER = Transfer("cifar10")
_DATA = {"images": _TRANSFER}
_FEW = tuple(replace(LINEAR_H, name=f"linear of h, {share:.0%} of the labels", share=share) for share in (0.01, 0.1))
_TO = tuple(replace(LINEAR_H, name=f"linear of h, {name}", other=name) for name in _TRANSFER.to)
_REACHED = Column(name="sparsity", measure="head_sparsity", unit="%")
_MEASURED = (LINEAR_H, _REACHED, *_FEW, *_TO, RANK_H, RANK_Z, KNN_H, LINEAR_Z)
_SCALES = {
    "paper": Scale(
        backbone={"name": "timm/resnet50", "pretrained": False}, views={"size": 224},
            data={"images": Transfer("imagenet")},
        seconds=600_000.0, machine="eight H200 (an estimate from the number of operations, not measured)",
        note="ResNet-50 on ImageNet; transfer to the same small sets as at scale mini, since the paper's are not "
        "known. λ, its grouping and its layer are not published: here by target sparsity.",
    ),
    "mini": FROM_SCRATCH.but(presets={preset: f"{preset}_cifar" for preset in _METHODS.values()}),
}  # fmt: skip


def _sparse(share: float, **options: Any) -> dict[str, Any]:
    return {"regularizers": {"sparse_head": {"sparsity": share, **options}}}


def _rows() -> tuple[Row, ...]:
    return tuple(
        Row(name=f"{name}, {share:.0%}" if share else name, preset=preset, x=100 * share, curve=name,
            changes=_sparse(share) if share else {})
        for name, preset in _METHODS.items() for share in (0.0, *_SPARSITIES)
    )  # fmt: skip


def _of(method: str, *, sparse: bool) -> tuple[str, ...]:
    return tuple(f"{method}, {share:.0%}" for share in _SPARSITIES) if sparse else (method,)


def _better(column: str, source: str, reported: dict[str, str]) -> tuple[Claim, ...]:
    return tuple(
        Claim(
            text=f"{method}: {column} is better with a sparse head{reported.get(method, '')}", source=source,
            tests=(More(Cells(column, _of(method, sparse=True)), Cells(column, _of(method, sparse=False))),),
        )
        for method in _METHODS
    )  # fmt: skip


def _common(**study: Any) -> Study:
    shown = {column.name for column in study["columns"]}
    settings = {"data": _DATA, "rows": _rows(), "scales": _SCALES, "axis": "sparsity of the head (%)"}
    return Study(**{**settings, "measured": tuple(c for c in _MEASURED if c.name not in shown), **study})


def _penalties() -> Study:
    plain = _rows()[0]
    others: dict[str, dict[str, Any]] = {
        "rows (units of the first layer)": {"group": "output"}, "single weights (L1)": {"group": "weight"},
        "sparse-group": {"l1": 0.5},
    }  # fmt: skip
    penalties = (
        plain, Row(name="columns (L2,1)", preset="simclr", changes=_sparse(0.5)),
        *(Row(name=name, preset="simclr", changes=_sparse(0.5, **options)) for name, options in others.items()),
    )  # fmt: skip
    return _common(
        name="sparse_head.penalties", title="Does it matter which weights become zero?",
        source="Its limitations and next checks: L1, rows and sparse-group beside L2,1; ours, at 50 %.",
        rows=penalties, columns=(LINEAR_H, RANK_H, RANK_Z, _REACHED), axis="",
        claims=tuple(
            Claim(text=f"Columns are better than {name}", source="Learned foundations: why L2,1", ours=True,
                  tests=(More(Cells("linear of h", ("columns (L2,1)",)), Cells("linear of h", (name,))),))
            for name in others
        ),
    )  # fmt: skip


def _tasks() -> Study:
    tasks = tuple(replace(row, curve="") for row in _rows() if row.preset == "simclr")
    return Study(
        name="sparse_head.tasks", title="Does a sparse head forget less in a sequence of tasks?",
        source="Its open question on continual learning; ours: two tasks of five classes each, one after the other.",
        data={"images": Tasks("cifar10", train_labels="label")}, rows=tasks,
        columns=(
            replace(LINEAR_H, name="linear of h, first task", labels="first task"),
            replace(LINEAR_H, name="linear of h, all classes", labels="class"),
        ),
        measured=(_REACHED, RANK_H), scales={**_SCALES, "paper": replace(_SCALES["paper"],
            data={"images": Tasks("imagenet")})},
        axis="sparsity of the head (%)",
        claims=(
            Claim(text="The first task's classes are read better with a sparse head", source="Next checks",
                ours=True,
                  tests=(More(Cells("linear of h, first task", _of("SimCLR", sparse=True)),
                              Cells("linear of h, first task", ("SimCLR",))),)),
        ),
    )  # fmt: skip


def studies() -> list[Study]:
    """Return linear evaluation, few labels, transfer, effective dimensions, other penalties and tasks."""
    return [
        _common(
            name="sparse_head.linear", title="What does a sparse head gain in linear evaluation?",
            source="Its ImageNet table, as a summary tells: SimCLR +2.12, BYOL +1.05.", columns=(LINEAR_H, _REACHED),
            claims=_better("linear of h", "Key results", {"SimCLR": " (reported +2.12)", "BYOL": " (reported +1.05)"}),
        ),
        _common(
            name="sparse_head.few_labels", title="… with 1 % and 10 % of the labels?",
            source="Semi-supervised table; no numbers are known.", columns=_FEW,
            claims=tuple(claim for column in _FEW for claim in _better(column.name, "Key results", {})),
        ),
        _common(
            name="sparse_head.transfer", title="… on other data sets?", source="Transfer table; no numbers are known.",
            columns=_TO,
            claims=tuple(
                Claim(text=f"{method}: better on each of the other sets with a sparse head", source="Key results",
                      tests=tuple(More(Cells(column.name, _of(method, sparse=True)), Cells(column.name, (method,)))
                                  for column in _TO))
                for method in _METHODS
            ),
        ),
        _common(
            name="sparse_head.figure3", title="Does a sparse head take directions from z and give them to h?",
            source="Figure 3 and section 7.2; no numbers are known.", columns=(RANK_H, RANK_Z, _REACHED),
            claims=tuple(
                Claim(text=f"{method}: the sparser the head, the {what}, on average", source="Section 7.2",
                      tests=(Trend(Cells(column, (method, *_of(method, sparse=True))), rises=rises),))
                for method in _METHODS
                for what, column, rises in (("more directions has h", "rank of h", True),
                                            ("fewer directions has z", "rank of z", False))
            ),
        ),
        _penalties(),
        _tasks(),
    ]  # fmt: skip


@register_measure("head_sparsity")
def _head_sparsity(trained: Trained, column: Column) -> float:
    """Fraction of what the row's penalty switches off (columns, rows or weights) that is zero in the first layer."""
    options = trained.setting.preset.regularizers.get("sparse_head", {})
    group = options.get("group", "input")
    first = next(m for m in active_head(trained.model).modules() if isinstance(m, nn.Linear))
    if group == "weight":
        return (first.weight == 0).double().mean().item()
    return sparsity(first.weight.detach(), group=group)
