"""Wrong uses of objectives, one row each: a single sentence with a hint, never a traceback from inside torch."""

import math

import pytest
import torch
from inputs import projections

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.base import Step, check_call

Z, SCORES, LABELS = torch.randn(2, 8, 4), torch.randn(2, 8, 5), torch.arange(8) % 3
QUEUE = {"out_dim": 4, "queue_size": 16}
CLUSTERS = {"num_images": 8, "out_dim": 4, "prototypes": 2}
STEP = Step.at(0, 0, 20.0)

# name, options, what is given beside z, message
CALLS = [
    (
        "supcon",
        {},
        {"labels": LABELS.repeat(2)},
        r"each of the 8 images as labels, got torch.int64 of shape \[16\]",
    ),
    ("supcon", {}, {"labels": LABELS.float()}, "one whole number for each .* got torch.float32"),
    ("byol", {}, {"prediction": Z[..., :3], "target": Z}, r"prediction of shape \[2, 8, 4\].*got \[2, 8, 3\]"),
    ("byol", {}, {"prediction": Z, "target": Z[:1]}, r"target of shape \[2, 8, 4\].*got \[1, 8, 4\]"),
    ("byol", {}, {"prediction": Z, "target": Z[:, :5]}, r"target of shape .*got \[2, 5, 4\]"),
    ("simsiam", {}, {"prediction": Z[0]}, r"prediction of shape .*got \[8, 4\]"),
    ("moco", QUEUE, {"target": Z[..., :2]}, r"target of shape \[2, 8, 4\]"),
    ("moco", {**QUEUE, "queue_size": 15}, {"target": Z}, "no whole number of batches of 8 .*queue_size=8 or"),
    ("moco", {**QUEUE, "out_dim": 3}, {"target": Z}, "rows of 3 dimensions and z has 4: pass out_dim=4"),
    ("moco_v3", {}, {"prediction": Z, "target": Z[..., :2]}, "target of shape"),
    ("nnclr", {**QUEUE, "queue_size": 4}, {"prediction": Z}, "no whole number of batches of 8"),
    ("nnclr", QUEUE, {"prediction": Z[:, :2]}, "prediction of shape"),
    ("w_mse", {"w_size": 6}, {}, "take w_size=8 or more, or a head with out_dim=3 or less"),
    ("lejepa", {"global_views": 3}, {}, "mean of global_views=3 views, and z has 2"),
    ("swav", {}, {"scores": SCORES[0]}, r"scores of shape \[2, 8, 5\], the images of z \[2, 8, 4\], got \[8, 5\]"),
    ("swav", {}, {"scores": SCORES[:1]}, r"scores of shape .*got \[1, 8, 5\]"),
    ("swav", {}, {"scores": SCORES[:, :5]}, r"scores of shape .*got \[2, 5, 5\]"),
    ("swav", QUEUE, {"scores": SCORES, "step": STEP}, "needs 'prototypes'"),
    ("swav", QUEUE, {"scores": SCORES, "prototypes": torch.randn(6, 4), "step": STEP}, r"of shape \[5, 4\]"),
    (
        "swav",
        QUEUE,
        {"scores": SCORES, "prototypes": torch.randn(5, 3), "step": STEP},
        r"of prototypes \[5, 3\]",
    ),
    (
        "swav",
        {**QUEUE, "queue_size": 15},
        {"scores": SCORES, "prototypes": torch.randn(5, 4), "step": STEP},
        "no whole",
    ),
    ("swav", {"assigned_views": 3}, {"scores": SCORES}, "at least 3 views"),
    ("dino", {"prototypes": 6}, {"scores": SCORES, "target": SCORES}, "pass prototypes=5"),
    ("dino", {"prototypes": 5}, {"scores": SCORES, "target": SCORES[..., :3]}, r"target of shape \[2, 8, 5\]"),
    ("dino", {"prototypes": 5}, {"scores": SCORES, "target": SCORES[:, :4]}, "target of shape"),
    ("dino", {"prototypes": 5}, {"scores": SCORES, "target": SCORES[:1]}, "target of shape"),
    ("dino", {"prototypes": 5}, {"scores": SCORES[:, :4], "target": SCORES[:, :4]}, "scores of shape"),
    ("deepcluster_v2", CLUSTERS, {"index": torch.arange(9)}, "each of the 8 images as index"),
    ("deepcluster_v2", CLUSTERS, {"index": torch.arange(8.0)}, "got torch.float32"),
    (
        "deepcluster_v2",
        CLUSTERS,
        {"index": torch.arange(8) + 1},
        "from 0 to 7, got 1 to 8; pass num_images",
    ),
    ("grouped", {"groups": 5}, {}, "too few for 5 disjoint groups .*fewer or smaller groups, or a wider head"),
    ("grouped", {"objective": "byol", "groups": 2}, {"prediction": Z, "target": Z[..., :2]}, "target of shape"),
]

TYPES = [
    ("supcon", {}, {"labels": LABELS.tolist()}, "takes labels as a Tensor, got list: use a data set with a label"),
    ("byol", {}, {"prediction": Z.tolist(), "target": Z}, "takes prediction as a Tensor, got list: give the config"),
    ("moco", QUEUE, {"target": 3}, "takes target as a Tensor, got int: hfproj.ProjectionTrainer keeps"),
    ("w_mse", {"w_size": 8}, {"step": 3}, r"takes step as a Step, got int: pass step=Step.at\(seed"),
    ("lejepa", {}, {"step": "now"}, "takes step as a Step, got str"),
    ("swav", {}, {"scores": [1.0]}, r"takes scores as a Tensor, got list: give the config prototypes"),
    ("deepcluster_v2", CLUSTERS, {"index": [*range(8)]}, "takes index as a Tensor, got list: return 'index' from"),
    ("sigmoid", {}, {"scales": 3.0}, "takes scales as a Mapping, got float: give the config the objective's scales"),
]

OPTIONS = [
    ("nt_xent", {"temperature": "0.1"}, "temperature of objective 'nt_xent' to be a number, got '0.1' of type str"),
    ("nt_xent", {"temperature": math.nan}, "temperature to be a positive number .*got nan"),
    ("nt_xent", {"gather": "no"}, "gather of objective 'nt_xent' to be True or False"),
    ("nt_xent", {"tile_rows": 1.5}, "to be a whole number, a string or None"),
    ("nt_xent", {"tile_rows": "512"}, "to be a number from 1"),
    ("moco", {"ema_momentum": 0.99}, "ema_momentum of objective 'moco' to be a list"),
    ("moco", {"queue_size": 10.5}, "queue_size of objective 'moco' to be a whole number"),
    ("swav", {"queue_start_epoch": math.nan}, "queue_start_epoch to be at least 0, got nan"),
    ("deepcluster_v2", {}, "The objective 'deepcluster_v2' needs num_images=…"),
    ("deepcluster_v2", {**CLUSTERS, "out_dim": 0}, "out_dim to be at least 1"),
    ("deepcluster_v2", {**CLUSTERS, "prototypes": [2.5]}, "to be a whole number or a list"),
    ("grouped", {"objective_options": 3}, "to be a dict or None"),
    ("nt_xnet", {}, "Did you mean 'nt_xent'"),
]


@pytest.mark.parametrize(("name", "options", "given", "message"), CALLS)
def test_calls_that_cannot_work(name, options, given, message):
    objective = create_objective(name, **options)
    if name == "swav" and options.get("queue_size"):
        objective.queue_start_epoch = 0.0
    with pytest.raises(UsageError, match=message) as refusal:
        objective(Z, **given)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "options", "given", "message"), TYPES)
def test_values_that_are_no_tensors(name, options, given, message):
    with pytest.raises(UsageError, match=message):
        check_call(create_objective(name, **options), Z, **given)


@pytest.mark.parametrize(("name", "options", "message"), OPTIONS)
def test_options_that_cannot_work(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_objective(name, **options)


@pytest.mark.parametrize("z", [Z.long(), Z[..., :0], Z.to(torch.complex64)], ids=["integers", "no width", "complex"])
def test_projections_that_are_none(z):
    with pytest.raises(UsageError, match="in floating-point numbers, of one dimension or more, got torch"):
        check_call(create_objective("nt_xent"), z)


def test_images_without_a_class_find_their_own_views_alone():
    z, supcon = projections(), create_objective("supcon", temperature=0.2)
    unlabelled = supcon(z, labels=torch.full((5,), -1)).loss
    nt_xent = create_objective("nt_xent", temperature=0.2)(z).loss
    torch.testing.assert_close(unlabelled, nt_xent, rtol=1e-12, atol=0)
    apart = supcon(z, labels=torch.tensor([0, -1, 0, -1, -100])).loss
    torch.testing.assert_close(apart, supcon(z, labels=torch.tensor([0, 7, 0, 8, 9])).loss, rtol=1e-13, atol=0)
