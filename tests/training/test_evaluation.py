"""What the trainer measures while it trains, the best checkpoint and early stopping."""

import pytest
import torch
from small import (
    Counting,
    adapter,
    assert_equal,
    blocks,
    differs,
    head_model,
    images,
    trainer,
    views,
)
from transformers import EarlyStoppingCallback, TrainerCallback

import hfproj
from hfproj.objectives.nt_xent import nt_xent_loss

METRICS = {f"eval_{what}_{layer}" for what in ("knn", "rankme", "std", "positive_cosine") for layer in "hz"}
METRICS |= {"eval_loss", "eval_runtime"}


def test_metrics_and_their_definitions(tmp_path):
    data = images(10, seed=1)
    run = trainer(tmp_path, per_device_eval_batch_size=4, eval_knn_k=3, extra={"eval_dataset": data})
    metrics = run.evaluate()
    assert metrics.keys() == METRICS
    features = hfproj.extract_features(run.model, data, collator=run.eval_collator, batch_size=4)
    probe = hfproj.KNNProbe(k=3).fit(features.h, features.labels)
    assert metrics["eval_knn_h"] == probe.score_leave_one_out()
    assert metrics["eval_rankme_z"] == hfproj.diagnostics.rankme(features.z)
    # Two batches of 4 of the 10 images, in epoch 0, with the running statistics.
    losses = []
    model = run.model.eval()
    for start in (0, 4):
        batch = views()([{**data[i], "index": i, "epoch": 0} for i in range(start, start + 4)])
        losses.append(nt_xent_loss(torch.stack([model(v).projection for v in batch["views"]]), temperature=0.2).item())
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_images_are_prepared_as_the_views_are_unless_told_otherwise(tmp_path):
    """On pixels of another mean and std every held-out number would be of another input than the one trained on."""
    pixels = {"size": 8, "mean": (0.1, 0.2, 0.3), "std": (2.0, 1.0, 0.5), "image_column": "photo"}
    held_out = [{"photo": item["image"], "species": item["label"]} for item in images(9, seed=1)]
    options = {**pixels, "label_column": "species"}

    def run(eval_collator):
        made = trainer(
            tmp_path, head_model(), held_out, hfproj.ImageViews(**options),
            {"eval_dataset": held_out, "eval_collator": eval_collator}, metric_for_best_model="knn_h",
            eval_strategy="epoch",
        )  # fmt: skip
        return {name: value for name, value in made.evaluate().items() if "runtime" not in name}

    assert run(None) == run(hfproj.EvalImages(**options))
    assert run(None) != run(hfproj.EvalImages(**{**options, "mean": (0.5, 0.5, 0.5)}))


def test_bank_labels_and_several_sets(tmp_path):
    bank, labelled = images(9, seed=2), images(6, seed=3)
    sets = {"a": labelled, "b": images(6, seed=4, labels=False)}
    run = trainer(tmp_path, extra={"eval_dataset": sets, "bank_dataset": bank}, eval_knn_k=3)
    metrics = run.evaluate()
    assert "eval_a_knn_h" in metrics
    assert not any(name.startswith("eval_b_knn") for name in metrics)
    assert {"eval_b_rankme_h", "eval_b_loss"} < metrics.keys()
    f, g = (hfproj.extract_features(run.model, d, collator=run.eval_collator) for d in (bank, labelled))
    assert metrics["eval_a_knn_z"] == hfproj.KNNProbe(k=3).fit(f.z, f.labels).score(g.z, g.labels)
    assert {n.replace("eval_", "eval_a_"): v for n, v in run.evaluate("a").items() if "runtime" not in n} == {
        n: v for n, v in metrics.items() if "_a_" in n and "runtime" not in n
    }
    with pytest.raises(hfproj.UsageError, match="There is no eval_dataset"):
        trainer(tmp_path).evaluate()


def test_no_accuracy_where_the_bank_has_no_class_of_the_test_rows(tmp_path, caplog):
    bank = [{**item, "label": item["label"] + 50} for item in images(9, seed=2)]
    run = trainer(tmp_path, extra={"eval_dataset": images(6, seed=3), "bank_dataset": bank})
    assert run.evaluate().keys() == METRICS - {"eval_knn_h", "eval_knn_z"}
    assert "knn_h is not measured: no class of the test rows" in caplog.text


def test_evaluation_changes_nothing(tmp_path):
    runs = []
    for strategy in ("no", "steps"):
        run = trainer(
            tmp_path,
            head_model(dropout=0.2),
            max_steps=4,
            eval_strategy=strategy,
            eval_steps=1,
            eval_on_start=strategy == "steps",
            extra={"eval_dataset": images(7, seed=1), "objective": Counting()},
        )
        run.train()
        runs.append(run)
    assert_equal(adapter(runs[1].model), adapter(runs[0].model))
    assert torch.equal(runs[0].objective.center, runs[1].objective.center)

    model, state = runs[0].model, torch.get_rng_state()
    model.train()
    blocks(model)[1].eval()
    flags = [module.training for module in model.modules()]
    runs[0].evaluate()
    assert [module.training for module in model.modules()] == flags
    assert runs[0].objective.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_best_checkpoint_and_early_stopping(tmp_path, name, monkeypatch):
    """k-NN is best after step 2, then falls: training stops at step 4 and the weights of step 2 come back."""
    scores = iter([0.2, 0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr("hfproj.training.evaluation.probe", lambda trainer, dataset: {"knn_h": next(scores)})
    model, objective = head_model(name=name), Counting()
    kept = Kept(name, objective)
    run = trainer(
        tmp_path,
        model,
        num_train_epochs=9,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="knn_h",
        load_best_model_at_end=True,
        extra={
            "eval_dataset": images(6, seed=1),
            "objective": objective,
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=2), kept],
        },
    )
    assert run.args.greater_is_better
    run.train()
    assert run.state.global_step == 4
    assert run.state.best_metric == 0.9
    assert differs(kept.steps[2], kept.steps[4])
    assert_equal(adapter(model, name), kept.steps[2])
    assert torch.equal(objective.center, kept.centers[2])


class Kept(TrainerCallback):
    """Keeps the adapter and the objective's buffer after each step."""

    def __init__(self, name, objective):
        self.name, self.objective, self.steps, self.centers = name, objective, {}, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps[state.global_step] = adapter(model, self.name)
        self.centers[state.global_step] = self.objective.center.clone()
