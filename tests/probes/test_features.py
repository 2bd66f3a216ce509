import types

import numpy as np
import pytest
import torch
from torch import nn

from hfproj.diagnostics import covariance_spectrum, positive_cosine, rankme, representation_std
from hfproj.errors import UsageError
from hfproj.probes import KNNProbe, evaluate, extract_features
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
    import hfproj.probes.features as module

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

    class Bare(nn.Linear):
        def forward(self, pixel_values):
            return super().forward(pixel_values.flatten(1))

    with pytest.raises(UsageError, match="adapter disabled"):
        extract_features(Bare(12, 2), dataset(), collator=Collator())


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
    results = evaluate(
        model, probes=[KNNProbe(k=1), KNNProbe(k=5)], train=data, test=data, collator=Collator(), views=views
    )
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
    assert {m.name for m in results.measurements} == {"rankme", "representation_std"}
    base = f"./{tmp_path.name}"
    expected = {"base_model_name_or_path": base, "head": "mlp", "backbone": {"id": base}}
    assert results.config == {"base_model": base, "adapter": expected}
    assert Results.load(results.save(tmp_path)).measurements == results.measurements
    with pytest.raises(UsageError, match="need labels"):
        evaluate(model, probes=[KNNProbe()], train=dataset(), test=dataset(), collator=Collator(labels=False))
