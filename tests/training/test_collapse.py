"""The collapse alarm: what sets it off and what does not, the cause it names, and what it does then."""

import math

import pytest
import torch
from small import HEAD, adapter, assert_equal, head_model, images, trainer
from torch import nn

import hfproj
from hfproj.training.callbacks.collapse import flat_loss, likely_causes


class Together(nn.Module):
    """Pulls views together, and nothing else."""

    views = (2, 2)
    needs: frozenset = frozenset()

    def forward(self, z, **given):
        return (z[0] - z[1]).square().mean() + 10 * z.std((0, 1)).mean(), {}


class WithoutStopGradient(nn.Module):
    views = (2, 2)
    needs = frozenset({"prediction"})

    def forward(self, z, *, prediction, **given):
        return -nn.functional.cosine_similarity(prediction, z.flip(0), dim=-1).mean(), {}


class Scripted(hfproj.SpectrumCallback):
    """Measures what it was told to."""

    def __init__(self, rows, every=1):
        super().__init__(every=every, images=8)
        self.rows = iter(rows)
        self.metrics = (*self.metrics, "knn_overlap")

    def measure(self):
        row = {"rankme_h": 10.0, "rankme_z": 4.0, "std_h": 0.2, "std_z": 0.3}
        return row | next(self.rows, {})


def scripted(folder, rows, steps=6, extra=None, **alarm):
    alarm = {"warmup": 0, **alarm, "limits": {"loss": None, **alarm.get("limits", {})}}  # the model learns nothing here
    callback = hfproj.CollapseCallback(**alarm)
    made = trainer(
        folder,
        None,
        images(32),
        max_steps=steps,
        extra={"callbacks": [Scripted(rows), callback]},
        **{"save_strategy": "steps", "save_steps": 1, **(extra or {})},
    )
    return made, callback


GOOD, LOW = {}, {"rankme_h": 4.9}


@pytest.mark.parametrize(
    ("rows", "step", "metric"),
    [
        ([GOOD, GOOD, LOW, LOW, GOOD], 3, "rankme_h"),  # half of what it was at first, twice in a row
        ([GOOD, LOW, GOOD, LOW, GOOD], None, None),
        ([GOOD, {"rankme_h": 5.1}, {"rankme_h": 5.1}], None, None),  # more than half of it
        ([GOOD, GOOD, {"std_z": 0.04}, {"std_z": 0.0}], 3, "std_z"),  # a tenth of 1/√6 is 0.0408
        ([GOOD, {"std_z": 0.042}, {"std_z": 0.042}], None, None),
        ([GOOD, {"rankme_z": 1.9}, {"rankme_z": 1.9}], 2, "rankme_z"),
        ([GOOD, {"rankme_z": 2.1}, {"rankme_z": 2.1}], None, None),
        ([GOOD, {"std_h": 0.099}, {"std_h": 0.099}], 2, "std_h"),
        ([GOOD, {"std_h": 0.101}, {"std_h": 0.101}], None, None),
        ([GOOD, GOOD, {"std_h": float("nan")}, {"std_h": float("nan")}], 3, "std_h"),
        ([{"rankme_h": 4.0}, LOW, LOW, LOW], None, None),  # it was no higher at first
    ],
)
def test_when_the_alarm_rings(tmp_path, rows, step, metric):
    made, callback = scripted(tmp_path, rows)
    if step is None:
        made.train()
        assert callback.alarm is None
    else:
        with pytest.warns(hfproj.CollapseWarning, match=f"Collapse at step {step}: {metric} is"):
            made.train()
        assert (callback.alarm.step, callback.alarm.metric) == (step, metric)
        assert made.state.global_step == 6  # it only warns


def test_z_is_not_judged_in_the_first_steps(tmp_path):
    low = {"std_z": 0.0}
    made, _ = scripted(tmp_path, [low] * 7, warmup=5)
    with pytest.warns(hfproj.CollapseWarning, match="step 6"):
        made.train()


def test_limits_of_ones_own(tmp_path):
    # The loss is a name too; None drops a default.
    rows = [GOOD, LOW, LOW, LOW, LOW]
    made, callback = scripted(tmp_path, rows, limits={"rankme_h": None, "loss": (None, -1.0)}, patience=3)
    with pytest.warns(hfproj.CollapseWarning, match=r"loss is .*, outside of \[-∞, -1.0\]"):
        made.train()
    assert callback.alarm.step == 4  # the loss of a step is logged after its measurement


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        ({"name": "nt_xent", "temperature": 20.0}, math.log(2 * 4 - 1)),
        ({"name": "info_nce", "temperature": 40.0}, math.log(4)),
        ({"name": "supcon", "temperature": 20.0}, math.log(2 * 4 - 1)),
        ({"name": "nt_xent"}, None),
        ({"name": "supcon"}, None),
        ({"name": "barlow_twins"}, None),
        ({"name": "vicreg"}, None),
        ("w_mse", None),  # a collapsed batch has no whitening
        ({"name": "moco", "queue_size": 8}, None),
    ],
)
def test_what_equal_rows_cost_where_spread_ones_cost_as_much(tmp_path, objective, value):
    made = trainer(
        tmp_path, None, images(16), max_steps=1, per_device_train_batch_size=4, extra={"objective": objective}
    )
    if objective == "w_mse":
        made.objective = hfproj.create_objective("w_mse", w_size=4)
        made.last_batch = {"z": torch.randn(2, 4, 2)}
    else:
        made.train()
    assert flat_loss(made) == (None if value is None else pytest.approx(value, rel=1e-9))


def test_an_objective_that_hardly_tells_collapse_sets_it_off_after_the_warm_up(tmp_path):
    made = trainer(
        tmp_path,
        None,
        images(32),
        max_steps=12,
        warmup_steps=4,
        extra={
            "objective": {"name": "nt_xent", "temperature": 10.0},
            "callbacks": [hfproj.CollapseCallback(every=1, warmup=0)],
        },
    )
    with pytest.warns(hfproj.CollapseWarning, match="loss is .*5% below what equal rows cost.*cause: temperature"):
        made.train()
    alarm = next(c.alarm for c in made.callback_handler.callbacks if isinstance(c, hfproj.CollapseCallback))
    assert alarm.step == 6  # the losses of steps 4 and 5 are known by then


def test_neighbours_that_changed_are_no_collapse(tmp_path):
    low = {"knn_overlap_h": 0.86}
    made, callback = scripted(tmp_path, [low, low, low], limits={"knn_overlap_h": 0.88}, action="stop")
    with pytest.warns(hfproj.CollapseWarning) as caught:
        made.train()
    (said,) = [str(w.message) for w in caught if w.category is hfproj.CollapseWarning]
    assert (
        said
        == callback.alarm.message
        == (
            "More neighbours than the limit allows had changed at step 1: knn_overlap_h is 0.86, outside of [0.88, ∞]. "
            "Lower learning_rate, take fewer steps, or give another limit."
        )
    )
    assert callback.alarm.to_dict()["cause"] == "neighbours"
    high, _ = scripted(tmp_path / "high", [low, low], limits={"knn_overlap_h": (None, 0.5)})
    with pytest.warns(hfproj.CollapseWarning, match="Collapse at step 1: knn_overlap_h"):
        high.train()


def test_limits_on_what_nothing_measures(tmp_path):
    def run(**options):
        alarm = hfproj.CollapseCallback(limits={"mine": 0.0}, every=1)
        trainer(tmp_path, None, images(32), max_steps=1, extra={"callbacks": [alarm], **options}).train()

    with pytest.raises(hfproj.UsageError, match=r"Unknown measure in limits, which no callback .* measures: 'mine'"):
        run()

    class Mine(Together):
        def forward(self, z, **given):
            return super().forward(z)[0], {"mine": z.detach().mean()}

    run(objective=Mine())
    hfproj.CollapseCallback(limits={"my_rank_h": 1.0, "online_knn_h": 0.5})  # may be somebody's own, is measured later
    made, _ = scripted(tmp_path, [], limits={"mine": 0.0})  # a callback of one's own
    made.train()


def test_stop(tmp_path):
    made, callback = scripted(tmp_path, [GOOD, GOOD, LOW, LOW], action="stop")
    with pytest.warns(hfproj.CollapseWarning):
        made.train()
    assert made.state.global_step == 3
    assert callback.alarm.restored is None


def test_restore_goes_back_to_before_the_first_low_measurement(tmp_path):
    made, callback = scripted(tmp_path, [GOOD, GOOD, GOOD, LOW, LOW], action="restore")
    with pytest.warns(hfproj.CollapseWarning, match="The adapter is that of checkpoint-2 again"):
        made.train()
    assert made.state.global_step == 4
    assert callback.alarm.restored == "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists()  # collapsed, or another step's under this name
    expected, _ = scripted(tmp_path / "again", [], steps=6)
    expected.load_checkpoint(str(tmp_path / "checkpoint-2"))
    assert_equal(adapter(made.model), adapter(expected.model))


def test_restore_without_a_checkpoint_goes_back_to_the_start(tmp_path):
    made, callback = scripted(tmp_path, [GOOD, LOW, LOW], action="restore", extra={"save_strategy": "no"})
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    with pytest.warns(hfproj.CollapseWarning, match="The adapter is that of step 0 again"):
        made.train()
    assert made.state.global_step == 2
    assert callback.alarm.restored == "step 0"
    assert_equal(made.model.state_dict(), before)


def test_the_alarm_as_json(tmp_path):
    made, callback = scripted(tmp_path, [GOOD, LOW, LOW])
    with pytest.warns(hfproj.CollapseWarning):
        made.train()
    results = hfproj.Results(geometry={"collapse": callback.alarm.to_dict()}, history=made.history)
    kept = hfproj.Results.load(results.save(tmp_path / "results.json"))
    assert kept.geometry["collapse"]["step"] == 2
    assert kept.geometry["collapse"]["cause"] == callback.alarm.causes[0].name
    assert "Collapse at step 2" in kept.geometry["collapse"]["what"]
    assert kept.history == made.history


def test_it_brings_what_it_needs_and_no_more(tmp_path):
    own = hfproj.SpectrumCallback(every=3, images=8)
    made = trainer(tmp_path, extra={"callbacks": [hfproj.CollapseCallback(every=7), own]})
    kinds = [type(c).__name__ for c in made.callback_handler.callbacks]
    assert kinds.count("SpectrumCallback") == 1
    ratios = next(c for c in made.callback_handler.callbacks if isinstance(c, hfproj.UpdateRatioCallback))
    assert ratios.every == 3


def test_a_real_collapse_is_noticed(tmp_path):
    made = trainer(
        tmp_path,
        head_model(trainable="full", head_options={"hidden_dim": 12, "norm": None}),
        images(32),
        max_steps=30,
        learning_rate=3e-3,
        extra={"objective": Together(), "callbacks": [hfproj.CollapseCallback(every=5)]},
    )
    with pytest.warns(hfproj.CollapseWarning, match="Likely cause: objective. Nothing in Together keeps rows apart"):
        made.train()


def causes(folder, objective=None, regularizers=None, history=(), **config):
    made = trainer(
        folder,
        head_model(**config),
        images(32),
        extra={"objective": objective, "regularizers": regularizers},
    )
    made._ema_teacher()
    made.history = [dict(row) for row in history]
    before = adapter(made.model)
    found = [cause.name for cause in likely_causes(made)]
    assert_equal(adapter(made.model), before)
    return found


MLP = {"head": "mlp", "hidden_dim": 8}
PLAIN = {"head": "mlp", "hidden_dim": 8, "norm": None}
WITHOUT_NORM = {**HEAD, "head_options": {"hidden_dim": 12, "norm": None}}


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        (["learning rate"], {"history": [{"step": 3, "update_ratio_head": 0.4, "update_ratio_backbone": 0.01}]}),
        (["learning rate"], {"history": [{"step": 3, "update_ratio_head": 0.1, "update_ratio_backbone": 0.8}]}),
        (["unknown"], {"history": [{"step": 3, "update_ratio_head": 0.1, "update_ratio_backbone": 0.1}]}),
        (["temperature"], {"objective": {"name": "nt_xent", "temperature": 10.0}}),
        (["unknown"], {"objective": {"name": "nt_xent", "temperature": 0.5}}),
        (["temperature"], {"objective": {"name": "info_nce", "temperature": 10.0}}),
        (["unknown"], {"objective": "vicreg"}),
        (["unknown"], {"objective": "barlow_twins"}),
        (["unknown"], {"objective": "byol", "predictor": MLP}),
        (["predictor"], {"objective": "byol", "predictor": {"head": "identity"}}),
        (["predictor"], {"objective": "byol", "predictor": {"head": "identity"}, "out_dim": 128}),
        (["BatchNorm"], {"objective": "byol", "predictor": PLAIN, **WITHOUT_NORM}),
        (["unknown"], {"objective": "simsiam", "predictor": MLP}),
        (["predictor", "BatchNorm"], {"objective": "simsiam", "predictor": {"head": "identity"}, **WITHOUT_NORM}),
        (["stop-gradient"], {"objective": WithoutStopGradient(), "predictor": MLP}),
        (["stop-gradient", "predictor"], {"objective": WithoutStopGradient(), "predictor": {"head": "identity"}}),
        (["objective"], {"objective": Together()}),
        (["unknown"], {"objective": Together(), "regularizers": {"vicreg_terms": 1.0}}),
    ],
)
def test_the_cause_it_names(tmp_path, expected, options):
    assert causes(tmp_path, **options) == expected


def test_causes_are_looked_for_apart_from_the_training(tmp_path):
    made = trainer(tmp_path, head_model(predictor=MLP), images(32), extra={"objective": "nnclr"})
    state = {n: b.clone() for n, b in made.objective.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    likely_causes(made)
    assert torch.equal(torch.rand(3), expected)
    assert_equal(state, made.objective.state_dict())
    assert all(p.grad is None for p in made.model.parameters())


def test_a_spectrum_that_lacks_what_is_judged_is_no_substitute(tmp_path):
    own = hfproj.SpectrumCallback(metrics=["alpha_req"], every=3, images=8)
    made = trainer(tmp_path, extra={"callbacks": [own, hfproj.CollapseCallback(every=7)]})
    added = [c for c in made.callback_handler.callbacks if isinstance(c, hfproj.SpectrumCallback) and c is not own]
    assert [c.every for c in added] == [7]
