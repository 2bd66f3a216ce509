from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hfproj.data.images import EvalImages
from hfproj.errors import UsageError
from hfproj.probes.linear import LinearProbe
from hfproj.probes.mlp import MLPProbe
from hfproj.probes.nuisance import RotatedImages, probe_gap
from hfproj.results.verdict import paired_interval


def features(images, seed):
    """h holds four rotations, z of them only whether the image lies or stands."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(images)
    h = torch.nn.functional.one_hot(labels, 4) + 0.6 * torch.randn(4 * images, 4, generator=generator)
    z = h[:, ::2].sum(1, keepdim=True) - h[:, 1::2].sum(1, keepdim=True)
    return SimpleNamespace(h=h, z=z, labels=labels, index=torch.arange(images).repeat_interleave(4))


def test_gap_is_that_of_the_probes():
    train, test = features(60, 1), features(40, 2)
    mlp = MLPProbe(hidden=16, epochs=5)
    found = probe_gap(train, test, probes={"mlp": mlp}, draws=500)
    correct = {}
    for kind in ("linear", "mlp"):
        for layer in ("h", "z"):
            probe = LinearProbe() if kind == "linear" else MLPProbe(hidden=16, epochs=5)
            value = probe.fit(getattr(train, layer), train.labels).score(getattr(test, layer), test.labels)
            assert found.accuracy[f"{kind} {layer}"] == value
            correct[kind, layer] = probe.correct_
    assert not hasattr(mlp, "correct_")  # the caller's own is a pattern
    gap = found.gaps["linear h − z"]
    assert gap.difference == pytest.approx(found.accuracy["linear h"] - found.accuracy["linear z"])
    assert gap.low > 0
    by_image = [correct["linear", layer].view(40, 4).double().mean(1) for layer in ("h", "z")]
    assert gap == paired_interval(*by_image, draws=500)
    assert set(found.gaps) == {"linear h − z", "mlp h − z", "h mlp − linear", "z mlp − linear"}
    assert found.gaps["z mlp − linear"].difference == pytest.approx(
        found.accuracy["mlp z"] - found.accuracy["linear z"]
    )
    assert found.protocol["interval"]["rows_drawn_together"] == 4
    assert found.protocol["mlp z"]["hidden"] == 16


def test_rows_in_any_order_stay_together():
    train, test = features(60, 1), features(40, 2)
    probes = {"mlp": MLPProbe(hidden=4, epochs=1)}
    expected = probe_gap(train, test, probes=probes, draws=200)
    order = torch.randperm(160)
    mixed = SimpleNamespace(**{name: value[order] for name, value in vars(test).items()})
    found = probe_gap(train, mixed, probes=probes, draws=200)
    assert found.accuracy == pytest.approx(expected.accuracy)
    assert found.gaps["linear h − z"] == pytest.approx(expected.gaps["linear h − z"])
    uneven = SimpleNamespace(**{name: value[:-1] for name, value in vars(test).items()})
    assert probe_gap(train, uneven, probes=probes, draws=50).protocol["interval"]["rows_drawn_together"] == 1


def test_other_labels_and_a_probe_for_each_layer():
    train, test = features(30, 1), features(30, 2)
    labels = train.labels % 2
    train.labels = test.labels = None
    probes = {"mlp": {"h": MLPProbe(hidden=4, epochs=1), "z": MLPProbe(hidden=8, epochs=1)}}
    found = probe_gap(train, test, train_labels=labels, test_labels=labels, probes=probes, draws=50)
    assert [found.protocol[f"mlp {layer}"]["hidden"] for layer in ("h", "z")] == [4, 8]
    with pytest.raises(UsageError, match="train_labels"):
        probe_gap(train, test)
    with pytest.raises(UsageError, match="Did you mean 'linear'"):
        probe_gap(train, test, train_labels=labels, test_labels=labels, probes={"liner": LinearProbe()})
    with pytest.raises(UsageError, match="for 'h' and 'z'"):
        probe_gap(train, test, train_labels=labels, test_labels=labels, probes={"linear": {"h": LinearProbe()}})


def test_four_exact_rotations():
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8).numpy()
    images = [Image.fromarray(p) for p in pixels]
    turned = RotatedImages([{"image": image, "label": 9, "path": i} for i, image in enumerate(images)])
    assert len(turned) == 8
    for i in range(2):
        for turns, angle in enumerate((0, 90, 180, 270)):
            item = turned[4 * i + turns]
            expected = np.asarray(images[i].rotate(angle, expand=True))
            assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), expected)
            assert (item["label"], item["index"], item["path"]) == (turns, i, i)
    assert turned[-1]["index"] == 1
    with pytest.raises(IndexError):
        turned[8]
    batch = EvalImages(size=4, mean=(0.5,) * 3, std=(0.5,) * 3)([turned[i] for i in range(8)])
    assert batch["labels"].tolist() == [0, 1, 2, 3] * 2
    assert batch["index"].tolist() == [0] * 4 + [1] * 4


def test_rotations_of_pairs_and_other_columns():
    image = torch.arange(4, dtype=torch.uint8).view(2, 2).expand(3, 2, 2)
    assert RotatedImages([(image, 5)])[2]["image"][0].tolist() == [[3, 2], [1, 0]]
    turned = RotatedImages([{"photo": image, "label": 5}], image_column="photo", label_column="turns")[1]
    assert (turned["turns"], turned["label"]) == (1, 5)
    with pytest.raises(UsageError, match="image_column"):
        RotatedImages([{"photo": image}])[0]
    with pytest.raises(UsageError, match="generator"):
        RotatedImages(image for _ in range(3))
