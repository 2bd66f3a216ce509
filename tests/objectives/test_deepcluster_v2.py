"""DeepCluster-v2 by the official loss on its own clusters, the order of bank and clusters, epochs, refusals."""

import math

import pytest
import torch
from torch.nn import functional as F

from hfproj.errors import UsageError
from hfproj.objectives import create_objective
from hfproj.objectives.base import Step
from hfproj.objectives.deepcluster_v2 import DeepClusterV2, cluster_entropy

IMAGES, DIM, HEADS = 20, 3, (4, 3, 5)


def objective(**options):
    return DeepClusterV2(**{"num_images": IMAGES, "out_dim": DIM, "prototypes": HEADS, **options}).double()


def projections(images=IMAGES, views=3):
    return 2 * torch.randn(views, images, DIM, dtype=torch.float64)


def at(epoch, global_step=0):
    return Step.at(0, global_step, epoch)


def epoch_of(module, z, batch=6):
    """Give the images to the objective in a random order; returns the outputs."""
    order = torch.randperm(z.shape[1])
    return [module(z[:, index], index=index) for index in order.split(batch)]


def trained(**options):
    """An objective with clusters, and the projections that they are of."""
    module, z = objective(**options), projections()
    module.on_epoch_start(at(0.0))
    epoch_of(module, z)
    module.on_epoch_start(at(1.0, 4))
    return module, z


def officially(z, module, index):
    """The loss of main_deepclusterv2.py: one output per head, targets repeated for the crops."""
    loss = 0
    u = F.normalize(z, dim=-1).flatten(0, 1)
    for head, centroids in enumerate(module.centroids.split(HEADS)):
        targets = module.assignments[head][index].repeat(len(z))
        loss += F.cross_entropy(u @ centroids.T / 0.1, targets, ignore_index=-1)
    return loss / len(HEADS)


def test_equals_the_official_loss_and_gradient():
    module, _ = trained()
    module.assignments[:, 7] = -1
    index = torch.tensor([3, 7, 12, 0])
    z = projections(4).requires_grad_()
    loss, terms = module(z, index=index)
    expected = officially(z, module, index)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    found = [torch.autograd.grad(value, z)[0] for value in (loss, expected)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-13)
    assert not found[0][:, 1].any()
    assert terms["assigned"].item() == 0.75


def test_accuracy_is_that_of_the_nearest_centroid():
    module, z = trained()
    index = torch.arange(IMAGES)
    u = F.normalize(z, dim=-1)
    hits = [(u @ c.T).argmax(-1) == a for c, a in zip(module.centroids.split(HEADS), module.assignments, strict=True)]
    expected = torch.stack(hits).double().mean()
    torch.testing.assert_close(module(z, index=index).terms["accuracy"], expected)
    assert 0.3 < expected < 1


def test_clusters_are_those_of_the_view_of_the_epoch_before():
    """Head h clusters view h mod 2: its own view lies in the nearest cluster, by k-means' last assignment."""
    module, z = trained()
    u = F.normalize(z, dim=-1)
    for head, centroids in enumerate(module.centroids.split(HEADS)):
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(len(centroids), dtype=torch.float64))
        assert torch.equal(module.assignments[head], (u[head % 2] @ centroids.T).argmax(1))
    torch.testing.assert_close(module.bank, u[:2])


def test_first_epoch_fills_the_bank_and_trains_nothing():
    module = objective()
    module.on_epoch_start(at(0.0))
    z = projections().requires_grad_()
    for loss, terms in epoch_of(module, z):
        (grad,) = torch.autograd.grad(loss, z)
        assert loss.item() == 0
        assert not grad.any()
        assert terms["assigned"].item() == 0
    assert module.filled.all()
    assert (module.assignments == -1).all()


def test_images_that_the_epoch_before_left_out_have_no_cluster():
    module, z = trained()
    epoch_of(module, z[:, :15])
    module.on_epoch_start(at(2.0))
    assert (module.assignments[:, :15] >= 0).all()
    assert (module.assignments[:, 15:] == -1).all()
    assert not module.filled.any()


def test_resuming_within_an_epoch_keeps_its_clusters():
    module, z = trained()
    epoch_of(module, z[:, :15])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    again = objective()
    again.load_state_dict(before)
    again.on_epoch_start(at(1.75, 7))
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    again.on_epoch_start(at(2.0, 8))
    assert not torch.equal(again.centroids, before["centroids"])


def test_clusters_depend_on_seed_and_step_only():
    a, b = trained()[0], objective()
    b.bank.copy_(a.bank), b.filled.fill_(True)
    torch.manual_seed(5)
    b.on_epoch_start(at(1.0, 4))
    torch.testing.assert_close(b.state_dict(), a.state_dict())
    b.filled.fill_(True)
    b.on_epoch_start(at(2.0, 8))
    assert not torch.equal(a.centroids, b.centroids)


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_separated_directions_are_learned_exactly(init):
    """At τ → 0 the loss is 0 where every view is in its image's cluster."""
    module = objective(prototypes=3, temperature=0.01, kmeans_init=init, kmeans_iterations=20).double()
    z = torch.eye(DIM, dtype=torch.float64)[torch.arange(IMAGES) % 3].expand(2, IMAGES, DIM)
    epoch_of(module, z)
    module.on_epoch_start(at(1.0))
    loss, terms = module(z, index=torch.arange(IMAGES))
    assert loss.item() < 1e-12
    assert (terms["assigned"].item(), terms["accuracy"].item()) == (1, 1)


def test_closed_forms():
    target = torch.tensor([0, 1, -1])
    zero = torch.zeros(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(cluster_entropy(zero, target), torch.tensor([1, 1, 0]) * math.log(6), check_dtype=False)
    module, z = objective().eval(), projections()  # centroids are zero, so no cluster is nearer than another
    expected = sum(math.log(k) for k in HEADS) / len(HEADS)
    assert module(z, index=torch.arange(IMAGES)).loss.item() == pytest.approx(expected, abs=1e-14)


def test_invariances():
    module, z = trained()
    index, rotation = torch.arange(IMAGES), torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64)).Q
    loss, order = module(z, index=index).loss, torch.randperm(IMAGES)
    for same, numbers in ((z[:, order], index[order]), (z.flip(0), index), (z * torch.rand(3, IMAGES, 1), index)):
        torch.testing.assert_close(module(same, index=numbers).loss, loss, rtol=1e-12, atol=0)
    module.centroids.copy_(module.centroids @ rotation)
    torch.testing.assert_close(module(z @ rotation, index=index).loss, loss, rtol=1e-12, atol=0)


def test_gradcheck():
    module, _ = trained()
    index = torch.tensor([1, 5, 2])
    assert torch.autograd.gradcheck(lambda z: module(z, index=index).loss, projections(3, 2).requires_grad_())


def test_outside_training_clusters_are_the_nearest_and_nothing_is_kept():
    module, _ = trained()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = projections(5)
    module.eval()
    losses = {module(other, index=index).loss.item() for index in (torch.arange(5), torch.arange(5) + 1000)}
    assert len(losses) == 1
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    u = F.normalize(other, dim=-1)
    expected = 0
    for head, centroids in enumerate(module.centroids.split(HEADS)):
        target = (u[head % 2] @ centroids.T).argmax(1)
        expected += F.cross_entropy(u.flatten(0, 1) @ centroids.T / 0.1, target.repeat(3)) / len(HEADS)
    assert losses.pop() == pytest.approx(expected.item(), rel=1e-12)


def test_of_an_image_that_comes_twice_the_later_rows_stay():
    module, z = objective(), projections(4)
    module(z, index=torch.tensor([2, 9, 2, 2]))
    torch.testing.assert_close(module.bank[:, [2, 9]], F.normalize(z[:2][:, [3, 1]], dim=-1))
    assert module.filled.nonzero().flatten().tolist() == [2, 9]


@pytest.mark.parametrize("temperature", [0.01, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite(temperature, dtype):
    module = DeepClusterV2(num_images=IMAGES, out_dim=DIM, prototypes=HEADS, temperature=temperature)
    z = projections().float()
    z[:, 0] = 0
    z[:, 1] = z[:, 2]
    z[:, 3] *= 1e4
    z = z.to(dtype).requires_grad_()
    index = torch.arange(IMAGES)
    exact = objective(temperature=temperature)
    with torch.autocast("cpu", torch.bfloat16):
        module(z, index=index)
        module.on_epoch_start(at(1.0))
        loss, terms = module(z, index=index)
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.isfinite().all()
    assert not z.grad[:, 0].any()
    assert all(t.isfinite() and not t.requires_grad for t in terms.values())
    exact.load_state_dict(module.state_dict())
    torch.testing.assert_close(loss.double(), exact(z.detach().double(), index=index).loss, rtol=1e-5, atol=1e-5)


def test_collapsed_projections():
    """All rows alike: every centroid is that row, and the loss is the mean of log K."""
    module, z = objective(), torch.ones(2, IMAGES, DIM, dtype=torch.float64)
    epoch_of(module, z)
    module.on_epoch_start(at(1.0))
    expected = sum(math.log(k) for k in HEADS) / len(HEADS)
    assert module(z, index=torch.arange(IMAGES)).loss.item() == pytest.approx(expected, abs=1e-12)


def test_refused():
    module = objective()
    with pytest.raises(UsageError, match=r"needs 'index'.*hfproj.ImageViews does"):
        module(projections())
    with pytest.raises(UsageError, match=r"from 0 to 19, got 5 to 20; pass num_images"):
        module(projections(2), index=torch.tensor([20, 5]))
    with pytest.raises(UsageError, match="pass out_dim=8"):
        module(torch.randn(2, 4, 8), index=torch.arange(4))
    with pytest.raises(UsageError, match="at least 2 views"):
        module(projections(views=1), index=torch.arange(IMAGES))
    module(projections(4), index=torch.arange(4))
    with pytest.raises(UsageError, match=r"5 clusters of 4 rows.*prototypes="):
        module.on_epoch_start(at(1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prototypes": 21}, r"each from 2 to that of images \(20\), got 21"),
        ({"prototypes": (4, 1)}, r"got \(4, 1\)"),
        ({"prototypes": ()}, "numbers of clusters"),
        ({"temperature": 0.0}, "temperature to be a positive number"),
        ({"kmeans_iterations": 0}, "kmeans_iterations to be at least 1"),
        ({"assigned_views": 0}, "assigned_views to be at least 1"),
        ({"kmeans_init": "randm"}, "Did you mean 'random'"),
        ({"heads": 3}, "Unknown option of objective 'deepcluster_v2'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        create_objective("deepcluster_v2", **{"num_images": IMAGES, "out_dim": DIM, "prototypes": 4, **options})


def test_anatomy():
    module = create_objective("deepcluster_v2", num_images=IMAGES, out_dim=DIM, prototypes=4)
    assert (module.views, module.needs, module.prototypes) == ((2, None), {"index"}, [4])
    assert not list(module.parameters())
    shapes = {name: tuple(b.shape) for name, b in module.state_dict().items()}
    assert shapes == {
        "bank": (2, IMAGES, DIM),
        "filled": (IMAGES,),
        "assignments": (1, IMAGES),
        "centroids": (4, DIM),
        "epoch": (),
    }
