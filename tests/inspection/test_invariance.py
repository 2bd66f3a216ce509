"""The invariance report, beside what it is made of: views at two strengths, a probe, the metric of the head."""

import pytest
import torch
from small import head_model, images, views
from torch.nn.functional import cosine_similarity

import hfproj
from hfproj.data.transforms import TransformedImages, transforms_of
from hfproj.errors import NotMeasurableError, UsageError
from hfproj.results.inside import Invariance

OPTIONS = {"draws": 200, "images": 24}
TURNED = {"rotation_degrees": 40, "scale": None, "flip_probability": 0.0, "blur_probability": 0}


def linear_head(weight):
    """A model whose head is one given matrix."""
    model = head_model(head="linear", head_options={}, out_dim=len(weight), lora=False)
    hfproj.inspection.subject.active_head(model).linear.weight.data = weight
    return model.eval()


def test_numbers_are_those_of_the_two_strengths():
    model, test, seen = head_model().eval(), images(24), views(**TURNED)
    assert list(transforms_of(seen)) == ["rotation"]
    model.train()(torch.randn(64, 3, 16, 16))
    model.eval()
    found = hfproj.invariance_report(model, test, seen, train=images(24, seed=5), layers=True, **OPTIONS)
    [one] = found.moved
    sides = [
        hfproj.extract_features(model, test, layers="head", collator=TransformedImages(seen, "rotation", end))
        for end in (0, 1)
    ]
    assert list(one.known) == ["h", "head.0", "z"]
    for layer in ("h", "head.0", "z"):
        a, b = (side.by_name()[layer].double() for side in sides)
        n = len(a)
        apart = sum((a[i] - a[j]).norm() for i in range(n) for j in range(i)) / (n * (n - 1) / 2)
        assert one.distance[layer] == pytest.approx(float((a - b).norm(dim=1).mean() / apart), rel=1e-4)
        assert one.cosine[layer] == pytest.approx(float(cosine_similarity(a, b).mean()), rel=1e-5)
        assert one.known[layer].low <= one.known[layer][0] <= one.known[layer].high
    assert one.lost.difference == pytest.approx(one.known["h"][0] - one.known["z"][0])
    assert one.ends == ("−20°", "+20°")
    assert "rotation" in found.table()
    assert Invariance.from_dict(found.to_dict()) == found


def test_a_head_that_keeps_everything_loses_nothing():
    model = head_model(head="identity", head_options={}, out_dim=None).eval()
    for one in hfproj.invariance_report(model, images(32), views(rotation_degrees=60), **OPTIONS).moved:
        assert one.distance["h"] == one.distance["z"]
        assert one.known["h"] == one.known["z"]
        assert tuple(one.lost) == (0.0, 0.0, 0.0)
        assert one.degeneracy is None or one.degeneracy == pytest.approx(1.0)


def test_a_head_that_drops_the_move_is_invariant_to_it():
    """W annihilates every h' − h of the images that are asked: distance 0, chance, degeneracy 0."""
    plain = head_model(head="identity", head_options={}, out_dim=None, lora=False).eval()
    seen, test = views(**TURNED), images(12)
    sides = [hfproj.extract_features(plain, test, collator=TransformedImages(seen, "rotation", end)) for end in (0, 1)]
    moves = (sides[1].h - sides[0].h).double()
    weight = torch.linalg.svd(moves, full_matrices=True)[2][12:].float()  # 4 directions in which nothing moves
    model = linear_head(weight)
    [one] = hfproj.invariance_report(model, test, seen, train=images(24, seed=5), **OPTIONS).moved
    assert one.distance["h"] > 0.05
    assert one.distance["z"] < 1e-4
    assert one.known["z"][0] == 0.5
    assert one.degeneracy < 1e-8


def test_what_does_not_change_the_images_is_still():
    grey = [{"image": item["image"].convert("L"), "label": 0} for item in images(24)]
    seen = views(
        **TURNED, **{"color_jitter_strength": 1.0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0.2}
    )
    model = head_model(head="linear", head_options={}).eval()
    found = {one.transform: one for one in hfproj.invariance_report(model, grey, seen, **OPTIONS).moved}
    assert found["hue"].distance["h"] < 1e-4
    assert tuple(found["hue"].known["h"]) == (0.5, 0.5, 0.5)
    assert found["hue"].degeneracy is None
    assert found["rotation"].distance["h"] > 1e-3


def test_without_train_the_halves_share_no_image():
    model, test, seen = head_model(head="linear", head_options={}).eval(), images(40), views(**TURNED)
    found = hfproj.invariance_report(model, test, seen, draws=100)
    assert found.protocol["fitted_on_images"] == found.protocol["asked_of_images"] == 20
    assert found == hfproj.invariance_report(model, test, seen, draws=100)


def test_refusals():
    model = head_model(head="linear", head_options={}).eval()
    off = hfproj.ImageViews(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, augmentation=hfproj.data.Augmentation.none())
    with pytest.raises(UsageError, match="all parts off"):
        hfproj.invariance_report(model, images(24), off)
    with pytest.raises(NotMeasurableError, match="at least 16 images"):
        hfproj.invariance_report(model, images(10), views())
    with pytest.raises(UsageError, match="`test` with a length"):
        hfproj.invariance_report(model, (item for item in images(10)), views())
    with model.disable_adapter(), pytest.raises(UsageError, match="active projection head"):
        hfproj.invariance_report(model, images(24), views())
