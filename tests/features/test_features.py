import types

import numpy as np
import pytest
import torch
from cases import BACKBONES, BLOCKS, TEXT, WIDTHS, make_backbone
from peft import get_peft_model
from torch import nn

import hfproj
from hfproj.backbones import blocks_of, resolve_read_point
from hfproj.diagnostics import covariance_spectrum, positive_cosine, rankme, representation_std
from hfproj.errors import UsageError
from hfproj.features import extract_features
from hfproj.features.reader import run_head
from hfproj.probes import KNNProbe, evaluate
from hfproj.results import Results


class Tiny(nn.Module):
    """A backbone and a head that return what a model with a projection head returns."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
        self.seen = []

    def forward(self, pixel_values):
        self.seen.append(len(pixel_values))
        h = self.backbone(pixel_values)
        return types.SimpleNamespace(representation=h, projection=self.head(h))


class Collator:
    def __init__(self, labels=True, text=False):
        self.labels, self.text = labels, text

    def __call__(self, items):
        x = torch.stack([item["x"] for item in items])
        batch = {"inputs": {"pixel_values": x}} if self.text else {"pixel_values": x}
        return batch | ({"labels": torch.tensor([item["y"] for item in items])} if self.labels else {})


def dataset(rows=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (rows,), generator=generator)
    x = torch.randn(rows, 3, 2, 2, generator=generator) + y[:, None, None, None]
    return [{"x": x[i], "y": int(y[i])} for i in range(rows)]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_features_are_the_model_in_eval_mode_in_the_order_of_the_data(batch_size, text):
    model, data = Tiny(), dataset()
    features = extract_features(model, data, batch_size=batch_size, collator=Collator(text=text))
    out = model.eval()(torch.stack([item["x"] for item in data]))
    assert torch.allclose(features.h, out.representation, atol=1e-6)
    assert torch.allclose(features.z, out.projection, atol=1e-6)
    assert features.labels.tolist() == [item["y"] for item in data]
    assert features.index.tolist() == list(range(23))
    assert len(features) == 23
    assert features.h.dtype == torch.float32
    assert not features.h.is_inference()
    (nn.Linear(6, 1)(features.h).sum()).backward()  # a probe can train on them


def test_training_flags_and_random_state_come_back():
    model = Tiny().train()
    model.head[1].eval()
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    extract_features(model, dataset(), collator=Collator())
    assert [m.training for m in model.modules()] == flags
    assert torch.get_rng_state().equal(state)

    def broken(items):
        raise RuntimeError("unreadable")

    with pytest.raises(RuntimeError, match="unreadable"):
        extract_features(model, dataset(), collator=broken)
    assert [m.training for m in model.modules()] == flags
    assert model.head[1].num_batches_tracked == 0


def test_index_of_the_collator_and_no_labels():
    def collator(items):
        return {"pixel_values": torch.stack([i["x"] for i in items]), "index": np.array([i["y"] + 10 for i in items])}

    features = extract_features(Tiny(), dataset(), collator=collator)
    assert features.labels is None
    assert features.index.tolist() == [item["y"] + 10 for item in dataset()]


def test_shares_of_several_processes_cover_each_row_once(monkeypatch):
    import hfproj.features.extraction as module

    model, data = Tiny().eval(), dataset(5)
    whole = extract_features(model, data, collator=Collator())
    monkeypatch.setattr(module, "world_size", lambda: 8)
    parts = []
    for rank in range(8):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(module, "gather_rows", lambda x: x)
        parts.append(extract_features(model, data, collator=Collator(), batch_size=2))
    assert {len(part) for part in parts} == {0, 1}
    assert parts[0].h.shape == (0, 6)
    for name in ("h", "z", "labels", "index"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.allclose(joined.float(), getattr(whole, name).float(), atol=1e-6)


def test_refusals():
    with pytest.raises(UsageError, match="empty"):
        extract_features(Tiny(), [], collator=Collator())
    with pytest.raises(UsageError, match=r"\['images'\]"):
        extract_features(Tiny(), dataset(), collator=lambda items: {"images": 1})
    with pytest.raises(UsageError, match="got a generator"):
        extract_features(Tiny(), (item for item in dataset()), collator=Collator())
    with pytest.raises(UsageError, match="batch_size=0"):
        extract_features(Tiny(), dataset(), collator=Collator(), batch_size=0)
    with pytest.raises(UsageError, match=r"dtype=torch.int64"):
        extract_features(Tiny(), dataset(), collator=Collator(), dtype=torch.int64)
    with pytest.raises(UsageError, match="cache_dir"):
        extract_features(Tiny(), dataset(), collator=Collator(), data_key="digits")
    with pytest.raises(UsageError, match="'labels' of a batch of 7 items has 3 rows"):
        extract_features(Tiny(), dataset(7), collator=lambda items: Collator()(items) | {"labels": torch.arange(3)})
    with pytest.raises(UsageError, match="for some batches"):
        extract_features(Tiny(), dataset(), batch_size=9, collator=lambda i: Collator(labels=len(i) == 9)(i))
    with pytest.raises(UsageError, match="returned dict"):
        extract_features(Odd(lambda x: {"h": x}), dataset(), collator=Collator())
    with pytest.raises(UsageError, match="without `representation`"):
        run_head(Odd(lambda x: x.flatten(1)), Collator()(dataset(3)), torch.device("cpu"))


class Odd(nn.Module):
    """A model that returns whatever a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(1))

    def forward(self, pixel_values):
        return self.function(pixel_values)


IMAGES = [name for name in BACKBONES if name not in TEXT]


def pixels(rows=5, size=32):
    x = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(3))
    return [{"x": x[i], "y": i} for i in range(rows)]


@pytest.mark.parametrize("name", IMAGES)
def test_a_backbone_without_a_head_gives_the_h_and_the_layers_that_heads_on_it_read(name):
    data, options = pixels(), {"collator": Collator(), "batch_size": 3}
    blocks = blocks_of(make_backbone(name))
    features = extract_features(make_backbone(name), data, layers=[0, *blocks[1:], -1], **options)
    assert features.z is None
    assert list(features.layers) == [*blocks, "final"]
    width = {"in_dim": WIDTHS[name]} if name == "plain" else {}
    for layer in (-1, 0, len(blocks) - 1) if name != "plain" else (-1,):
        config = hfproj.ProjectionHeadConfig(head="linear", out_dim=4, layer=layer, **width)
        model = get_peft_model(make_backbone(name), config)
        expected = extract_features(model, data, **options)
        assert expected.z.shape == (5, 4)
        found = features.layers["final" if layer == -1 else blocks[layer]]
        # torch picks the kernel of SigLIP's attention pooling by whether its weights are frozen
        torch.testing.assert_close(found, expected.h, rtol=0, atol=1e-6 if name == "siglip" else 0)
        with model.disable_adapter():
            bare = extract_features(model, data, **options)
        assert bare.z is None
        torch.testing.assert_close(bare.h, expected.h, rtol=0, atol=0)
    assert features.h.equal(features.layers["final"])


@pytest.mark.parametrize("name", ["timm_vit", "timm_cnn", "vit", "dinov2_registers", "siglip"])
def test_h_is_pooled_from_the_tokens(name):
    backbone = make_backbone(name)
    for pooling in ("mean", "max"):
        f = extract_features(backbone, pixels(), collator=Collator(), tokens=True, pooling=pooling)
        prefix = resolve_read_point(backbone).prefix_tokens
        patches = f.tokens[:, prefix:]
        expected = patches.mean(1) if pooling == "mean" else patches.amax(1)
        torch.testing.assert_close(f.h, expected, rtol=1e-5, atol=1e-6)
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(head="linear", out_dim=4, layer=1))
    f = extract_features(model, pixels(), collator=Collator(), tokens=True)
    pooled = f.tokens[:, 0] if model.peft_config["default"].pooling == "cls" else f.tokens.mean(1)
    torch.testing.assert_close(f.h, pooled, rtol=1e-5, atol=1e-6)


def test_layers_by_name_of_a_plain_module_and_of_a_model_with_a_head():
    model, data = Tiny().eval(), dataset()
    f = extract_features(model, data, collator=Collator(), layers=["backbone.1", "head.0"])
    x = torch.stack([item["x"] for item in data])
    torch.testing.assert_close(f.layers["backbone.1"], f.h, rtol=0, atol=0)
    torch.testing.assert_close(f.layers["head.0"], model.head[0](model.backbone(x)).detach(), rtol=1e-5, atol=1e-6)
    assert list(f.by_name()) == ["backbone.1", "h", "head.0", "z"]
    assert not any(m._forward_hooks for m in model.modules())


def test_text_is_pooled_over_its_own_tokens():
    ids, mask = torch.randint(1, 50, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    mask[1, 4:], mask[3, 2:] = 0, 0
    rows = [{"ids": ids[i], "mask": mask[i]} for i in range(4)]

    def collator(items):
        stacked = {n: torch.stack([i[n] for i in items]) for n in ("ids", "mask")}
        return {"inputs": {"input_ids": stacked["ids"], "attention_mask": stacked["mask"]}}

    backbone = make_backbone("bert")
    f = extract_features(backbone, rows, collator=collator, pooling="mean", layers=[1], tokens=True)
    weights = mask[..., None] / mask.sum(1)[:, None, None]
    torch.testing.assert_close(f.h, (f.tokens * weights).sum(1), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        hidden = backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(f.layers["encoder.layer.1"], (hidden * weights).sum(1), rtol=1e-5, atol=1e-6)


def test_a_pooler_has_no_layers_of_its_own():
    f = extract_features(make_backbone("bert"), TOKENS, collator=ids_only, pooling="pooler", layers=[0], tokens=True)
    default = extract_features(make_backbone("bert"), TOKENS, collator=ids_only, layers=[0], tokens=True)
    with torch.no_grad():
        pooled = make_backbone("bert")(**ids_only(TOKENS)["inputs"]).pooler_output
    torch.testing.assert_close(f.h, pooled, rtol=1e-5, atol=1e-6)
    assert f.layers["encoder.layer.0"].equal(default.layers["encoder.layer.0"])
    assert f.tokens.equal(default.tokens)


TOKENS = [{"ids": [1, 2, 3]}, {"ids": [4, 5, 6]}]


def ids_only(items):
    return {"inputs": {"input_ids": torch.tensor([item["ids"] for item in items])}}


def test_images_of_another_size_interpolate_the_positions_as_with_a_head():
    options = {"collator": Collator(), "tokens": True}
    bare = extract_features(make_backbone("vit"), pixels(size=48), **options)
    model = get_peft_model(make_backbone("vit"), hfproj.ProjectionHeadConfig(head="linear", out_dim=4))
    assert bare.tokens.shape == (5, 37, 16)
    assert bare.h.equal(extract_features(model, pixels(size=48), **options).h)


def test_precision_of_the_model_and_of_what_is_kept():
    backbone, options = make_backbone("vit_nano"), {"collator": Collator(), "layers": [2], "tokens": True}
    exact = extract_features(backbone, pixels(), **options)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        kept = extract_features(backbone, pixels(), dtype=dtype, **options)
        assert kept.h.equal(exact.h.to(dtype))
        assert kept.tokens.equal(exact.tokens.to(dtype))
        assert kept.layers[f"{BLOCKS}.2"].equal(exact.layers[f"{BLOCKS}.2"].to(dtype))
    mixed = extract_features(backbone, pixels(), autocast=torch.bfloat16, **options)
    with torch.autocast("cpu", torch.bfloat16):
        outside = extract_features(backbone, pixels(), **options)
    assert mixed.h.dtype == torch.float32
    assert mixed.h.equal(outside.h)
    error = (mixed.h - exact.h).norm() / exact.h.norm()
    assert 1e-4 < error < 0.05
    with pytest.raises(UsageError, match=r"up to 1e\+05.*bfloat16"):
        extract_features(
            Odd(lambda x: x.flatten(1) * 0 + 1e5), dataset(), collator=Collator(labels=False), dtype=torch.float16
        )


def test_what_cannot_be_read_is_refused():
    data, options = pixels(), {"collator": Collator()}
    with pytest.raises(UsageError, match=rf"Unknown layer 'layer.2'. Did you mean '{BLOCKS}.2'"):
        extract_features(make_backbone("vit"), data, layers=["layer.2"], **options)
    with pytest.raises(UsageError, match=r"layers=\['layers.2'\]"):
        extract_features(make_backbone("vit"), data, layers="layers.2", **options)
    with pytest.raises(UsageError, match="3 blocks"):
        extract_features(make_backbone("vit"), data, layers=[3], **options)
    with pytest.raises(UsageError, match="one vector per item"):
        extract_features(make_backbone("plain"), data, tokens=True, **options)
    model = get_peft_model(make_backbone("vit"), hfproj.ProjectionHeadConfig(head="linear", out_dim=4))
    with pytest.raises(UsageError, match=r"pooling=.cls., got pooling=.mean.; leave pooling out"):
        extract_features(model, data, pooling="mean", **options)


def test_tokens_of_different_lengths_are_refused():
    items = [*TOKENS, {"ids": [7, 8]}]
    assert len(extract_features(make_backbone("bert"), items, collator=ids_only, batch_size=1)) == 3
    with pytest.raises(UsageError, match=r"\[\(2, 16\), \(3, 16\)\].*pad all items"):
        extract_features(make_backbone("bert"), items, collator=ids_only, batch_size=1, tokens=True)


def test_all_blocks():
    f = extract_features(make_backbone("vit"), pixels(), collator=Collator(), layers="all")
    assert list(f.layers) == [f"{BLOCKS}.{n}" for n in range(3)]


def test_evaluate_is_its_parts():
    model, train, test = Tiny(), dataset(60, 1), dataset(30, 2)
    results = evaluate(model, train=train, test=test, collator=Collator(), dataset="toy", when="before", seed=4)
    bank, held = (extract_features(model, d, collator=Collator()) for d in (train, test))
    for layer in ("h", "z"):
        f = getattr(held, layer)
        probe = KNNProbe().fit(getattr(bank, layer), bank.labels)
        assert results.value("knn", layer, "before") == probe.score(f, held.labels)
        assert (results.outcomes("knn", layer, "before")[0] == probe.correct_.numpy()).all()
        assert results.value("rankme", layer, "before") == rankme(f)
        assert results.value("representation_std", layer, "before") == representation_std(f)
        assert results.spectra[f"{layer} before"] == covariance_spectrum(f).tolist()
    assert results.measurements[0].protocol["seed"] == 4
    assert {m.dataset for m in results.measurements} == {"toy"}


def test_evaluate_with_views_and_probes():
    def views(items):
        x = torch.stack([item["x"] for item in items])
        assert all("index" in item for item in items)
        return {"views": [x, x + 0.1]}

    model, data = Tiny(), dataset(40)
    probes = [KNNProbe(k=1), KNNProbe(k=5)]
    with pytest.warns(UserWarning, match="`train` and `test` are the same data"):
        results = evaluate(model, probes=probes, train=data, test=[*data], collator=Collator(), views=views)
    assert results.value("knn", "h", "after", k=1) == 1.0
    assert results.value("knn", "h", "after", k=5) <= 1.0
    x = torch.stack([item["x"] for item in data])
    model.eval()
    h = torch.stack([model(x).representation, model(x + 0.1).representation])
    assert results.value("positive_cosine", "h", "after") == pytest.approx(positive_cosine(h), rel=1e-6)


def test_evaluate_without_labels_and_config(tmp_path):
    model = Tiny()
    model.active_adapter = "default"
    adapter = {"base_model_name_or_path": str(tmp_path), "head": "mlp", "backbone": {"id": str(tmp_path)}, "none": None}
    model.peft_config = {"default": types.SimpleNamespace(to_dict=lambda: adapter)}
    results = evaluate(model, train=dataset(), test=dataset(), collator=Collator(labels=False))
    names = {m.name for m in results.measurements}
    assert names == {"rankme", "representation_std", "uniformity"}  # too few dimensions for α-ReQ
    base = f"./{tmp_path.name}"
    expected = {"base_model_name_or_path": base, "head": "mlp", "backbone": {"id": base}}
    assert results.config == {"base_model": base, "adapter": expected}
    assert Results.load(results.save(tmp_path)).measurements == results.measurements
    with pytest.raises(UsageError, match="need labels"):
        evaluate(model, probes=[KNNProbe()], train=dataset(), test=dataset(), collator=Collator(labels=False))
