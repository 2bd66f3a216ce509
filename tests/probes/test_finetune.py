"""Fine-tuning probe: what is trained, against a plain loop; what is left as it was; which images are used."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    TEXT,
    PlainNet,
    assert_same_tensors,
    make_backbone,
    make_config,
    perturb,
    snapshot,
)
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from torch import nn

import hfproj
from hfproj.backbones import pool, resolve_read_point
from hfproj.data.augment import Augmentation
from hfproj.errors import NonFiniteLossError, UsageError
from hfproj.probes.finetune import FineTuneProbe, _own_random_state, fraction_of_each_class, labels_of, schedule
from hfproj.tuner.network import network_of

PIXELS = {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
SHORT = {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "backbone_learning_rate": 1e-3}


def images(count, seed=0, classes=3):
    """Return small images whose brightness tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = rng.integers(0, 80, (count, 32, 32, 3)) + (labels * 80)[:, None, None, None]
    return [{"image": Image.fromarray(p.astype(np.uint8)), "label": int(y)} for p, y in zip(pixels, labels)]


def probe(**options):
    return FineTuneProbe(**{"eval_collator": hfproj.EvalImages(**PIXELS), **SHORT, **options})


def attach(name, trained="lora", **options):
    model = get_peft_model(make_backbone(name), make_config(name, trained, **options))
    perturb(model)
    return model


# --- training ---


def test_training_is_that_of_a_plain_loop():
    """In float64, without augmentation, on a ViT that is read by hand."""
    data = images(10)
    backbone = make_backbone("vit").double()
    tuned = probe(augmentation=None, weight_decay=0.1, warmup=0.25, max_grad_norm=0.5, seed=3).fit(backbone, data)

    twin, classifier = copy.deepcopy(backbone).train(), nn.Linear(16, 3).double()
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_("mask_token" not in name)
    weights = [p for p in twin.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "lr": 1e-3, "weight_decay": 0.1},
        {"params": [p for p in weights if p.ndim == 1], "lr": 1e-3, "weight_decay": 0.0},
        {"params": [classifier.weight], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [classifier.bias], "lr": 1e-2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    factors = [1.0, 1.0, 0.75, 0.25]  # one step up, then cos(0), cos(π/3), cos(2π/3), each (1 + cos)/2
    peaks = [g["lr"] for g in optimizer.param_groups]
    pixels = hfproj.EvalImages(**PIXELS)(data)["pixel_values"].double()
    labels = torch.tensor([item["label"] for item in data])
    step = 0
    for epoch in range(2):
        order = np.random.default_rng([3, epoch]).permutation(10)
        for rows in (order[:5], order[5:]):
            loss = F.cross_entropy(classifier(twin(pixels[rows]).last_hidden_state[:, 0]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*weights, *classifier.parameters()], 0.5)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factors[step]
            optimizer.step()
            step += 1
    for name, parameter in twin.named_parameters():
        found = tuned._network.get_base_model().get_parameter(name)
        torch.testing.assert_close(found, parameter, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(tuned._classifier.weight, classifier.weight, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        expected = classifier(twin.eval()(pixels).last_hidden_state[:, 0]).argmax(1)
    assert tuned.predict(data).equal(expected)


def test_learns_what_the_brightness_says():
    train, test = images(60), images(30, seed=1)
    tuned = probe(epochs=8, batch_size=10, learning_rate=1e-2, backbone_learning_rate=1e-3, warmup=0.0)
    value = tuned.fit(make_backbone("timm_cnn"), train).score(test)
    assert value > 0.9
    assert tuned.correct_.tolist() == [p == item["label"] for p, item in zip(tuned.predict(test).tolist(), test)]


@pytest.mark.parametrize("name", ["vit", "timm_cnn"])
def test_the_model_is_left_as_it_was_and_so_are_the_random_numbers(name):
    model = attach(name)
    model.train()
    before, flags = snapshot(model), [m.training for m in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data, test = images(12), images(9, seed=1)
    one = probe().fit(model, data)
    value = one.score(test)
    assert torch.get_rng_state().equal(states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert_same_tensors(snapshot(model), before)
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    start = network_of(model).state_dict()
    moved = [n for n, t in one._network.state_dict().items() if t.is_floating_point() and not t.equal(start[n])]
    assert len(moved) > 10
    assert name == "vit" or any("running_mean" in n for n in moved)

    # Again, from another global state, inside of autocast and inference mode.
    torch.manual_seed(99)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        two = probe().fit(model, data)
    assert_same_tensors(snapshot(two._network), snapshot(one._network))
    assert two.score(test) == value
    other = probe(seed=1).fit(model, data)
    assert not other._classifier.weight.equal(one._classifier.weight)
    assert copy.deepcopy(one).predict(test).equal(one.predict(test))


def test_global_random_states_come_back():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    drawn = []
    for seed in (1, 1, 2):
        with _own_random_state(seed, torch.device("cpu")):
            drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))  # noqa: NPY002
        assert torch.get_rng_state().equal(states[0])
        assert random.getstate() == states[1]
        assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2]))


def test_dropout_is_on_while_training_and_off_after():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    plain = ViTModel(ViTConfig(**config), add_pooling_layer=False)
    noisy = ViTModel(ViTConfig(**config, hidden_dropout_prob=0.5), add_pooling_layer=False)
    noisy.load_state_dict(plain.state_dict())
    data = images(6)
    tuned = [probe(augmentation=None).fit(model, data) for model in (plain, noisy, noisy)]
    assert not tuned[0]._classifier.weight.equal(tuned[1]._classifier.weight)
    assert tuned[1]._classifier.weight.equal(tuned[2]._classifier.weight)
    assert tuned[1].predict(data).equal(tuned[1].predict(data))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_close(precision):
    data = images(12)
    full, mixed = probe().fit(make_backbone("vit"), data), probe(precision=precision).fit(make_backbone("vit"), data)
    assert mixed._classifier.weight.dtype == torch.float32
    assert not mixed._classifier.weight.equal(full._classifier.weight)
    one, two = mixed._classifier.weight.flatten(), full._classifier.weight.flatten()
    assert F.cosine_similarity(one, two, dim=0) > 0.95
    assert mixed.predict(data).shape == (12,)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_in_every_step(precision):
    """Autocast keeps casts of the weights until its outermost context ends: each step must cast anew."""
    tuned = probe(precision=precision, augmentation=None, epochs=20).fit(make_backbone("vit"), images(18))
    assert tuned.score(images(9, seed=1)) > 0.8  # by chance: a third


def test_texts():
    data = [{"text": "abcdefg"[: 2 + i % 3], "label": i % 2} for i in range(8)]

    def collate(items):
        ids = torch.zeros(len(items), 4, dtype=torch.int64)
        for row, item in zip(ids, items):
            row[: len(item["text"])] = torch.tensor([3 + ord(c) - 97 for c in item["text"]])
        return {"inputs": {"input_ids": ids, "attention_mask": (ids > 0).long()}}

    tuned = probe(eval_collator=collate, pooling="mean").fit(make_backbone("bert"), data)
    assert tuned.predict(data).shape == (8,)
    assert TEXT[0] == "bert"
    network, inputs = tuned._network, collate(data)["inputs"]
    point = resolve_read_point(make_backbone("bert"), pooling="mean")
    with torch.no_grad():
        h = pool(network.eval()(**inputs).backbone_output, point, inputs["attention_mask"])
        assert (tuned._classifier(h)).argmax(1).equal(tuned.predict(data))


# --- images and labels ---


def test_fraction_of_each_class():
    labels = torch.tensor([7] * 200 + [-3] * 50 + [9] * 3)
    one, ten = fraction_of_each_class(labels, 0.01), fraction_of_each_class(labels, 0.1)
    assert [int((labels[one] == c).sum()) for c in (7, -3, 9)] == [2, 1, 1]
    assert [int((labels[ten] == c).sum()) for c in (7, -3, 9)] == [20, 5, 1]
    assert set(one) < set(ten)
    assert ten == sorted(ten)
    assert fraction_of_each_class(labels, 1.0) == list(range(253))
    assert fraction_of_each_class(labels, 0.1) == ten
    assert fraction_of_each_class(labels, 0.1, seed=1) != ten


def test_only_the_share_is_read():
    class Counting(list):
        read = set()

        def __getitem__(self, row):
            self.read.add(row)
            return super().__getitem__(row)

    data = Counting({**item, "image": item["image"] if row % 2 else None} for row, item in enumerate(images(12)))
    dataset = Dataset.from_list([{"x": float(row), "label": row % 3} for row in range(30)])
    seen = []

    def collate(items):
        seen.extend(int(item["x"]) for item in items)
        return {"pixel_values": torch.tensor([[item["x"]] * 4 for item in items])}

    tuned = probe(fraction=0.2, eval_collator=collate).fit(nn.Linear(4, 2), dataset)
    assert len(tuned.indices_) == 6
    assert sorted(seen) == sorted(2 * tuned.indices_)  # both epochs
    assert sorted(dataset[tuned.indices_]["label"]) == [0, 0, 1, 1, 2, 2]
    assert labels_of(data, "label").tolist() == [row % 3 for row in range(12)]


def test_labels_of_pairs_and_datasets():
    assert labels_of([("a", 3), ("b", -1)], "label").tolist() == [3, -1]
    with warnings.catch_warnings():
        dataset = Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}] * 2, "fine": [4, 5]})
    assert labels_of(dataset, "fine").tolist() == [4, 5]
    with pytest.raises(UsageError, match=r"Item 0 has no label: it has 'image'. Name the column: label_column="):
        labels_of([{"image": 1}], "label")


def test_labels_are_any_integers_and_unseen_classes_are_wrong():
    data = images(12)
    other = [{**item, "label": item["label"] * 1000 - 7} for item in data]
    one, two = probe().fit(make_backbone("vit"), data), probe().fit(make_backbone("vit"), other)
    assert two.predict(other).equal(one.predict(data) * 1000 - 7)
    unseen = [{**item, "label": 5} for item in data[:6]]
    assert one.score(unseen) == 0.0
    assert probe().fit(make_backbone("vit"), [{**item, "label": 4} for item in data]).predict(data).tolist() == [4] * 12


def test_augmentation_is_that_of_image_views():
    data = [{**item} for item in images(4)]
    tuned = probe(augmentation=Augmentation.none(flip_probability=1.0), epochs=1)
    collate, train = tuned._collators(make_backbone("vit"))
    batch = train([{**item, "index": row, "epoch": 0} for row, item in enumerate(data)])
    assert len(batch["views"]) == 1
    torch.testing.assert_close(batch["views"][0], collate(data)["pixel_values"].flip(-1))
    default = probe()._collators(make_backbone("vit"))[1].augmentations
    assert default == [Augmentation.none(scale=(0.08, 1.0), flip_probability=0.5)]
    same = probe(augmentation=None)._collators(make_backbone("vit"))
    assert same[0] is same[1]


def test_results_carry_the_protocol():
    data = images(12)
    tuned = probe(fraction=0.5, seed=2).fit(attach("vit", pooling="mean", layer=1), data)
    value = tuned.score(data[:5])
    digest = tuned.results_["protocol"].pop("train_rows_sha256")
    assert len(digest) == 16
    assert tuned.results_ == {
        "value": value,
        "protocol": {
            **SHORT, "fraction": 0.5, "weight_decay": 0.05, "warmup": 0.1, "max_grad_norm": 1.0, "precision": None,
            "seed": 2, "pooling": "mean", "layer": 1, "dim": 16, "collator": "EvalImages", "size": 32,
            "interpolation": "bicubic", "augmentation": {"scale": [0.08, 1.0], "flip_probability": 0.5},
            "train_rows": 6, "train_rows_of": 12, "test_rows": 5, "classes": 3,
        },
    }  # fmt: skip
    assert tuned.correct_.shape == (5,)
    assert repr(tuned).startswith("FineTuneProbe(fraction=0.5, epochs=2, batch_size=6, ")


def test_schedule():
    assert [schedule(s, 10, 0.2) for s in range(3)] == [0.5, 1.0, 1.0]
    assert schedule(0, 4, 0.0) == 1.0
    assert 0 < schedule(9, 10, 0.2) < 0.05
    assert all(0 < schedule(s, n, w) <= 1 for n in (1, 2, 7) for w in (0.0, 0.1, 0.9) for s in range(n))


def test_refusals():
    for options in ({"fraction": 0.0}, {"fraction": 1.5}, {"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0},
                    {"backbone_learning_rate": -1.0}, {"warmup": 1.0}, {"max_grad_norm": 0.0},
                    {"weight_decay": float("nan")}):  # fmt: skip
        with pytest.raises(UsageError):
            FineTuneProbe(**options)
    with pytest.raises(UsageError, match=r"Unknown precision 'bf15'\. Did you mean 'bf16'"):
        FineTuneProbe(precision="bf15")
    data, backbone = images(6), make_backbone("vit")
    with pytest.raises(UsageError, match="call fit"):
        probe().predict(data)
    with pytest.raises(UsageError, match="data set is empty"):
        probe().fit(backbone, [])
    with pytest.raises(UsageError, match="integer label"):
        probe().fit(backbone, [{**item, "label": 0.5} for item in data])
    with pytest.raises(UsageError, match="nothing to fine-tune"):
        probe(in_dim=4, eval_collator=lambda items: {"pixel_values": torch.ones(len(items), 4)}).fit(
            nn.Identity(), data
        )
    with pytest.raises(UsageError, match="one view of each image for fine-tuning, got 2"):
        probe(collator=hfproj.ImageViews(**PIXELS)).fit(backbone, data)
    halved = probe(collator=lambda items: {"pixel_values": torch.zeros(1, 3, 32, 32)})
    with pytest.raises(UsageError, match="for each of 6 items from the collator, got 1 rows"):
        halved.fit(backbone, data)
    with pytest.raises(NonFiniteLossError, match=r"became nan at step 1; lower learning_rate"):
        probe(collator=lambda items: {"pixel_values": torch.full((6, 3, 32, 32), torch.nan)}).fit(backbone, data)
    tuned = probe().fit(PlainNetOfWidth(), data)
    with pytest.raises(UsageError, match="data set is empty"):
        tuned.predict([])
    with torch.no_grad():
        tuned._classifier.bias.fill_(torch.nan)
    with pytest.raises(UsageError, match="6 of 6 rows of the logits are NaN"):
        tuned.predict(data)


class PlainNetOfWidth(PlainNet):
    out_dim = 10
