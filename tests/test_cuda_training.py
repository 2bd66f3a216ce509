"""Training, saving and collectives on a GPU: mixed precision, resuming, the moving average, nccl."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cuda_device import CUDA, assert_on_device, assert_same, on, trained
from cuda_device import DEVICE as device
from objectives.objective_cases import CASES, TRAINED_DIM
from regularizers.regularizer_cases import CASES as REGULARIZERS
from training.small import adapter, assert_equal, backbone, differs, head_model, images, plain, trainer, views

import hfproj
from hfproj import distributed, probes
from hfproj.diagnostics import SpectrumState, ViewState
from hfproj.features.neighbours import NeighbourBank
from hfproj.functional.modes import evaluating

PLACE = {"use_cpu": not CUDA, "dataloader_pin_memory": CUDA}
PRECISIONS = {"float32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def run_of(folder, model=None, precision="float32", place=PLACE, **options):
    return trainer(folder, model, **{**PRECISIONS[precision], **place, **options})


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@every_precision
def test_steps_in_mixed_precision(tmp_path, precision):
    """Weights and loss stay float32: the loss is that of z in float64, and the first one near float32's on the CPU."""
    run = run_of(tmp_path, precision=precision, max_steps=3, log_representation=True)
    before = adapter(run.model)
    run.train()
    assert_on_device(*run.model.parameters(), run.last_batch["z"])
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert differs({n: t.cpu() for n, t in before.items()}, {n: t.cpu() for n, t in adapter(run.model).items()})
    reference = run_of(tmp_path / "cpu", place={"use_cpu": True}, max_steps=3)
    reference.train()
    assert len(losses(run)) == 3
    z = run.last_batch["z"]
    assert losses(run)[-1] == pytest.approx(run.objective(z.double()).loss.item(), rel=1e-5)
    near = 1e-4 if precision == "float32" else 0.2  # BatchNorm divides by the little in which 8 noise images differ
    assert losses(run)[0] == pytest.approx(losses(reference)[0], rel=near)
    assert all(math.isfinite(loss) for loss in losses(run))
    assert all(
        math.isfinite(run.state.log_history[0][name])
        for name in ("batch_rankme_h", "batch_std_z", "batch_positive_cosine_z")
    )


def test_training_is_that_of_the_cpu(tmp_path):
    """Accumulated batches, dropped patches, two large and two small views, regularizers, plain SGD."""
    options = {
        "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "patch_dropout": 0.5,
        "optim": "sgd", "collator": views(local_views=2, local_size=8),
    }  # fmt: skip
    extra = {"regularizers": {"werank": 0.1, "wasserstein": 0.1}}
    runs = []
    for name, place in (("there", PLACE), ("here", {"use_cpu": True})):  # accelerate knows one device at a time
        runs.append(run_of(tmp_path / name, place=place, **options, extra=extra))
        runs[-1].train()
    there, here = runs
    assert losses(there) == pytest.approx(losses(here), rel=1e-3)
    assert_same(adapter(there.model), adapter(here.model), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.trained])
def test_every_objective_trains_in_mixed_precision(tmp_path, name, precision):
    case = CASES[name]
    options = case.options if case.training_options is None else case.training_options
    objective = hfproj.create_objective(case.name, **options)
    config = {"head": case.head, "head_options": case.head_options, "predictor": case.predictor}
    config |= {"prototypes": case.prototypes, "scales": getattr(objective, "scales", None) or None}
    model = head_model(**config, out_dim=TRAINED_DIM)
    run = run_of(
        tmp_path, model, precision, dataset=images(64), max_steps=2, per_device_train_batch_size=64,
        extra={"objective": objective},
    )  # fmt: skip
    run.train()
    assert len(losses(run)) == 2
    assert all(math.isfinite(loss) for loss in losses(run))
    assert all(p.isfinite().all() for p in run.model.parameters())
    buffers = dict(run.objective.named_buffers())
    if buffers:
        assert_on_device(*buffers.values())
        assert all(b.isfinite().all() for b in buffers.values() if b.is_floating_point())


@every_precision
@pytest.mark.parametrize("objective", ["moco", "lejepa", "deepcluster_v2"])
def test_resumed_equals_uninterrupted(tmp_path, precision, objective):
    """Dropout, queue, moving average, drawn directions and clusters: what the GPU repeats at all, a resume repeats."""
    options = {"moco": {"queue_size": 8}, "lejepa": {"slices": 16}, "deepcluster_v2": {"prototypes": [3]}}[objective]

    def make(folder, seed=0):
        return run_of(
            tmp_path / folder, head_model(seed, dropout=0.2), precision, max_steps=5, save_strategy="steps",
            save_steps=2, extra={"objective": {"name": objective, **options}}, patch_dropout=0.5,
        )  # fmt: skip

    whole, twin, resumed = make("whole"), make("twin"), make("resumed", seed=7)
    whole.train()
    twin.train()
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    pairs = [(whole.model, twin.model, resumed.model), (whole.objective, twin.objective, resumed.objective)]
    pairs += [(whole.ema.module, twin.ema.module, resumed.ema.module)] if whole.ema is not None else []
    for expected, again, found in pairs:
        tensors = [adapter(m) if hasattr(m, "peft_config") else m.state_dict() for m in (expected, again, found)]
        if differs(tensors[0], tensors[1]):  # some kernel adds up in no fixed order: no promise can be exact then
            assert_same(tensors[2], tensors[0], rtol=1e-2, atol=1e-2)
        else:
            assert_equal(tensors[2], tensors[0])


@every_precision
def test_the_moving_average_runs_its_own_weights(tmp_path, precision):
    """With a momentum of 1 it stays the model of the start, also in what it answers under autocast."""
    objective = {"name": "byol"}
    model = head_model(predictor={"head": "mlp", "hidden_dim": 8}, head_options={"hidden_dim": 12, "norm": None})
    start = on(copy.deepcopy(model))
    batch = [view.to(device) for view in views()([{**item, "index": i} for i, item in enumerate(images(4))])["views"]]
    run = run_of(
        tmp_path,
        model,
        precision,
        max_steps=12,
        learning_rate=0.1,
        ema_momentum=1.0,
        ema_momentum_end=1.0,
        extra={"objective": objective},
    )  # fmt: skip; fp16's first steps only find its loss scale
    run.train()
    assert_on_device(*run.ema.module.parameters())
    with evaluating(run.ema.module), evaluating(start), torch.no_grad(), run.accelerator.autocast():
        found = run.targets(batch)
        expected = torch.stack([start(pixel_values=view).projection for view in batch])
        moved = torch.stack([run.model(pixel_values=view).projection for view in batch])
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-3, atol=1e-3)
    assert (moved.float() - expected.float()).abs().max() > 0.05


COMPILED = """
import sys, torch
from training.small import images, plain, trainer
import hfproj
folder, cpu, half = sys.argv[1], sys.argv[2] == "cpu", sys.argv[3] == "bf16"
options = {"max_steps": 2, "use_cpu": cpu, "bf16": half}
backend = {"torch_compile": True, "torch_compile_backend": "eager" if cpu else "inductor"}
for more in ({}, backend):
    run = trainer(folder, **options, **more)
    run.train()
    print("losses", *(entry["loss"] for entry in run.state.log_history if "loss" in entry))
assert hfproj.extract_features(run.model, images(4), collator=plain()).z.isfinite().all()
"""


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_compiled(tmp_path, precision):
    """In a process of its own: the shapes that tests check at run time can't be compiled."""
    command = [sys.executable, "-c", COMPILED, str(tmp_path), device.type, precision]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("losses")]
    plain_losses, compiled = ([float(loss) for loss in line] for line in lines)
    assert compiled == pytest.approx(plain_losses, rel=0.05)


def test_callbacks_and_evaluation(tmp_path):
    """bf16, watched by every callback; what is measured is finite, and in the history."""
    callbacks = [
        hfproj.SpectrumCallback(every=1), hfproj.CurvatureCallback(every=1), hfproj.UpdateRatioCallback(every=1),
        hfproj.CollapseCallback(), hfproj.OnlineProbeCallback(every=1),
    ]  # fmt: skip
    run = run_of(
        tmp_path, precision="bf16", dataset=images(24), max_steps=3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=2, extra={"eval_dataset": images(9, seed=1), "callbacks": callbacks},
    )  # fmt: skip
    run.train()
    metrics = run.evaluate()
    assert all(math.isfinite(metrics[f"eval_{name}"]) for name in ("knn_h", "rankme_z", "loss", "positive_cosine_h"))
    watched = {name for row in run.history for name, value in row.items() if value is not None}
    assert {"rankme_h", "online_linear_h"} <= watched
    resumed = run_of(
        tmp_path, precision="bf16", dataset=images(24), max_steps=4,
        extra={"callbacks": [hfproj.OnlineProbeCallback(every=1)], "eval_dataset": images(9, seed=1)},
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert resumed.state.global_step == 4


@pytest.mark.parametrize("config", [{}, {"trainable": "full"}, {"trainable": 1}, {"lora": False}], ids=str)
def test_saved_from_and_loaded_onto_the_device(tmp_path, config):
    run = run_of(tmp_path / "run", head_model(**config), max_steps=2)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    torch.manual_seed(0)
    bare = on(backbone())
    original = {name: tensor.clone() for name, tensor in bare.state_dict().items()}
    x = on(torch.rand(3, 3, 16, 16))
    expected = bare.eval()(x).last_hidden_state
    model = hfproj.from_pretrained(tmp_path / "saved", backbone=bare)
    assert_on_device(*model.parameters(), *model.buffers())
    assert_same(adapter(model), adapter(run.model), rtol=0, atol=0)
    with evaluating(model), evaluating(run.model), torch.no_grad():
        out, trained_out = model(pixel_values=x), run.model(pixel_values=x)
        torch.testing.assert_close(out.projection, trained_out.projection, rtol=1e-5, atol=1e-5)
        head = hfproj.load_head(tmp_path / "saved")
        torch.testing.assert_close(head(out.representation.cpu()), out.projection.cpu(), rtol=1e-4, atol=1e-4)
        detached = hfproj.detach(model).eval()
        torch.testing.assert_close(detached(out.representation), out.projection, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(pixel_values=x).last_hidden_state, expected)
        model.add_adapter("second", hfproj.ProjectionHeadConfig(head="linear", out_dim=3))
        model.set_adapter("second")
        assert_on_device(model(pixel_values=x).projection)
        model.set_adapter("default")
        torch.testing.assert_close(model(pixel_values=x).projection, out.projection, rtol=0, atol=0)
    assert_equal(original, model.unload().state_dict())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("part", ["head", "model"])
@pytest.mark.parametrize("form", ["onnx", "program"])
def test_exported_from_the_device(tmp_path, part, form):
    """Exporting compares graph and model by itself, on the CPU; the model stays where it was."""
    model = on(head_model())
    if form == "onnx":
        pytest.importorskip("onnxscript")
        path = hfproj.export_onnx(model, tmp_path / "graph.onnx", part=part)
    else:
        path = hfproj.export_program(model, tmp_path / "graph.pt2", part=part)
    assert path.is_file()
    assert_on_device(*model.parameters())
    merged = hfproj.export_merged(model, tmp_path / "merged")
    assert merged.is_dir()
    assert_on_device(*model.parameters())


class OneOfMany(int):
    """The size of a group of one process, which says that it is more: so that its collectives run."""

    def __eq__(self, other):
        return False

    def __gt__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Collectives of one process, by nccl on CUDA: tensors of another device, or of a type it has not, are refused."""
    options = {"backend": "nccl", "device_id": torch.device("cuda:0")} if CUDA else {"backend": "gloo"}
    dist.init_process_group(**options, init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    for module in (distributed, hfproj.features.extraction, hfproj.features.views, hfproj.features.store):
        monkeypatch.setattr(module, "world_size", lambda: OneOfMany(1))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "int64", "uint8", "bool"])
def test_collectives(dtype):
    dtype = getattr(torch, dtype)
    x = on((4 * torch.rand(5, 3)).to(dtype))
    assert distributed.gather_rows(x).equal(x)
    assert distributed.gather_rows(x[:, 1], counts=[5]).equal(x[:, 1])
    assert distributed.gather_rows(x[:0]).shape == (0, 3)
    if dtype != torch.bool:
        assert distributed.all_reduce_sum(x.T).equal(x.T)
        assert distributed.all_reduce_max(x).equal(x)
    if dtype.is_floating_point:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((distributed.gather_rows(leaf) * x).sum(), leaf)
        assert gradient.equal(x)


@pytest.mark.usefixtures("group")
def test_objects_and_counts():
    assert distributed.row_counts(5, device) == [5]
    assert distributed.gather_objects({"a": torch.ones(2)})[0]["a"].equal(torch.ones(2))
    assert distributed.broadcast_object(["run", 7]) == ["run", 7]
    distributed.barrier()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", CASES)
def test_objectives_of_a_group(name, monkeypatch):
    found = trained(CASES[name], device)
    monkeypatch.undo()  # alone
    assert_same(found, trained(CASES[name], device))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("name", "options"), REGULARIZERS.values(), ids=REGULARIZERS)
def test_regularizers_of_a_group(name, options, monkeypatch):
    head = on(hfproj.create_head("mlp", in_dim=6, out_dim=4, hidden_dim=5, norm="batch").double())
    h = on(torch.randn(2, 8, 6, dtype=torch.float64))

    def value():
        from hfproj.objectives.base import Step

        leaf = h.clone().requires_grad_()
        term = hfproj.create_regularizer(name, **options)(head, leaf, head(leaf), step=Step.at(0, 0, 0.0))
        return [term, *torch.autograd.grad(term, list(head.parameters()), allow_unused=True, materialize_grads=True)]

    found = value()
    monkeypatch.undo()
    assert_same(found, value())


@pytest.mark.usefixtures("group")
def test_measures_of_a_group(monkeypatch):
    """Sharded neighbours, joint states, features and a training with evaluation."""
    f, y = on(torch.randn(60, 6)), torch.arange(60) % 3
    z = on(torch.randn(3, 30, 6, dtype=torch.float64))
    knn = probes.KNNProbe(k=5).fit(f, y, sharded=True)
    found = [
        knn.score(f[:20], y[:20], sharded=True),
        NeighbourBank(f, sharded=True).search_within(3).cosines,
        SpectrumState().update(f).reduce().singular_values(),
        ViewState().update(z).reduce().alignment(),
        hfproj.extract_features(on(head_model()), images(7), collator=plain(), batch_size=3).z,
    ]
    monkeypatch.undo()
    expected = [
        probes.KNNProbe(k=5).fit(f, y).score(f[:20], y[:20]),
        NeighbourBank(f).search_within(3).cosines,
        SpectrumState().update(f).singular_values(),
        ViewState().update(z).alignment(),
        hfproj.extract_features(on(head_model()), images(7), collator=plain(), batch_size=3).z,
    ]
    assert_same(found, expected, rtol=1e-5, atol=1e-6)
