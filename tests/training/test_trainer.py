"""`ProjectionTrainer`: losses, epochs and streams, and what it refuses."""

import datasets
import pytest
import torch
from cases import QUERY
from peft import LoraConfig, PeftModel, get_peft_model
from small import (
    Counting,
    Seen,
    adapter,
    backbone,
    blocks,
    differs,
    head_model,
    images,
    in_order,
    trainable,
    trainer,
    views,
)
from torch import nn
from transformers import TrainingArguments

import hfproj
from hfproj.data import StreamDataset
from hfproj.objectives.nt_xent import nt_xent_loss
from hfproj.regularizers import Weighted


def last(run, key):
    return next(entry[key] for entry in reversed(run.state.log_history) if key in entry)


# --- the loss ---


@pytest.mark.parametrize("labels", [True, False])
def test_accumulated_steps_average_the_losses(tmp_path, labels):
    """One SGD step over two accumulated batches moves by the mean of the two gradients, labels or not."""
    data, collator = images(8, labels=labels), views()
    run = trainer(
        tmp_path,
        head_model(head_options={"hidden_dim": 12, "norm": None}),
        data,
        collator,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=0.0,
    )
    start = trainable(run.model)
    order = [index for _, index in run._get_train_sampler()]
    losses = []
    for part in (order[:4], order[4:]):
        batch = collator([{**data[i], "index": i, "epoch": 0} for i in part])
        assert ("labels" in batch) == labels
        z = torch.stack([run.model(view).projection for view in batch["views"]])
        losses.append(nt_xent_loss(z, temperature=0.2))
    parameters = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(sum(losses) / 2, list(parameters.values()))
    run.train()
    assert run.state.global_step == 1
    assert last(run, "loss") == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    for (name, parameter), gradient in zip(parameters.items(), gradients):
        torch.testing.assert_close(parameter.detach(), start[name] - 0.1 * gradient, rtol=1e-5, atol=3e-6)  # float32


class Spread(nn.Module):
    """A toy regularizer."""

    def forward(self, model, h, z, step=None):
        assert isinstance(model, PeftModel)
        assert step.global_step == 0
        assert h.shape[:2] == z.shape[:2] == (2, 4)
        return (z.square().mean() - 1).square() + 3


def test_regularizers_are_added_by_weight_and_logged_by_value(tmp_path):
    regularizers = {"spread": Weighted(Spread(), 0.5), "module": Spread()}
    run = trainer(tmp_path, max_steps=1, extra={"regularizers": regularizers})
    run.train()
    assert last(run, "spread") == last(run, "module") >= 3
    assert last(run, "loss") == pytest.approx(last(run, "objective") + 1.5 * last(run, "spread"), rel=1e-5)


def test_the_log_holds_terms_and_the_state_of_the_representation(tmp_path):
    run = trainer(tmp_path, max_steps=4, logging_steps=2, log_representation=True)
    run.train()
    entry = run.state.log_history[0]
    assert {f"batch_{what}_{layer}" for what in ("rankme", "std", "positive_cosine") for layer in "hz"} < entry.keys()
    assert 1 <= entry["batch_rankme_h"] <= 8.01
    assert -1 <= entry["positive_cosine"] <= 1


def test_bf16_computes_the_loss_in_float32(tmp_path):
    seen = []

    class Objective(Counting):
        def forward(self, z, **others):
            seen.append((z.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(z, **others)

    run = trainer(tmp_path, max_steps=2, bf16=True, extra={"objective": Objective()})
    linear = next(m for m in blocks(run.model)[0].modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    start = adapter(run.model)
    run.train()
    assert seen.count((torch.float32, False)) == 2
    assert torch.bfloat16 in seen
    assert differs(start, adapter(run.model))
    assert all(tensor.dtype != torch.bfloat16 for tensor in adapter(run.model).values())


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_training_stops_at_the_first_value_that_is_not_finite(tmp_path, name):
    class Failing(Counting):
        calls = 0

        def forward(self, z, **others):
            loss, terms = super().forward(z, **others)
            self.calls += 1
            if self.calls < 4:
                return loss, terms
            # The second has a finite value and an infinite slope.
            return (loss / 0 if name == "loss" else loss + (z - z.detach()).abs().sum().sqrt()), terms

    run = trainer(tmp_path, max_steps=9, save_strategy="steps", save_steps=2, extra={"objective": Failing()})
    assert run.args.logging_nan_inf_filter
    message = rf"The {name} became (nan|inf) at step 4; training stopped, the last good checkpoint is .*checkpoint-2\."
    with pytest.raises(hfproj.NonFiniteLossError, match=message):
        run.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]
    loaded = hfproj.from_pretrained(tmp_path / "checkpoint-2", backbone=backbone())
    assert all(tensor.isfinite().all() for tensor in adapter(loaded).values())
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    again = trainer(tmp_path, max_steps=4, extra={"objective": Counting()})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


# --- epochs and streams ---


def seen(folder, workers=0, resume=None, dataset=None, **args):
    run = trainer(
        folder, head_model(), dataset or images(12), views(), cls=Seen, dataloader_num_workers=workers, **args
    )
    run.train(resume_from_checkpoint=resume)
    return run.seen


def test_each_epoch_has_its_own_views_and_order(tmp_path):
    run = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    whole = seen(tmp_path, **run)
    first, second = whole[:12], whole[12:]
    assert [epoch for epoch, _, _ in whole] == [0] * 12 + [1] * 12
    assert [i for _, i, _ in first] != [i for _, i, _ in second]
    assert {i for _, i, _ in first} == {i for _, i, _ in second} == set(range(12))
    assert not {pixels for _, _, pixels in first} & {pixels for _, _, pixels in second}
    assert seen(tmp_path / "workers", workers=2, **run) == whole
    # Step 4 is the first of epoch 2: the resumed run goes on with its second batch, with the views of epoch 2.
    assert seen(tmp_path / "resumed", resume=tmp_path / "checkpoint-4", **run) == whole[16:]


@in_order
def test_sequential_order_and_seeds(tmp_path):
    data = images(8)
    in_order = seen(tmp_path, dataset=data, train_sampling_strategy="sequential")
    assert [i for _, i, _ in in_order] == list(range(8))
    by_seed = [[i for _, i, _ in seen(tmp_path, dataset=data, data_seed=s)] for s in (0, 1, 0)]
    assert by_seed[0] == by_seed[2] != by_seed[1]


@in_order
@pytest.mark.parametrize("kind", ["generator", "datasets"])
@pytest.mark.parametrize("workers", [0, 1])
def test_streams(tmp_path, kind, workers):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from images(8)

    def stream():
        if kind == "generator":
            return Stream()
        return datasets.Dataset.from_list(images(8), features=FEATURES).to_iterable_dataset()

    run = seen(tmp_path, workers, dataset=stream(), max_steps=5)
    assert [(epoch, i) for epoch, i, _ in run] == [(e, i) for e in (0, 1) for i in range(8)] + [
        (2, i) for i in range(4)
    ]
    # The position decides the views: those of a map-style data set in the same order.
    as_map = seen(tmp_path, dataset=images(8), max_steps=5, train_sampling_strategy="sequential")
    assert as_map == run


def test_the_end_of_a_stream(tmp_path):
    """10 images in batches of 4, two a step: the last 2 images of each pass are dropped."""
    run = seen(tmp_path, dataset=StreamDataset(images(10)), gradient_accumulation_steps=2, max_steps=2)
    assert [(epoch, i) for epoch, i, _ in run] == [(e, i) for e in (0, 1) for i in range(8)]
    refused(
        "stream with too few images for one step", tmp_path, dataset=StreamDataset(images(3)), max_steps=1, train=True
    )


FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})


# --- what is refused ---


def refused(message, *args, train=False, **options):
    def attempt():
        run = trainer(*args, **options)
        if train:
            run.train()

    with pytest.raises(hfproj.UsageError, match=message):
        attempt()


def test_batches_that_cannot_work(tmp_path):
    one = views(num_views=1)
    refused("NTXent needs at least 2 views of each image, got 1; set num_views=2", tmp_path, collator=one,
            train=True)  # fmt: skip
    refused("BatchNorm needs at least 2 rows", tmp_path, per_device_train_batch_size=1, train=True)
    no_norm = head_model(head_options={"hidden_dim": 12, "norm": None})
    refused("image", tmp_path, no_norm, per_device_train_batch_size=1, train=True)
    refused("train_dataset has 3 images, fewer than one batch of 4.*lower per_device", tmp_path, dataset=images(3))
    refused("collator returned no 'views'", tmp_path, collator=lambda items: {"x": torch.zeros(1)}, train=True)

    def without_index(items):
        return {"views": views()(items)["views"]}

    refused("patch_dropout needs 'index'", tmp_path, collator=without_index, patch_dropout=0.5, train=True)
    refused("is a stream, and 2 workers would each count", tmp_path, dataset=StreamDataset(images(8)), max_steps=1,
            dataloader_num_workers=2)  # fmt: skip
    for place in ("eval_dataset", "bank_dataset"):
        refused(f"{place} is a stream.*islice", tmp_path, extra={place: StreamDataset(images(8))})
        refused(f"Expected {place} to be a data set.*got int 7", tmp_path, extra={place: 7})
    for wrong in (7, "cifar10", {"train": images(8)}):
        refused(r"Expected train_dataset to be a data set.*got (int|str|dict)", tmp_path, None, wrong)


def test_models_without_a_head(tmp_path):
    refused("ViTModel without a projection head; attach one with", tmp_path, backbone())
    lora = get_peft_model(backbone(), LoraConfig(target_modules=[QUERY], r=1))
    refused("PeftModel without a projection head", tmp_path, lora)


def test_needs_of_an_objective(tmp_path):
    class Needy(Counting):
        needs = frozenset({"prediction"})

        def forward(self, z, *, prediction=None, **others):
            return super().forward(prediction, **others)

    refused(r"Needy needs 'prediction'.*ProjectionHeadConfig\(predictor=", tmp_path, extra={"objective": Needy()},
            train=True)  # fmt: skip
    model = head_model(predictor={"head": "linear"})
    trainer(tmp_path, model, extra={"objective": Needy()}, max_steps=1).train()


def test_options_of_the_trainer(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(hfproj.UsageError, match=r"Expected args as hfproj\.Projection.* got TrainingArguments"):
        hfproj.ProjectionTrainer(head_model(), args, train_dataset=images(12))
    for name in ("compute_metrics", "compute_loss_func"):
        refused(f"takes no {name}", tmp_path, extra={name: lambda *_: {}})
    run = trainer(tmp_path)
    with pytest.raises(hfproj.UsageError, match="extract_features"):
        run.predict(images(4))


def test_several_gpus_in_one_process(tmp_path):
    args = hfproj.ProjectionTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(hfproj.UsageError, match=r"2 GPUs are visible to one process.*accelerate launch"):
        hfproj.ProjectionTrainer(head_model(), args, train_dataset=images(12))


def test_defaults_come_from_the_model(tmp_path):
    args = hfproj.ProjectionTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, seed=3, per_device_train_batch_size=2, disable_tqdm=True
    )
    model = get_peft_model(hfproj.load_backbone("vit_nano"), hfproj.ProjectionHeadConfig())
    run = hfproj.ProjectionTrainer(model, args, train_dataset=images(4), eval_dataset=images(4))
    assert (run.data_collator.size, run.data_collator.seed) == (32, 3)
    assert run.evaluate()["eval_knn_h"] >= 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"objective": 3}, "Expected objective to be an objective"),
        (
            {"objective": {"temperature": 0.2}},
            r"Expected objective to be an objective.*'name'.*got \{'temperature': 0.2\}",
        ),
        ({"regularizers": ["koleo"]}, r"Expected regularizers to be a dict, name → weight"),
    ],
)
def test_what_describes_no_objective_or_regularizer(tmp_path, extra, message):
    with pytest.raises(hfproj.UsageError, match=message):
        trainer(tmp_path, extra=extra)


def test_a_head_without_parameters_on_a_frozen_backbone(tmp_path):
    made = trainer(tmp_path, head_model(head="identity", head_options={}, out_dim=None, trainable="head"))
    with pytest.raises(hfproj.UsageError, match=r"head has no parameters and the backbone is frozen.*backbone_adapter"):
        made.train()
