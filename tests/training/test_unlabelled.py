"""Labels that are none while training: the trainer's k-NN, the online probe and SupCon."""

import math
import re

import pytest
import torch
from small import images, plain, trainer, views

import hfproj
from hfproj.errors import UsageError
from hfproj.training.callbacks.online_probe import OnlineClassifier


def relabelled(items, change):
    return [{**item, "label": change(i, item["label"])} for i, item in enumerate(items)]


def evaluated(folder, held_out, bank=None, **extra):
    made = trainer(folder, None, images(8), extra={"eval_dataset": held_out, "bank_dataset": bank, **extra})
    return made, made.evaluate


def test_the_k_nn_leaves_them_out(tmp_path, caplog):
    some = relabelled(images(12, seed=1), lambda i, label: -1 if i % 4 == 0 else label)
    made, evaluate = evaluated(tmp_path, some)
    found = evaluate()
    said = "3 held-out rows have no label and are left out of the k-NN."
    assert said in caplog.messages
    _, of_rest = evaluated(tmp_path, [item for item in some if item["label"] >= 0])
    assert found["eval_knn_h"] == of_rest()["eval_knn_h"]
    assert found["eval_rankme_h"] != of_rest()["eval_rankme_h"]
    measured = hfproj.evaluate(made.model, test=some, collator=plain(), labels=None)
    assert found["eval_rankme_h"] == measured.value("rankme", "h", "after")  # all rows of the set, as `evaluate` has it
    made.evaluate()
    assert caplog.messages.count(said) == 1


@pytest.mark.parametrize(
    ("change", "bank", "match"),
    [
        (lambda i, label: -1, None, "no row of the eval data set has a label"),
        (lambda i, label: None, images(6, seed=2), "no row of the eval data set has a label"),
        (lambda i, label: 5, None, "all labelled bank rows are of one class, 5"),
        (lambda i, label: label if i == 0 else -1, None, "at least 2 rows|one class"),
        (lambda i, label: label, images(6, seed=2, labels=False), "items of bank_dataset have no 'label'"),
    ],
)
def test_without_labels_there_is_no_number(tmp_path, change, bank, match, caplog):
    _, evaluate = evaluated(tmp_path, relabelled(images(9, seed=1), change), bank)
    found = evaluate()
    assert re.search(f"(k-NN|knn_h) is not measured: .*({match})", caplog.text)
    assert not [name for name in found if "knn" in name]
    assert found["eval_rankme_h"] > 0


def test_a_single_held_out_image(tmp_path, caplog):
    _, evaluate = evaluated(tmp_path, images(1, seed=1))
    found = evaluate()
    assert "rankme_h is not measured" in caplog.text
    assert not [name for name in found if "knn" in name or "rankme" in name or "std" in name]


def test_the_online_probe_leaves_them_out():
    f, y = torch.randn(12, 5), torch.arange(12) % 3
    y[::3] = -1
    one, other = OnlineClassifier(), OnlineClassifier()
    assert one.learn(f, y) == other.learn(f[y >= 0], y[y >= 0])
    assert one.learn(f, torch.full_like(y, -1)) == (0.0, 0.0)  # no step
    assert torch.equal(one.weight, other.weight)
    assert one.accuracy(f, y) == other.accuracy(f[y >= 0], y[y >= 0])
    assert math.isnan(one.accuracy(f, torch.full_like(y, -1)))
    assert OnlineClassifier().learn(f, torch.full_like(y, -1)) == (0.0, 0.0)
    with pytest.raises(UsageError, match="class numbers from 0"):
        one.learn(f, y - 3)


@pytest.mark.parametrize("held_out", [-1, None])
def test_a_training_with_the_online_probe(tmp_path, held_out):
    data = relabelled(images(16), lambda i, label: -1 if i % 2 else label)
    probe = hfproj.OnlineProbeCallback(every=2, images=9)
    extra = {"callbacks": [probe], "eval_dataset": relabelled(images(9, seed=1), lambda i, label: held_out)}
    made = trainer(tmp_path, None, data, extra=extra, max_steps=4)
    made.train()
    row = made.history[-1]
    assert 0 <= row["online_train_h"] <= 1
    assert row["online_linear_h"] is row["online_knn_h"] is None
    assert all(math.isfinite(v) for line in made.state.log_history for v in line.values())


def test_of_one_class_the_online_k_nn_is_no_number(tmp_path):
    data = relabelled(images(16), lambda i, label: 2)
    probe = hfproj.OnlineProbeCallback(every=2, images=9)
    made = trainer(tmp_path, None, data, extra={"callbacks": [probe], "eval_dataset": data}, max_steps=4)
    made.train()
    assert made.history[-1]["online_knn_h"] is None


def test_supcon_of_one_view_needs_a_label():
    supcon, z = hfproj.create_objective("supcon"), torch.randn(1, 6, 4)
    with pytest.raises(UsageError, match="no image of this batch has one"):
        supcon(z, labels=torch.full((6,), -1))
    assert supcon(z, labels=torch.tensor([0, 0, -1, -1, -1, -1])).loss > 0
    assert supcon(z.expand(2, 6, 4), labels=torch.full((6,), -1)).loss > 0  # other views of the same image
    with pytest.raises(UsageError, match="whole number"):
        supcon(z, labels=torch.rand(6))


def test_views_carry_them():
    batch = views()([{**item, "index": i, "label": None if i else 3} for i, item in enumerate(images(3))])
    assert batch["labels"].tolist() == [3, -1, -1]
    few = [{"index": 0, **item} for item in images(2)]
    few[1].pop("label")
    assert views()(few)["labels"].tolist() == [0, -1]
