"""The table of objectives: what each is run with in the tests that all of them share.

A new objective adds rows here; `test_every_objective.py`, `distributed/cases.py` and `training/test_methods.py` run
over them.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One objective with options.

    Args:
        name: Name in the registry.
        options: Of the objective.
        views: Number of views in the batch.
        predictor: Of the adapter's config, as in `ProjectionHeadConfig`.
        prototypes: Likewise.
        head: Name of the head; its `out_dim` is OUT_DIM.
        head_options: Likewise.
        stationary: Whether the loss itself falls in training (the positive-pair cosine must rise where not).
        trained: Whether it is in the training test (one row per objective is enough).
        training_options: Options that replace `options` there (a batch of 64, OUT_DIM).
        rows: Images of the joint batch in the test of several processes, if 8 (9 on three) are too few.
    """

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    views: int = 2
    predictor: Any = None
    prototypes: Any = None
    head: str = "mlp"
    head_options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"hidden_dim": 16})
    stationary: bool = True
    trained: bool = True
    training_options: dict[str, Any] | None = None
    rows: int | None = None


OUT_DIM = 4

CASES = {
    "nt_xent": Case("nt_xent"),
    "nt_xent dense, 3 views": Case("nt_xent", {"tile_rows": None}, views=3, trained=False),
}
