"""Graphs of the head, and of backbone and head: the same h and z as the model's own, in PyTorch and in onnxruntime."""

import importlib.util
import json
import os
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from cases import assert_refused, assert_same_tensors, make_backbone, make_config, make_inputs, perturb, snapshot
from peft import get_peft_model
from test_saved import IN_DIM, KEEPS_WIDTH, OPTIONS, SMALL, perturb_everything
from torch import nn
from transformers import ResNetConfig, ResNetModel

import hfproj
from hfproj.backbones import blocks_of
from hfproj.heads import HEADS, list_heads
from hfproj.heads.presets import PRESETS as PAPER_HEADS

LIMIT = 1e-5  # of the largest value
WITH_ONNX = importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript")
needs_onnx = pytest.mark.skipif(not WITH_ONNX, reason="onnx and onnxscript are not installed (the extra 'export')")
needs_runtime = pytest.mark.skipif(
    not (WITH_ONNX and importlib.util.find_spec("onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed (the extra 'export')",
)


def make_head(name, **options):
    widths = {} if name in KEEPS_WIDTH else {"out_dim": 3}
    head = hfproj.create_head(name, in_dim=IN_DIM, **{**widths, **OPTIONS.get(name, SMALL), **options})
    perturb_everything(head)
    return head


def attach(name, trained="lora", **options):
    """Attach a head to a backbone of which the first block is left (two, where one is read): tracing is slow."""
    backbone = make_backbone(name)
    if name not in ("plain", "timm_cnn"):
        blocks, _, _ = blocks_of(backbone)[0].rpartition(".")
        del backbone.get_submodule(blocks)[1 + ("layer" in options) :]
    model = get_peft_model(backbone, make_config(name, trained, **options))
    perturb(model)
    return model.eval()


def program(path):
    module = torch.export.load(path).module()
    return lambda inputs: module(**inputs)


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    run = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in run.get_outputs()]
    return lambda inputs: {
        name: torch.from_numpy(value)
        for name, value in zip(names, run.run(None, {n: t.numpy() for n, t in inputs.items()}))
    }


def assert_close(got, expected):
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert got[name].dtype == torch.float32
        assert (got[name] - value).abs().max() <= LIMIT * value.abs().max(), name


def assert_same_outputs(run, model, name, batches=((1, 0), (5, 1))):
    """`model` itself, with its hooks and PEFT layers, is the reference; `run` takes image inputs as pixel_values."""
    for rows, seed in batches:
        inputs = make_inputs(name, batch=rows, seed=seed)
        with torch.no_grad():
            out = model(**inputs)
        renamed = {"pixel_values": inputs["x"]} if "x" in inputs and name != "plain" else inputs
        assert_close(run(renamed), {"h": out.representation, "z": out.projection})


DISTINCT = {repr(make_head(name)): name for name in reversed(list_heads())}  # several papers have the same head


def in_suite(name):
    """A paper's MLP differs from "mlp" in widths and norms only."""
    return pytest.param(name, marks=pytest.mark.long) if name in PAPER_HEADS and name != "simclr" else name


@pytest.mark.parametrize("name", [in_suite(name) for name in sorted(DISTINCT.values())])
def test_every_head_as_a_program(name, tmp_path):
    if name == "barlow_twins" and torch.__version__ < "2.11":
        pytest.skip("its program is wrong for one row in older torch, which the export notices and refuses")
    head = make_head(name)
    run = program(hfproj.export_program(head, tmp_path / "head.pt2", part="head", check=False))
    assert head.training  # a head as it comes from create_head: what is exported is its copy in eval mode
    head.eval()
    for rows in (1, 5):
        h = torch.randn(rows, IN_DIM)
        with torch.no_grad():
            assert_close(run({"h": h}), {"z": head(h)})


@needs_runtime
def test_without_onnxruntime_it_is_said_that_nothing_was_compared(tmp_path, monkeypatch):
    """And the graph of the head whose z is h itself is right all the same."""
    head, find = make_head("identity"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.warns(UserWarning, match="not compared with the model"):
        path = hfproj.export_onnx(head, tmp_path / "head.onnx", part="head")
    h = torch.randn(4, IN_DIM)
    assert torch.equal(session(path)({"h": h})["z"], h)


@needs_runtime
def test_a_head_in_onnxruntime(tmp_path):
    """Of unusual operations: top-k, scatter and rounding."""
    head = make_head("topk", stem="quantized", stem_options={"head": "linear", "levels": 5}, out_dim=3).eval()
    run = session(hfproj.export_onnx(head, tmp_path / "head.onnx", part="head", check=False))
    for rows in (1, 5):
        h = torch.randn(rows, IN_DIM)
        with torch.no_grad():
            assert_close(run({"h": h}), {"z": head(h)})


@pytest.mark.parametrize(("name", "trained", "options"), [
    ("timm_vit", "two_blocks", {"layer": 0, "pooling": "mean", "trainable": 1}),
    ("timm_cnn", "full", {}),
    ("dinov2", "lora", {"pooling": "cls_mean"}),
    ("plain", "lora", {}),
])  # fmt: skip
def test_models_as_programs(name, trained, options, tmp_path):
    model = attach(name, trained, **options)
    before = snapshot(model)
    images = next(iter(make_inputs(name, batch=3, seed=9).values()))
    path = hfproj.export_program(model, tmp_path / "model.pt2", example=images, check=False)
    assert_same_tensors(before, snapshot(model))
    assert_same_outputs(program(path), model, name)


def test_images_of_another_size(tmp_path):
    """Positions are interpolated as the model does it; the size is then fixed."""
    model = attach("vit", "head", head="identity", out_dim=None, head_options={})
    images = torch.randn(2, 3, 48, 32)
    run = program(hfproj.export_program(model, tmp_path / "model.pt2", example=images, check=False))
    with torch.no_grad():
        out = model(pixel_values=images)
    assert_close(run({"pixel_values": images}), {"h": out.representation, "z": out.projection})


def test_texts_of_any_length(tmp_path):
    model = attach("bert", "full", pooling="max")
    run = program(hfproj.export_program(model, tmp_path / "model.pt2", check=False))
    for rows, tokens in ((1, 2), (4, 16)):
        ids = torch.randint(50, (rows, tokens))
        mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1))).long()
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask)
        assert_close(run({"input_ids": ids, "attention_mask": mask}), {"h": out.representation, "z": out.projection})


def test_half_precision_is_merged_in_float32(tmp_path):
    """The reference is the half-precision model computed in float32, before anything is merged."""
    model = get_peft_model(make_backbone("plain").bfloat16(), make_config("plain", "lora"))
    perturb(model)
    images = torch.randn(3, 3, 32, 32)
    run = program(hfproj.export_program(model, tmp_path / "model.pt2", example=images.bfloat16()))
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if "base_layer" in n)
    with torch.no_grad():
        out = model.float().eval()(images)
    assert_close(run({"x": images}), {"h": out.representation, "z": out.projection})


def test_the_active_head_is_exported(tmp_path):
    model = attach("plain", "head")
    model.add_adapter("wide", make_config("plain", "head", out_dim=9))
    model.set_adapter("wide")
    path = hfproj.export_program(model, tmp_path / "head.pt2", part="head")
    h = torch.randn(2, 10)
    with torch.no_grad():
        assert_close(program(path)({"h": h}), {"z": hfproj.detach(model.eval(), "wide")(h)})


def assert_no_path(data):
    for path in (Path.cwd(), Path.home(), Path(hfproj.__file__).parent, Path(torch.__file__).parent):
        assert str(path).encode() not in data


HEAD = {"hidden_dim": 8, "last_norm": "batch", "activation": "gelu", "norm": "layer", "l2_normalise": True}


def assert_says_what_it_is(said, pooling):
    assert said["hfproj_version"] == hfproj.__version__
    assert (said["head"], said["in_dim"], said["out_dim"]) == ("mlp", "16", "6")
    assert json.loads(said["head_options"]) == HEAD
    assert (said["pooling"], said["layer"]) == (pooling, "-1")


@needs_runtime
@pytest.mark.parametrize(("name", "pooling", "shapes"), [
    ("timm_vit", "cls", {"pixel_values": ["batch", 3, 32, 32]}),
    pytest.param(
        "bert", "mean", {"input_ids": ["batch", "tokens"], "attention_mask": ["batch", "tokens"]},
        marks=pytest.mark.long,
    ),
])  # fmt: skip
def test_models_in_onnxruntime(name, pooling, shapes, tmp_path):
    """The same h and z; names and free axes; which head it is and how to prepare images; no path of this machine."""
    import onnx

    model = attach(name, "lora", pooling=pooling, head_options=HEAD).train()
    before, modes = snapshot(model), [m.training for m in model.modules()]
    path = hfproj.export_onnx(model, tmp_path / "model.onnx", check=False)
    assert_same_tensors(before, snapshot(model))
    assert modes == [m.training for m in model.modules()]
    assert_same_outputs(session(path), model.eval(), name)

    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert [o.version for o in graph.opset_import if not o.domain] == [20]
    axes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.graph.input, *graph.graph.output)
    }
    assert axes == {**shapes, "h": ["batch", 16], "z": ["batch", 6]}
    said = {p.key: p.value for p in graph.metadata_props}
    assert_says_what_it_is(said, pooling)
    if name == "timm_vit":
        prepared = hfproj.backbones.image_preprocessing(model)
        assert json.loads(said["image_size"]) == [32, 32]
        assert json.loads(said["image_mean"]) == list(prepared.mean)
        assert json.loads(said["image_std"]) == list(prepared.std)
    assert_no_path(path.read_bytes())
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]


def test_what_a_program_says(tmp_path):
    path = hfproj.export_program(attach("plain", "head"), tmp_path / "m.pt2", example=torch.randn(2, 3, 32, 32))
    found = {"hfproj.json": ""}
    torch.export.load(path, extra_files=found)
    said = json.loads(found["hfproj.json"])
    assert (said["head"], said["in_dim"], said["out_dim"], said["pooling"]) == ("mlp", "10", "6", "mean")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            assert_no_path(archive.read(name))
    assert [f.name for f in tmp_path.iterdir()] == ["m.pt2"]


class Doubtful(nn.Module):
    """A head that a graph can't hold, in one of two ways."""

    def __init__(self, *, in_dim: int, way: str):
        super().__init__()
        self.in_dim = self.out_dim = in_dim
        self.way, self.calls = way, 0

    def forward(self, h):
        if self.way == "branches":
            return h if h.sum() > 0 else -h
        self.calls += 1
        return h * self.calls


@pytest.fixture
def doubtful():
    hfproj.register_head("doubtful", Doubtful)
    yield lambda way: hfproj.create_head("doubtful", in_dim=4, way=way)
    del HEADS._entries["doubtful"]


EXPORTS = {"pt2": hfproj.export_program, "onnx": hfproj.export_onnx}
forms = pytest.mark.parametrize("form", [pytest.param("onnx", marks=needs_runtime), "pt2"])


@forms
def test_a_head_that_cannot_be_traced(form, doubtful, tmp_path):
    with pytest.raises(
        hfproj.UsageError, match=r"^The head 'doubtful' can't be exported by torch.export: .*value"
    ) as e:
        EXPORTS[form](doubtful("branches"), tmp_path / f"head.{form}", part="head")
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


@forms
def test_a_graph_that_computes_something_else_is_not_written(form, doubtful, tmp_path):
    path = tmp_path / f"head.{form}"
    path.write_bytes(b"what was there")
    with pytest.raises(
        hfproj.HfprojError, match=r"gives another z for (3 rows|1 row): max \|Δz\| is .* Nothing was written"
    ):
        EXPORTS[form](doubtful("counts"), path, part="head")
    assert [f.name for f in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"what was there"


def test_without_the_packages(tmp_path, monkeypatch):
    head, find = make_head("linear"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert_refused(lambda: hfproj.export_onnx(head, tmp_path / "h.onnx", part="head"), "onnxscript", "hfproj[export]")


def test_what_cannot_work(tmp_path):
    head, vit, bert = make_head("linear"), attach("vit", "head"), attach("bert", "head")
    export, path, images = hfproj.export_program, tmp_path / "m.pt2", torch.randn(2, 3, 32, 32)
    assert_refused(lambda: export(vit, tmp_path / "m.pt"), "m.pt", "ends with .pt2")
    assert_refused(lambda: export(vit, path, part="backbone"), "got 'backbone'", "'head'", "'model'")
    assert_refused(lambda: export(head, path), "LinearHead has no projection head")
    assert_refused(lambda: export(make_backbone("vit"), path, part="head"), "ViTModel has no projection head")
    assert_refused(lambda: export(vit, path, part="head", example=images), "takes none")
    assert_refused(lambda: export(bert, path, example=images), "token ids of its own")
    assert_refused(lambda: export(vit, path, example=images[0]), "[batch, channels, height, width]", "[3, 32, 32]")
    assert_refused(lambda: export(vit, path, example=images[:0]), "at least one row")
    assert_refused(
        lambda: export(attach("timm_vit", "head"), path, example=torch.randn(2, 3, 48, 48)), "dynamic_img_size"
    )
    assert_refused(lambda: export(attach("plain", "head"), path), "What PlainNet takes is unknown", "example=")
    cnn = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    assert_refused(
        lambda: export(get_peft_model(cnn, hfproj.ProjectionHeadConfig()), path), "image size of ResNetModel"
    )
    features = get_peft_model(hfproj.FeatureBackbone(4), hfproj.ProjectionHeadConfig(out_dim=2))
    assert_refused(lambda: export(features, path), "cached features", "part='head'")
    with vit.disable_adapter():
        assert_refused(lambda: export(vit, path), "is disabled")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_outside_of_the_folder(tmp_path, monkeypatch):
    """Also for a bare file name: what lies above the working directory may be another's."""
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    tmp_path.chmod(0o555)
    made = []
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *args, real=tempfile.mkdtemp: made.append(args[2]) or real(*args))
    try:
        assert hfproj.export_program(make_head("linear"), "head.pt2", part="head") == Path("head.pt2")
    finally:
        tmp_path.chmod(0o755)
    assert [Path(folder).resolve() for folder in made][:1] == [tmp_path / "inner"]
    assert os.listdir() == ["head.pt2"]


@needs_onnx
@pytest.mark.parametrize("opset", [17, 99, True])
def test_opsets_that_do_not_exist(opset, tmp_path):
    assert_refused(lambda: hfproj.export_onnx(make_head("linear"), tmp_path / "h.onnx", part="head", opset=opset),
            "from 18 to", repr(opset))  # fmt: skip
