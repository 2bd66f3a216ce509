"""Callbacks that watch: what they record, where it goes, what they leave alone, and that a resume goes on with it."""

import math

import pytest
import torch
from objectives.objective_cases import CASES
from small import adapter, assert_equal, head_model, images, plain, trainer, views
from transformers import TrainerCallback

import hfproj
from hfproj import diagnostics
from hfproj.features.views import FixedViews
from hfproj.results.history import read_history
from hfproj.training.callbacks.curvature import HeadLoss
from hfproj.training.callbacks.watching import MEASURED

WATCH = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}


def run(folder, *callbacks, model=None, resume=None, extra=None, **args):
    made = trainer(
        folder, model, images(24), extra={"callbacks": list(callbacks), **(extra or {})}, **{"max_steps": 5, **args}
    )
    made.train(resume_from_checkpoint=resume)
    return made


def without(history, *names):
    return [{n: v for n, v in row.items() if n not in names} for row in history]


# --- spectrum ---


def test_spectrum_is_that_of_the_probe_batch_at_the_start_every_few_steps_and_the_end(tmp_path):
    watch = hfproj.SpectrumCallback(every=2, images=20, metrics=list(MEASURED))
    with pytest.warns(UserWarning, match="alpha_req is not measured: Expected at least 3 eigenvalues"):
        made = run(tmp_path, watch, per_device_eval_batch_size=3)
    assert not any("probe_alpha_req_z" in entry for entry in made.state.log_history)  # no NaN in the log
    rows = [row for row in made.history if "rankme_h" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    # Independently: the same images and views through the final model.
    dataset = hfproj.IndexedDataset(made.train_dataset.dataset)
    batch = made.data_collator([dataset[i * 24 // 20] for i in range(20)])
    model = made.model.eval()
    with torch.no_grad():
        outs = [model(view) for view in batch["views"]]
    for layer, name in (("h", "representation"), ("z", "projection")):
        f = torch.stack([getattr(out, name) for out in outs])
        expected = {
            "rankme": diagnostics.rankme(f.flatten(0, 1)),
            "std": diagnostics.representation_std(f.flatten(0, 1)),
            "positive_cosine": diagnostics.positive_cosine(f),
            "lidar": diagnostics.lidar(f.transpose(0, 1)),
            "uniformity": diagnostics.uniformity(f.flatten(0, 1)),
        }
        for metric, value in expected.items():
            assert rows[-1][f"{metric}_{layer}"] == pytest.approx(value, rel=1e-4)
    assert {f"{name}_{layer}" for name in MEASURED for layer in "hz"} <= rows[-1].keys()
    # z has 6 dimensions, too few to fit a decay.
    assert [n for n, v in rows[-1].items() if v is None] == ["alpha_req_z"]
    assert [row["step"] for row in made.history if "loss" in row] == [1, 2, 3, 4, 5]
    assert [entry["loss"] for entry in made.state.log_history if "loss" in entry] == [
        row["loss"] for row in made.history if "loss" in row
    ]
    logged = [entry for entry in made.state.log_history if "probe_rankme_h" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4, 5]
    assert logged[-1]["probe_rankme_h"] == rows[-1]["rankme_h"]


def test_watching_changes_nothing(tmp_path):
    model = {"dropout": 0.2}
    alone = run(tmp_path / "alone", model=head_model(**model), patch_dropout=0.5)
    watches = [
        hfproj.SpectrumCallback(every=1, images=8),
        hfproj.CurvatureCallback(every=2, images=4),
        hfproj.UpdateRatioCallback(every=1),
        hfproj.CollapseCallback(limits=dict.fromkeys(("rankme_z", "std_z", "rankme_h", "std_h", "loss"))),
    ]
    watched = run(tmp_path / "watched", *watches, model=head_model(**model), patch_dropout=0.5)
    assert_equal(adapter(watched.model), adapter(alone.model))
    assert not alone.history
    assert not (tmp_path / "alone" / "history.parquet").exists()


def test_watching_a_moving_average_and_queue_changes_nothing(tmp_path):
    objective = {"name": "moco", "queue_size": 8}
    runs = []
    for name, callbacks in (("alone", []), ("watched", [hfproj.CurvatureCallback(every=1, images=4)])):
        made = run(tmp_path / name, *callbacks, extra={"objective": objective}, ema_momentum=0.5)
        runs.append(adapter(made.model) | adapter(made.ema.module) | made.objective.state_dict())
    assert_equal(*runs)


def test_a_resumed_run_has_the_history_of_one_that_was_not_interrupted(tmp_path):
    def watches():
        return [hfproj.SpectrumCallback(every=2, images=8), hfproj.UpdateRatioCallback(every=1)]

    whole = run(tmp_path / "whole", *watches(), save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert [row["step"] for row in read_history(checkpoint / "history.parquet")] == [0, 1, 2]
    resumed = run(
        tmp_path / "resumed",
        *watches(),
        model=head_model(seed=7),
        resume=checkpoint,
        save_strategy="steps",
        save_steps=2,
    )
    assert resumed.history == whole.history
    resumed.save_model(str(tmp_path / "final"))
    assert read_history(tmp_path / "final" / "history.parquet") == whole.history


def test_a_second_training_starts_a_new_history(tmp_path):
    made = run(tmp_path, hfproj.SpectrumCallback(every=5, images=8))
    made.train()
    assert [row["step"] for row in made.history if "rankme_h" in row] == [0, 5]


def test_where_the_images_come_from(tmp_path):
    held_out, given = images(6, seed=1), images(7, seed=2)
    for extra, dataset, expected in (
        ({}, None, 24),
        ({"eval_dataset": held_out}, None, 6),
        ({"eval_dataset": {"a": held_out, "b": given}}, None, 6),
        ({"eval_dataset": held_out}, given, 7),
    ):
        watch = hfproj.SpectrumCallback(every=5, dataset=dataset)
        trainer(tmp_path, None, images(24), extra={"callbacks": [watch], **extra})
        assert watch.views.images == expected


def test_callbacks_share_a_probe_batch(tmp_path):
    first, second = hfproj.SpectrumCallback(images=8), hfproj.CurvatureCallback(images=8)
    trainer(tmp_path, extra={"callbacks": [first, second]})
    assert first.views is second.views


def test_the_default_takes_a_hundredth_of_the_time(tmp_path):
    # A pass over two views of 256 images without a gradient is about a third of a step with 256 images.
    watch = hfproj.SpectrumCallback()
    trainer(tmp_path, None, images(24), per_device_train_batch_size=8, extra={"callbacks": [watch]})
    assert watch.steps_between == 60 * 256 // 8
    assert hfproj.SpectrumCallback(every=7).steps_between == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hfproj.SpectrumCallback(metrics=["rank"]), "Unknown metric 'rank'.*rankme"),
        (lambda: hfproj.SpectrumCallback(every=0), "Expected every to be a number of steps, at least 1"),
        (lambda: hfproj.SpectrumCallback(images=1), "Expected images to be at least 2"),
        (lambda: hfproj.CurvatureCallback(of="backbone"), "Unknown Hessian 'backbone'"),
        (lambda: hfproj.CollapseCallback(action="explode"), "action to be one of warn, stop, restore, got 'explode'"),
        (lambda: hfproj.CollapseCallback(patience=0), "patience ≥ 1 .*got 0"),
        (
            lambda: hfproj.CollapseCallback(limits={"rankme_h": "low"}),
            r"limits\['rankme_h'\] to be a least value.*got 'low'",
        ),
        (lambda: hfproj.CollapseCallback(limits={"rankme_h": (None, None)}), r"limits\['rankme_h'\]"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(hfproj.UsageError, match=message):
        make()


def test_another_trainer_is_refused():
    from transformers import TrainerState

    for watch in (hfproj.SpectrumCallback(), hfproj.UpdateRatioCallback(), hfproj.CollapseCallback()):
        with pytest.raises(hfproj.UsageError, match=r"works in hfproj\.ProjectionTrainer"):
            watch.on_train_begin(None, TrainerState(), None)


def test_a_stream_needs_a_data_set_to_watch(tmp_path):
    made = trainer(
        tmp_path, None, iter(images(24)), max_steps=2, extra={"callbacks": [hfproj.SpectrumCallback(images=8)]}
    )
    with pytest.raises(hfproj.UsageError, match="fixed images, and a stream has none: pass dataset="):
        made.train()


def test_a_collator_without_views_is_refused():
    with pytest.raises(hfproj.UsageError, match="no 'views'"):
        FixedViews(images(4), plain(), images=4)


# --- update ratios ---


def test_update_ratios_are_those_of_the_step(tmp_path):
    before, after, rate = {}, {}, {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
            if state.global_step == 2:
                trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
                before.update({n: p.detach().clone() for n, p in trained.items()})
                rate["gradient"] = {n: p.grad.clone() for n, p in trained.items()}
                rate["lr"] = optimizer.param_groups[0]["lr"]

        def on_optimizer_step(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                after.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    made = trainer(
        tmp_path,
        None,
        images(24),
        max_steps=4,
        max_grad_norm=1e9,
        extra={"callbacks": [hfproj.UpdateRatioCallback(every=3), Look()]},
    )
    made.train()
    (row,) = (row for row in made.history if "update_ratio_head" in row)
    assert row["step"] == 3
    for part in ("head", "backbone"):
        names = [n for n in before if (".hfproj." in n) == (part == "head")]
        size = sum(before[n].double().square().sum() for n in names) ** 0.5
        moved = sum((after[n] - before[n]).double().square().sum() for n in names) ** 0.5
        gradient = sum(rate["gradient"][n].double().square().sum() for n in names) ** 0.5
        assert row[f"update_ratio_{part}"] == pytest.approx(float(moved / size), rel=1e-4)
        assert row[f"gradient_ratio_{part}"] == pytest.approx(rate["lr"] * float(gradient / size), rel=1e-4)
    assert row["timescale_ratio"] == pytest.approx(row["gradient_ratio_head"] / row["gradient_ratio_backbone"])


def test_a_head_alone_has_no_ratio_of_the_backbone(tmp_path):
    made = run(tmp_path, hfproj.UpdateRatioCallback(every=2), model=head_model(trainable="head"))
    row = next(row for row in made.history if "update_ratio_head" in row)
    assert "update_ratio_backbone" not in row
    assert "timescale_ratio" not in row


# --- curvature ---


def dense_hessian(loss, of):
    variables = loss.parameters if of == "head" else [loss.h.requires_grad_()]
    used = [v for v in variables if torch.autograd.grad(loss(), v, allow_unused=True)[0] is not None]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), used, create_graph=True)])
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(entry, used, retain_graph=True, materialize_grads=True)])
        for entry in gradient
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("of", ["head", "h"])
def test_curvature_is_that_of_the_dense_hessian(tmp_path, of):
    watch = hfproj.CurvatureCallback(of=of, images=4, steps=400, every=1)
    made = trainer(
        tmp_path,
        head_model(head_options={"hidden_dim": 5, "activation": "silu"}, out_dim=4),
        extra={"callbacks": [watch], "objective": {"name": "nt_xent", "temperature": 0.5}},
    )
    found = watch.measure()
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(HeadLoss(made, watch.views), of))
    for end, exact in (("min", eigenvalues[0]), ("max", eigenvalues[-1])):
        assert abs(found[f"lambda_{end}"] - exact) <= found[f"lambda_{end}_error"] + 1e-9
        assert found[f"lambda_{end}_error"] <= 1e-3 * eigenvalues.abs().max()


# One row an objective; the Hessian of the discretised codes of SwAV and of neighbours exists where they do not change.
@pytest.mark.parametrize("name", sorted({case.name: key for key, case in CASES.items()}.values()))
def test_curvature_of_every_objective(tmp_path, name):
    case = CASES[name]
    objective = hfproj.create_objective(case.name, **case.options)
    dim = 4
    model = head_model(
        head=case.head,
        head_options=case.head_options,
        out_dim=dim,
        predictor=case.predictor,
        prototypes=case.prototypes,
        scales=getattr(objective, "scales", None) or None,
    )
    watch = hfproj.CurvatureCallback(images=case.rows or 8, steps=30)
    made = trainer(
        tmp_path,
        model,
        images(case.rows or 16),
        collator=views(num_views=case.views),
        per_device_train_batch_size=4,
        extra={"callbacks": [watch], "objective": objective},
    )
    made._ema_teacher()
    if hasattr(objective, "on_epoch_start"):
        objective.on_epoch_start(made.step())
    found = watch.measure()
    assert all(math.isfinite(v) for v in found.values())
    assert found["lambda_min"] <= found["lambda_max"]
