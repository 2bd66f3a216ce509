"""Training with two large and two small views of each image: one gradient, and the objectives made for it."""

import pytest
import torch
from small import head_model, images, trainable, trainer, views

from hfproj.objectives.nt_xent import nt_xent_loss
from hfproj.tuner.views import forward_views

LOCAL = {"local_views": 2, "local_size": 8}


def no_batch_statistics(**config):
    return head_model(head_options={"hidden_dim": 12, "norm": None}, **config)


def test_a_step_of_nt_xent_has_the_gradient_of_single_passes(tmp_path):
    model = no_batch_statistics()
    run = trainer(tmp_path, model, collator=views(**LOCAL))
    batch = views(**LOCAL)([{**item, "index": i} for i, item in enumerate(images(4))])
    assert [view.shape[-1] for view in batch["views"]] == [16, 16, 8, 8]
    loss = run.compute_loss(model.train(), batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters)
    z = torch.stack([model(pixel_values=view).projection for view in batch["views"]])
    expected = nt_xent_loss(z)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(found, torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_views_of_one_size_share_a_pass():
    model, sizes = no_batch_statistics().eval(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    batch = views(**LOCAL)([{**item, "index": i} for i, item in enumerate(images(4))])
    out = forward_views(model, batch["views"])
    assert sizes == [(8, 3, 16, 16), (8, 3, 8, 8)]
    assert out.z.shape == (4, 4, 6)


@pytest.mark.parametrize(
    ("objective", "config"),
    [
        ("nt_xent", {}),
        ({"name": "swav", "queue_size": 8, "queue_start_epoch": 0.0}, {"prototypes": 5}),
        ("dino", {"prototypes": 5}),
        ({"name": "deepcluster_v2", "prototypes": [3, 3]}, {}),
    ],
)
def test_training(tmp_path, objective, config):
    model = head_model(**config)
    run = trainer(
        tmp_path, model, images(8), views(**LOCAL), {"objective": objective}, num_train_epochs=2, weight_decay=0.0
    )
    before = trainable(model)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] > 0
    still = [name for name, p in trainable(model).items() if torch.equal(p, before[name])]
    assert not still


def test_swav_freezes_prototypes_in_the_first_epoch(tmp_path):
    model = head_model(prototypes=5)
    run = trainer(tmp_path, model, collator=views(**LOCAL), extra={"objective": "swav"}, weight_decay=0.0)
    before = trainable(model)
    run.train()
    still = [name for name, p in trainable(model).items() if torch.equal(p, before[name])]
    assert len(still) == 1
    assert "prototypes" in still[0]
