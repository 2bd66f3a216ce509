"""Layers of the head watched while it trains, on one process and on two."""

import forked
import pytest
import torch
from small import backbone, head_model, images, trainer, views

import hfproj
from hfproj.data import IndexedDataset
from hfproj.diagnostics import rankme, representation_std
from hfproj.errors import UsageError
from hfproj.features.reader import Reader
from hfproj.plots.over_steps import metrics_of, plot_history
from hfproj.tuner.active import active_modules

BLOCKS = next(name for name, module in backbone().named_modules() if isinstance(module, torch.nn.ModuleList))
DEEP = {"head_options": {"hidden_dim": [12, 10], "depth": 3}}


def watched(folder, layers, **options):
    callback = hfproj.SpectrumCallback(metrics=["rankme", "std"], every=2, images=8, layers=layers)
    extra = {"callbacks": [callback]}
    run = trainer(folder, head_model(**DEEP), images(16), views(), extra=extra, **options)
    run.train()
    return run


def test_each_measured_step_has_the_layers(tmp_path):
    run = watched(tmp_path, "head", max_steps=4)
    assert [row["step"] for row in run.history if "rankme_h" in row] == [0, 2, 4]
    names = {"rankme_h", "rankme_head.0", "rankme_head.1", "rankme_head.2", "rankme_z", "std_head.0"}
    assert all(names <= row.keys() for row in run.history if "rankme_h" in row)
    model, last = run.model.eval(), run.history[-1]
    batch = views()([IndexedDataset(images(16))[i] for i in range(0, 16, 2)])
    head, found = active_modules(model).head, []
    with torch.no_grad():
        for view in batch["views"]:
            f = model(view).representation
            found.append([f := block(f) for block in [*head.hidden, head.last]])
    for i in range(3):
        f = torch.cat([of_view[i] for of_view in found])
        assert last[f"rankme_head.{i}"] == pytest.approx(rankme(f), rel=1e-4)
        assert last[f"std_head.{i}"] == pytest.approx(representation_std(f), rel=1e-4)
    assert metrics_of(run.history)["rankme"] == ["h", "head.0", "head.1", "head.2", "z"]
    labels = [text.get_text() for text in plot_history(run.history, metrics=["rankme"]).legends[0].get_texts()]
    assert {"head.0", "representation h", "projection z"} <= set(labels)


def test_some_layers_or_none(tmp_path):
    row = watched(tmp_path / "some", ["head.1"], max_steps=1).history[0]
    assert {"rankme_h", "rankme_head.1", "rankme_z"} <= row.keys()
    assert not {"rankme_head.0", "rankme_head.2"} & row.keys()
    assert not any("head." in name for name in watched(tmp_path / "none", (), max_steps=1).history[0])


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ([0, "head.1"], ["head.1", f"{BLOCKS}.0"]),
        ("all", [f"{BLOCKS}.0", f"{BLOCKS}.1"]),
        (["head", -1], ["final", "head.0", "head.1", "head.2"]),
    ],
)
def test_layers_of_the_backbone(tmp_path, layers, names):
    run = watched(tmp_path, layers, max_steps=2)
    own = {name.removeprefix("rankme_") for name in run.history[-1] if name.startswith("rankme_")}
    assert own == {*names, "h", "z"}
    assert set(metrics_of(run.history)["rankme"]) == own - {"final"}
    shown = [IndexedDataset(images(16))[i] for i in range(0, 16, 2)]
    for name in names:
        f = torch.cat([_of(run.model, view, layers, name) for view in views()(shown)["views"]])
        assert run.history[-1][f"rankme_{name}"] == pytest.approx(rankme(f), rel=1e-4)


def _of(model, view, layers, name):
    with Reader(model, torch.device("cpu"), layers=layers) as read:
        return read({"pixel_values": view})[f"layers.{name}"]


def test_what_is_watched_changes_no_training(tmp_path):
    plain, inside = (watched(tmp_path / str(i), layers, max_steps=3) for i, layers in enumerate(((), "head")))
    for a, b in zip(plain.model.parameters(), inside.model.parameters(), strict=True):
        assert torch.equal(a, b)
    keys = plain.history[0].keys()
    assert [{k: row[k] for k in keys if k in row} for row in inside.history] == [
        {k: row[k] for k in keys if k in row} for row in plain.history
    ]
    assert not any(m._forward_hooks for m in active_modules(inside.model).head.modules())


def test_refusals(tmp_path):
    for layers, message in (("head.0", "layers"), (["h"], "'h'"), (["blocks.7"], "'blocks.7'"), ([9], "9")):
        with pytest.raises(UsageError, match=message):
            watched(tmp_path, layers, max_steps=1)
    callback = hfproj.SpectrumCallback(layers="head")
    identity = head_model(head="identity", head_options={}, out_dim=None)
    with pytest.raises(UsageError, match="no linear map: there are only h and z"):
        trainer(tmp_path, identity, images(16), views(), extra={"callbacks": [callback]})
    with pytest.raises(UsageError, match=r"'head.7'\] .* it has head.0, head.1, head.2"):
        watched(tmp_path, ["head.7"], max_steps=1)


def _history(folder):
    return watched(folder, ["head", 0], max_steps=2, per_device_train_batch_size=2).history


def test_two_processes_measure_all_images(tmp_path):
    both = forked.returned(_history, tmp_path / "two", world=2)
    alone = watched(tmp_path / "one", ["head", 0], max_steps=2).history
    assert both[0][0] == both[1][0]
    for name in ("rankme_head.0", "std_head.2", f"rankme_{BLOCKS}.0", f"std_{BLOCKS}.0", "rankme_z"):
        assert both[0][0][name] == pytest.approx(alone[0][name], rel=1e-4)
