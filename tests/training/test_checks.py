"""What is refused when the trainer is made: arguments without effect, metrics that won't be measured, equal views."""

import logging

import datasets
import pytest
import torch
import unlearned
from peft import LoraConfig, get_peft_model
from small import adapter, head_model, images, trainer, views
from transformers import (
    BertConfig,
    BertModel,
    EarlyStoppingCallback,
    ModernBertConfig,
    ModernBertModel,
    TrainerCallback,
)
from transformers import TrainingArguments as Theirs

import hfproj


def refused(message, *args, **options):
    with pytest.raises(hfproj.UsageError, match=message):
        trainer(*args, **options)


WITHOUT_EFFECT = {
    "label_smoothing_factor": 0.1, "include_for_metrics": ["loss"], "prediction_loss_only": True,
    "batch_eval_metrics": True, "eval_do_concat_batches": False, "eval_accumulation_steps": 2, "label_names": ["y"],
    "eval_use_gather_object": True, "include_num_input_tokens_seen": "all", "bf16_full_eval": True,
    "group_by_length": True, "train_sampling_strategy": "group_by_length", "length_column_name": "words",
    "auto_find_batch_size": True, "use_liger_kernel": True, "neftune_noise_alpha": 5.0,
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in WITHOUT_EFFECT if n in Theirs.__dataclass_fields__])
def test_arguments_that_would_have_no_effect_or_another_one(tmp_path, name):
    refused(f"{name}=", tmp_path, **{name: WITHOUT_EFFECT[name]})


@pytest.mark.parametrize(("options", "message"), [
    ({"lars": True, "optim": "sgd"}, "lars=True takes the place of optim"),
    ({"lars_clip": True}, "lars_clip would have no effect without lars=True"),
    ({"lars_trust_coefficient": 0.02}, "lars_trust_coefficient would have no effect without lars=True"),
    ({"fixed_predictor_rate": True}, "fixed_predictor_rate=True would have no effect: the adapter has no predictor"),
])  # fmt: skip
def test_own_arguments_that_would_have_no_effect(tmp_path, options, message):
    refused(message, tmp_path, **options)


def test_workers_of_a_stream(tmp_path):
    refused(
        "workers that stay would never hear of a new epoch", tmp_path, dataset=hfproj.data.StreamDataset(images(8)),
        dataloader_num_workers=1, dataloader_persistent_workers=True,
    )  # fmt: skip
    options = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 5, "max_steps": 1}
    run = trainer(tmp_path, dataset=hfproj.data.StreamDataset(images(8)), **options)
    assert run.get_train_dataloader().prefetch_factor == 5


def test_momentum_without_a_teacher_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hfproj.training"):
        trainer(tmp_path, ema_momentum=0.9, extra={"objective": "vicreg"})
    assert "ema_momentum without effect: VICReg has no EMA teacher." in caplog.text


def test_arguments_of_an_optimizer_that_is_replaced(tmp_path):
    model = head_model()
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for options in ({"lars": True}, {"head_learning_rate": 0.2}):
        refused(
            "no effect on an optimizer that is passed", tmp_path, model, extra={"optimizers": (own, None)}, **options
        )


# --- text ---

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert(dropout=0.0, attention=0.0, lora=0.0):
    config = BertConfig(**SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=attention)
    return text_model(BertModel(config, add_pooling_layer=False), lora)


def text_model(backbone, lora=0.0):
    config = hfproj.ProjectionHeadConfig(head="mlp", out_dim=6, backbone_adapter=LoraConfig(r=2, lora_dropout=lora))
    return get_peft_model(backbone, config)


def modern_bert(**dropout):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
    return text_model(ModernBertModel(ModernBertConfig(**SIZES, **special, **dropout)))


def texts(folder, model, columns="text", **options):
    collator = hfproj.TextViews(unlearned.tokenizer(), columns=columns)
    rows = [{**row, "other": "a large dog runs"} for row in unlearned.SENTENCES]
    return trainer(folder, model, rows, collator, **options)


@pytest.mark.parametrize("make", [bert, modern_bert, lambda: modern_bert(classifier_dropout=0.5)])
def test_one_sentence_twice_without_dropout_is_refused(tmp_path, make):
    model = make()
    before, flags = adapter(model), [m.training for m in model.modules()]
    state = torch.Generator().manual_seed(42).get_state()  # as transformers leaves it
    with pytest.raises(hfproj.UsageError, match=r"TextViews reads 'text' more than once.*no dropout acts"):
        texts(tmp_path, model)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(before[n], t) for n, t in adapter(model).items())
    assert torch.equal(torch.get_rng_state(), state)
    assert texts(tmp_path, model, columns=("text", "other"))  # pairs differ
    refused_too = ("text", "other", "text")
    with pytest.raises(hfproj.UsageError, match="more than once"):
        texts(tmp_path, model, columns=refused_too)


@pytest.mark.parametrize("make", [
    lambda: bert(dropout=0.1), lambda: bert(attention=0.2), lambda: bert(lora=0.1),
    lambda: modern_bert(attention_dropout=0.1), lambda: modern_bert(mlp_dropout=0.1),
])  # fmt: skip
def test_any_dropout_that_acts_tells_the_views_apart(tmp_path, make):
    assert texts(tmp_path, make())


def test_noise_on_words_is_allowed_and_tells_views_apart(tmp_path):
    run = texts(tmp_path, bert(), neftune_noise_alpha=5.0, max_steps=1)
    run.train()
    a, b = run.last_batch["h"]
    assert not torch.allclose(a, b)


# --- equal images ---


def test_equal_views_of_images_are_warned_of(tmp_path):
    still = {"flip_probability": 0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "blur_probability": 0}
    with pytest.warns(UserWarning, match="first two views of every image of this batch are equal"):
        trainer(tmp_path, collator=views(**still), max_steps=1).train()
    trainer(tmp_path, head_model(dropout=0.1), collator=views(**still), max_steps=1).train()  # as SimCSE does
    trainer(tmp_path, collator=views(**still), max_steps=1, patch_dropout=0.5).train()


# --- metrics ---

MEASURED = {"eval_strategy": "steps", "eval_steps": 1}


def renamed(count, column):
    return [{"image": item["image"], column: item["label"]} for item in images(count, seed=1)]


@pytest.mark.parametrize("metric", ["knn_z", "eval_knn_h"])
def test_k_nn_of_rows_without_the_label_column(tmp_path, metric):
    data = {"eval_dataset": renamed(6, "coarse_label")}
    message = rf"metric_for_best_model='{metric}' can't be measured: the items of eval_dataset have no 'label', only " \
        r"'image', 'coarse_label'; name the column of the labels: eval_collator=.*label_column"  # fmt: skip
    refused(message, tmp_path, metric_for_best_model=metric, extra=data, **MEASURED)
    collator = hfproj.EvalImages(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, label_column="coarse_label")
    run = trainer(
        tmp_path, metric_for_best_model=metric, extra={**data, "eval_collator": collator}, max_steps=1, **MEASURED
    )
    run.train()
    bank = {"eval_dataset": images(6), "bank_dataset": renamed(6, "coarse_label")}
    refused("the items of bank_dataset have no 'label'", tmp_path, metric_for_best_model=metric, extra=bank, **MEASURED)


def test_labels_that_are_negative_throughout(tmp_path):
    pixels = [item["image"] for item in images(6)]
    data = datasets.Dataset.from_dict({"image": pixels, "label": [-1] * 6})
    refused("no row of eval_dataset has a label: column 'label' is negative", tmp_path, metric_for_best_model="knn_h",
            extra={"eval_dataset": data}, **MEASURED)  # fmt: skip


@pytest.mark.parametrize(("metric", "data", "message"), [
    ("rankme", None, r"Unknown metric_for_best_model 'rankme'.*Did you mean 'rankme_[hz]'"),
    ("accuracy", None, "Unknown metric_for_best_model 'accuracy'"),
    ("knn_h", {"a": images(4), "b": images(4)}, "'knn_h'. Did you mean '[ab]_knn_h'"),
    ("loss", images(1), "Unknown metric_for_best_model 'loss'"),  # no batch of views
])  # fmt: skip
def test_metrics_that_evaluation_does_not_give(tmp_path, metric, data, message):
    data = data if data is not None else images(6)
    refused(message, tmp_path, metric_for_best_model=metric, extra={"eval_dataset": data}, **MEASURED)


def test_metrics_that_are_never_measured(tmp_path):
    refused("'std_h' would never be measured: set eval_strategy", tmp_path, metric_for_best_model="std_h",
            extra={"eval_dataset": images(6)})  # fmt: skip
    stop = {"eval_dataset": images(6), "callbacks": [EarlyStoppingCallback()]}
    refused("EarlyStoppingCallback needs a metric", tmp_path, extra=stop, **MEASURED)
    refused("would never be measured", tmp_path, extra=stop, metric_for_best_model="std_h")


def test_metrics_of_the_users_own_are_not_judged(tmp_path):
    class Adds(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_mine"] = 1.0

    extra = {"eval_dataset": images(6), "callbacks": [Adds()]}
    trainer(tmp_path, metric_for_best_model="mine", extra=extra, max_steps=1, **MEASURED).train()

    class Other(hfproj.ProjectionTrainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_mine": 2.0}

    extra = {"eval_dataset": images(6)}
    trainer(tmp_path, metric_for_best_model="mine", extra=extra, cls=Other, max_steps=1, **MEASURED).train()


def test_why_k_nn_is_not_measured_is_said_once(tmp_path, caplog):
    run = trainer(tmp_path, extra={"eval_dataset": renamed(6, "fine")}, max_steps=3, **MEASURED)
    with caplog.at_level(logging.WARNING, "hfproj.training"):
        run.train()
    said = [r.getMessage() for r in caplog.records if "k-NN is not measured" in r.getMessage()]
    assert len(said) == 1
    assert "have no 'label', only 'image', 'fine'" in said[0]
    assert not any("knn" in name for row in run.state.log_history for name in row)


def test_names_of_what_is_logged_are_of_one_quantity_each(tmp_path):
    data = images(9, seed=3)
    run = trainer(tmp_path, log_representation=True, max_steps=1, extra={"eval_dataset": data}, **MEASURED)
    run.train()
    names = {name for row in run.state.log_history for name in row}
    assert {"batch_rankme_h", "batch_std_z", "batch_positive_cosine_z", "eval_rankme_h", "eval_std_z"} <= names
    assert not names & {"rankme_h", "std_z", "positive_cosine_z"}
    final = hfproj.evaluate(run.model, test=data, collator=run.eval_collator, probes=[])
    logged = next(row["eval_rankme_h"] for row in run.state.log_history if "eval_rankme_h" in row)
    assert final.value("rankme", "h", "after") == pytest.approx(logged, rel=1e-6)
