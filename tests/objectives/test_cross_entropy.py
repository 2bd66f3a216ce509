"""Supervised cross-entropy, against its formula in float64."""

import pytest
import torch

from hfproj.errors import UsageError
from hfproj.objectives.cross_entropy import CrossEntropy, cross_entropy_loss


@pytest.fixture
def logits():
    return torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 3, 1, -1, 2, 2])


def test_it_is_the_mean_over_views_and_labelled_images(logits):
    by_hand = []
    for view in logits:
        for row, label in zip(view, LABELS.tolist()):
            if label >= 0:
                by_hand.append(torch.log(row.exp().sum()) - row[label])
    loss, terms = CrossEntropy()(logits, labels=LABELS)
    assert abs(loss - torch.stack(by_hand).mean()) < 1e-14
    hits = [int(r.argmax() == y) for view in logits for r, y in zip(view, LABELS) if y >= 0]
    assert terms["train_accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_gradient(logits):
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cross_entropy_loss(z, LABELS)[0], logits)
    CrossEntropy()(logits, labels=LABELS).loss.backward()
    assert (logits.grad[:, 3] == 0).all()  # no label, no gradient
    assert (logits.grad[:, [0, 1, 2, 4, 5]] != 0).all()
    assert logits.grad.sum(-1).abs().max() < 1e-15  # adding a constant to all logits of a row changes nothing


def test_the_predictor_is_the_classifier(logits):
    z = torch.zeros(2, 6, 9, dtype=torch.float64)
    assert CrossEntropy()(z, labels=LABELS, prediction=logits).loss == CrossEntropy()(logits, labels=LABELS).loss


def test_low_precision_is_computed_in_float32(logits):
    low = CrossEntropy()(logits.to(torch.bfloat16), labels=LABELS).loss
    assert low.dtype == torch.float32
    assert low == CrossEntropy()(logits.to(torch.bfloat16).float(), labels=LABELS).loss


def test_labels_beyond_the_logits_are_refused(logits):
    with pytest.raises(UsageError, match=r"Expected labels below 4, .* got 5; set out_dim to the number of classes"):
        CrossEntropy()(logits, labels=LABELS + 2)
    with pytest.raises(UsageError, match="no image of this batch has one"):
        CrossEntropy()(logits, labels=torch.full((6,), -1))
