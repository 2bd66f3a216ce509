"""Layers of the active head beside those of the backbone: extracted, evaluated, cached, over processes."""

import copy

import forked
import pytest
import torch
from cases import make_backbone
from peft import LoraConfig, get_peft_model

import hfproj
from hfproj.diagnostics import rankme
from hfproj.errors import UsageError
from hfproj.features import extract_features
from hfproj.heads.layers import LayerTrace
from hfproj.tuner.active import active_modules

OPTIONS = {"hidden_dim": [10, 9], "depth": 3, "last_norm": "batch"}


class Collator:
    cache_key = "stacked"

    def __call__(self, items):
        return {"pixel_values": torch.stack([i["x"] for i in items]), "labels": torch.tensor([i["y"] for i in items])}


def pixels(rows=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(3, 32, 32, generator=generator), "y": i % 3} for i in range(rows)]


def head_model(backbone="vit", head="mlp", options=None, out_dim=4, **config):
    torch.manual_seed(0)
    options = OPTIONS if options is None else options
    config = hfproj.ProjectionHeadConfig(head=head, head_options=options, out_dim=out_dim, **config)
    model = get_peft_model(make_backbone(backbone), config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def head_in_use(model):
    return active_modules(model).head


def by_hand(head, h):
    found = []
    for block in [*head.hidden, head.last]:
        found.append(h := block(h))
    return found


@pytest.mark.parametrize("config", [
    {}, {"predictor": {"head": "mlp", "hidden_dim": 6}}, {"prototypes": 5}, {"layer": 1},
    {"options": {**OPTIONS, "l2_normalise": True}},
    {"backbone_adapter": LoraConfig(target_modules=["q_proj", "v_proj"], r=2)}, {"backbone": "timm_cnn"},
], ids=lambda config: " ".join(config) or "plain")  # fmt: skip
def test_head_layers_are_what_its_blocks_give(config):
    model, data = head_model(**config), pixels()
    found = extract_features(model, data, layers=["head.2", 0, "head.0", "head.1"], collator=Collator(), batch_size=4)
    head = head_in_use(model).eval()
    with torch.no_grad():
        expected = by_hand(head, found.h)
    assert next(iter(found.layers)) == "head.2"
    assert len(found.layers) == 4
    assert [*found.by_name()][1:] == ["h", "head.2", "head.0", "head.1", "z"]
    for i, f in enumerate(expected):
        assert torch.allclose(found.layers[f"head.{i}"], f, atol=1e-6)
    unit = head.l2_normalise
    assert torch.allclose(
        torch.nn.functional.normalize(expected[-1], dim=1) if unit else expected[-1], found.z, atol=1e-6
    )
    plain = extract_features(model, data, collator=Collator(), batch_size=4)
    assert torch.equal(plain.h, found.h)
    assert torch.equal(plain.z, found.z)


def test_all_layers_of_the_head_by_one_word():
    model, data = head_model(), pixels()
    names = ["head.0", "head.1", "head.2"]
    for layers in ("head", ["head"], names):
        assert [*extract_features(model, data, layers=layers, collator=Collator()).layers] == names
    blocks = [*extract_features(model, data, layers="all", collator=Collator()).layers]
    assert len(blocks) == 3
    assert not any("head" in name for name in blocks)


def test_blocks_behind_the_one_that_the_head_reads_still_do_not_run():
    model = head_model(layer=0)
    ran = []
    last = hfproj.backbones.blocks_of(model.get_base_model())[-1]
    model.get_base_model().get_submodule(str(last)).register_forward_hook(lambda *_: ran.append(1))
    extract_features(model, pixels(), layers="head", collator=Collator())
    without = len(ran)
    extract_features(model, pixels(), collator=Collator())
    assert without == len(ran) - without


def test_the_active_adapter_of_several():
    model, data = head_model(), pixels()
    model.add_adapter("other", hfproj.ProjectionHeadConfig(head="linear", out_dim=6))
    assert len(extract_features(model, data, layers="head", collator=Collator()).layers) == 3
    model.set_adapter("other")
    found = extract_features(model, data, layers="head", collator=Collator())
    assert [*found.layers] == ["head.0"]
    assert torch.equal(found.layers["head.0"], found.z)
    with pytest.raises(UsageError, match=r"'head.1'.*LinearHead; it has head.0 beside h and z"):
        extract_features(model, data, layers=["head.1"], collator=Collator())
    with model.disable_adapter(), pytest.raises(UsageError, match=r"active head.*got none"):
        extract_features(model, data, layers="head", collator=Collator())


def test_what_a_head_does_not_have_is_refused():
    data = pixels(3)
    identity = head_model(head="identity", options={}, out_dim=None)
    with pytest.raises(UsageError, match="IdentityHead; it has no linear map: there are only h and z"):
        extract_features(identity, data, layers="head", collator=Collator())
    with pytest.raises(UsageError, match=r"head.0, head.1, head.2 beside h and z"):
        extract_features(head_model(), data, layers=["head.7"], collator=Collator())
    with pytest.raises(UsageError, match=r"layers=\['head.0'\]"):
        extract_features(head_model(), data, layers="head.0", collator=Collator())
    with pytest.raises(UsageError, match="active head"):
        extract_features(make_backbone("vit"), data, layers=["head.0"], collator=Collator())


def test_a_backbones_own_module_of_that_name():
    backbone = make_backbone("timm_vit")  # it has a module "head"
    assert [*extract_features(backbone, pixels(3), layers=["head"], collator=Collator()).layers] == ["head"]


def test_cached_with_a_key_of_their_own(tmp_path):
    model, data = head_model(), pixels()
    options = {"collator": Collator(), "cache_dir": tmp_path, "batch_size": 4}
    first = extract_features(model, data, layers="head", **options)
    caches = len([*tmp_path.iterdir()])
    again = extract_features(copy.deepcopy(model), data, layers="head", **options)
    assert len([*tmp_path.iterdir()]) == caches
    assert all(torch.equal(f, again.layers[name]) for name, f in first.layers.items())
    fewer = extract_features(model, data, layers=["head.1"], **options)
    assert torch.equal(fewer.layers["head.1"], first.layers["head.1"])
    assert len([*tmp_path.iterdir()]) > caches
    head_in_use(model).hidden[0].linear.weight.data.add_(1)
    changed = extract_features(model, data, layers="head", **options)
    assert not torch.equal(changed.layers["head.0"], first.layers["head.0"])


def extracted():
    found = extract_features(head_model(), pixels(), layers="head", collator=Collator(), batch_size=4)
    return {name: f.tolist() for name, f in found.by_name().items()}


def test_two_processes_give_what_one_does():
    alone = extracted()
    for rank in forked.returned(extracted, world=2):
        assert rank.keys() == alone.keys()
        for name, rows in alone.items():
            assert torch.allclose(torch.tensor(rank[name]), torch.tensor(rows), atol=1e-6)


def test_half_precision_of_the_model_and_of_what_is_kept():
    model = head_model()
    half = extract_features(
        model, pixels(), layers="head", collator=Collator(), dtype=torch.float16, autocast=torch.bfloat16
    )
    whole = extract_features(model, pixels(), layers="head", collator=Collator())
    for name, f in half.layers.items():
        assert f.dtype == torch.float16
        assert (f.float() - whole.layers[name]).norm() < 0.05 * whole.layers[name].norm()


def test_evaluate_measures_them_as_it_does_h():
    model, train, test = head_model(), pixels(60, 1), pixels(30, 2)
    results = hfproj.evaluate(model, train=train, test=test, collator=Collator(), layers="head", dataset="toy")
    bank, held = (extract_features(model, d, collator=Collator(), layers="head") for d in (train, test))
    for name in ("head.0", "head.1", "head.2"):
        assert results.value("rankme", name, "after") == rankme(held.layers[name])
        probe = hfproj.KNNProbe().fit(bank.layers[name], bank.labels)
        assert results.value("knn", name, "after") == probe.score(held.layers[name], held.labels)
        assert len(results.spectra[f"{name} after"]) == held.layers[name].shape[1]


def test_hooks_are_gone_after_an_error():
    model = head_model()

    def broken(items):
        raise RuntimeError("unreadable")

    with pytest.raises(RuntimeError, match="unreadable"):
        extract_features(model, pixels(), layers="head", collator=broken)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in head_in_use(model).modules())
    with LayerTrace(head_in_use(model)) as trace:
        model(pixel_values=torch.randn(2, 3, 32, 32))
    assert len(trace.outputs) == 3
