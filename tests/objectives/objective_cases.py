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
        training_options: Options that replace `options` there (a batch of 64, TRAINED_DIM).
        rows: Images of the global batch in the test of several processes, if 8 (9 on three) are too few.
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
TRAINED_DIM = 16  # in the training test

CASES = {
    "nt_xent": Case("nt_xent"),
    "nt_xent dense, 3 views": Case("nt_xent", {"tile_rows": None}, views=3, trained=False),
    "nt_xent on a sparse head": Case(
        "nt_xent",
        head="topk",
        head_options={"width": 24, "top_k": 6, "stem": "mlp", "stem_options": {"hidden_dim": 16}},
        trained=False,
    ),
    "info_nce": Case("info_nce"),
    "info_nce in one direction, 3 views": Case("info_nce", {"symmetric": False}, views=3, trained=False),
    "dcl": Case("dcl"),
    "dclw": Case("dclw"),
    "dclw, 3 views": Case("dclw", views=3, trained=False),
    "supcon": Case("supcon"),
    "supcon of valid rows, 1 view": Case(
        "supcon", {"reduction": "valid", "base_temperature": 0.1}, views=1, trained=False
    ),
    "cross_entropy": Case("cross_entropy"),
    "cross_entropy of a classifier, 1 view": Case(
        "cross_entropy", views=1, predictor={"head": "linear", "bias": True}, trained=False
    ),
    "sigmoid": Case("sigmoid"),
    "sigmoid, 3 views": Case("sigmoid", views=3, trained=False),
    "align_uniform": Case("align_uniform"),
    "align_uniform of distances, 3 views": Case("align_uniform", {"exponent": 1.0}, views=3, trained=False),
    "spectral": Case("spectral"),
    "spectral, 3 views": Case("spectral", views=3, trained=False),
    "simcse": Case("simcse"),
    "simcse with hard negatives": Case(
        "simcse", {"hard_negatives": True, "hard_negative_weight": 0.5}, views=3, trained=False
    ),
    "moco": Case(
        "moco",
        {"out_dim": OUT_DIM, "queue_size": 72},
        stationary=False,
        training_options={"out_dim": TRAINED_DIM, "queue_size": 128},
    ),
    "moco, both directions, 4 views": Case(
        "moco", {"out_dim": OUT_DIM, "queue_size": 72, "symmetric": True}, views=4, stationary=False, trained=False
    ),
    "moco_v3": Case("moco_v3", predictor={"head": "mlp", "hidden_dim": 16}),
    "moco_v3, 4 views": Case("moco_v3", views=4, predictor={"head": "mlp", "hidden_dim": 16}, trained=False),
    "nnclr": Case(
        "nnclr",
        {"out_dim": OUT_DIM, "queue_size": 72},
        predictor={"head": "mlp", "hidden_dim": 16},
        stationary=False,
        training_options={"out_dim": TRAINED_DIM, "queue_size": 128},
    ),
    "nnclr, 4 views": Case(
        "nnclr",
        {"out_dim": OUT_DIM, "queue_size": 72},
        views=4,
        predictor={"head": "mlp", "hidden_dim": 16},
        stationary=False,
        trained=False,
    ),
    "grouped": Case("grouped", {"groups": 2}),
    "grouped nt_xent, 3 views": Case(
        "grouped", {"objective": "nt_xent", "groups": 1, "group_dim": 3}, views=3, trained=False
    ),
    "barlow_twins": Case("barlow_twins"),
    "vicreg": Case("vicreg"),
    "vicreg, 4 views, sum": Case("vicreg", {"variance_reduction": "sum"}, views=4, trained=False),
    "byol": Case("byol", predictor={"head": "mlp", "hidden_dim": 16}),
    "byol, 4 views": Case("byol", views=4, predictor={"head": "mlp", "hidden_dim": 16}, trained=False),
    "simsiam": Case("simsiam", predictor={"head": "mlp", "hidden_dim": 16}),
    "simsiam, 4 views": Case("simsiam", views=4, predictor={"head": "mlp", "hidden_dim": 16}, trained=False),
    "lejepa": Case("lejepa", {"slices": 64}),
    "lejepa, 2 of 4 views global": Case("lejepa", {"slices": 16, "global_views": 2}, views=4, trained=False),
    # hidden layers wider than z: a square last layer may become singular on its way, and whitening with it
    "w_mse": Case("w_mse", {"w_size": 12}, head_options={"hidden_dim": 64}, rows=24, training_options={"w_size": 32}),
    "w_mse of entries, 3 views": Case(
        "w_mse", {"w_size": 8, "w_iter": 2, "eps": 0.01, "l2_normalise": False}, views=3, rows=24, trained=False
    ),
    "zero_cl": Case("zero_cl"),
    "zero_cl of features and images": Case("zero_cl", {"mode": "both"}, trained=False),
    "zero_cl as on CIFAR": Case("zero_cl", {"variant": "cifar"}, rows=24, trained=False),
    "swav": Case("swav", prototypes=10, stationary=False),
    "swav with a queue, 4 views": Case(
        "swav",
        {"queue_size": 24, "queue_start_epoch": 0.0, "out_dim": OUT_DIM, "assigned_views": 3},
        views=4,
        prototypes=5,
        rows=24,
        trained=False,
    ),
    "deepcluster_v2": Case(
        "deepcluster_v2",
        {"num_images": 9, "out_dim": OUT_DIM, "prototypes": [3, 2]},
        stationary=False,
        training_options={"num_images": 512, "out_dim": TRAINED_DIM, "prototypes": [10, 10]},
    ),
    "deepcluster_v2, 4 views": Case(
        "deepcluster_v2",
        {"num_images": 24, "out_dim": OUT_DIM, "prototypes": 3, "assigned_views": 1, "kmeans_init": "k-means++"},
        views=4,
        rows=24,
        trained=False,
    ),
    "dino": Case("dino", {"prototypes": 10}, prototypes=10, stationary=False),
    "dino, 4 views, learned lengths": Case(
        "dino", {"prototypes": 6}, views=4, prototypes={"count": 6, "learn_norm": True}, stationary=False, trained=False
    ),
}
