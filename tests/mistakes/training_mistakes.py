"""Mistakes with the trainer, its arguments and callbacks: name → (call, words of its one line …)."""

import torch
from mistakes.things import (
    TEXTS,
    Triples,
    arguments,
    backbone,
    data,
    eval_images,
    head_model,
    images,
    splits,
    text_model,
    tokenizer,
    train,
    trainer,
)  # fmt: skip
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainingArguments, default_data_collator

import hfproj

Arguments = hfproj.ProjectionTrainingArguments
TRAINER = {
    "trainer: a path as data": (lambda: trainer(train_dataset="/path"), "load_image_dataset('/path')"),
    "trainer: a name as data": (lambda: trainer(train_dataset="digits"), "load_image_dataset('digits')"),
    "trainer: all splits": (lambda: trainer(train_dataset=splits()), "['train']"),
    "trainer: all splits as one to measure": (
        lambda: trainer(eval_dataset=splits(), bank_dataset=splits()), "bank_dataset", "['train']"),
    "trainer: a loader": (lambda: train(train_dataset=DataLoader(images(8))), "DataLoader", "dataset"),
    "trainer: fewer images than a batch": (lambda: trainer(train_dataset=images(2)), "per_device_train_batch_size"),
    "trainer: no data": (lambda: train(train_dataset=None), "train_dataset"),
    "trainer: items that are triples": (lambda: train(train_dataset=Triples()), "dict"),
    "trainer: images in another column": (
        lambda: train(train_dataset=data().rename_column("image", "img")), "image_column"),
    "trainer: a backbone": (lambda: trainer(of=backbone()), "get_peft_model"),
    "trainer: name of a backbone": (lambda: hfproj.ProjectionTrainer("vit_nano"), "get_peft_model"),
    "trainer: arguments first": (lambda: hfproj.ProjectionTrainer(arguments(), head_model()), "args", "model"),
    "trainer: transformers' arguments": (
        lambda: hfproj.ProjectionTrainer(head_model(), TrainingArguments(output_dir="/tmp/none", report_to="none")),
        "ProjectionTrainingArguments"),
    "trainer: arguments as a dict": (
        lambda: hfproj.ProjectionTrainer(head_model(), {"output_dir": "out"}), "ProjectionTrainingArguments"),
    "trainer: SimCLR by its paper's name": (lambda: trainer(objective="simclr"), "Did you mean 'nt_xent'?"),
    "trainer: objective's class": (
        lambda: trainer(objective=type(hfproj.create_objective("nt_xent"))), "'nt_xent'"),
    "trainer: a function as objective": (lambda: trainer(objective=lambda a, b: 0), "create_objective"),
    "trainer: torch's loss as objective": (lambda: train(objective=torch.nn.MSELoss()), "MSELoss", "objective"),
    "trainer: an objective that returns the loss alone": (lambda: train(objective=Own(lambda z: z.sum())), "loss, {}"),
    "trainer: an objective that returns a vector": (lambda: train(objective=Own(lambda z: z[0])), "Own", "loss, {}"),
    "trainer: an objective that returns a number": (lambda: train(objective=Own(lambda z: 0.5)), "float", "loss, {}"),
    "trainer: an objective that returns nothing": (lambda: train(objective=Own(lambda z: None)), "None", "loss, {}"),
    "trainer: an objective whose terms are numbers": (
        lambda: train(objective=Own(lambda z: (z.sum(), {"mean": 0.5}))), "float", "loss, {}"),
    "trainer: `loss`": (lambda: trainer(loss="nt_xent"), "objective"),
    "trainer: misspelt option of the objective": (
        lambda: trainer(objective={"name": "nt_xent", "temprature": 0.1}), "Did you mean 'temperature'?"),
    "trainer: temperature beside the objective": (
        lambda: trainer(objective="nt_xent", temperature=0.1), "temperature", "objective={'name': 'nt_xent'"),
    "trainer: BYOL without a predictor": (lambda: trainer(objective="byol"), "predictor"),
    "trainer: SwAV without prototypes": (lambda: trainer(objective="swav"), "prototypes"),
    "trainer: SigLIP without scales": (lambda: trainer(objective="sigmoid"), "scales"),
    "trainer: labels where there are none": (
        lambda: train(objective="supcon", train_dataset=images(8, labels=False)), "labels"),
    "trainer: regularizer by name": (lambda: trainer(regularizers="werank"), "{'werank': 0.1}"),
    "trainer: regularizers in a list": (lambda: trainer(regularizers=["werank"]), "{'werank': 0.1}"),
    "trainer: weight as text": (lambda: trainer(regularizers={"werank": "0.1"}), "weight", "'0.1'"),
    "trainer: a weight beside a sparsity": (
        lambda: trainer(regularizers={"sparse_head": {"sparsity": 0.5, "weight": 0.1}}), "no weight", "leave weight"),
    "trainer: sparsity in percent": (
        lambda: trainer(regularizers={"sparse_head": {"sparsity": 50}}), "[0, 1)", "got 50", "0.5"),
    "trainer: a target and a schedule": (
        lambda: trainer(regularizers={"bottleneck": {"at_most": 2.0, "schedule": "linear"}}), "finds the weight"),
    "trainer: a target of 0": (lambda: trainer(regularizers={"bottleneck": {"at_most": 0}}), "at_most", "other than 0"),
    "trainer: a rate without a target": (
        lambda: trainer(regularizers={"bottleneck": {"weight_rate": 0.2}}), "no effect without a target"),
    "trainer: a bound and a set point": (
        lambda: trainer(regularizers={"bottleneck": {"at_most": 2.0, "keep_at": 1.0}}), "got both", "leave one out"),
    "trainer: misspelt regularizer": (lambda: trainer(regularizers={"wrank": 0.1}), "Did you mean 'werank'?"),
    "trainer: an objective as regularizer": (lambda: trainer(regularizers={"nt_xent": 0.1}), "Available"),
    "trainer: a collator without views": (lambda: train(data_collator=eval_images()), "ImageViews"),
    "trainer: collator's class": (lambda: trainer(data_collator=hfproj.ImageViews), "ImageViews.for_model(model)"),
    "trainer: transformers' collator": (
        lambda: train(data_collator=default_data_collator), "default_data_collator", "ImageViews.for_model(model)"),
    "trainer: a transform as collator": (lambda: train(data_collator=torch.nn.Identity()), "views"),
    "trainer: collator of texts for images": (
        lambda: train(data_collator=hfproj.TextViews(tokenizer())), "reads images", "ImageViews"),
    "trainer: a text model without a collator": (
        lambda: trainer(of=text_model(), train_dataset=TEXTS, data_collator=None), "TextViews"),
    "trainer: images to a text model": (lambda: train(of=text_model()), "TextViews"),
    "trainer: texts to an image model": (
        lambda: train(train_dataset=TEXTS, data_collator=hfproj.TextViews(tokenizer())), "input_ids"),
    "trainer: tokenizer": (lambda: trainer(tokenizer=tokenizer()), "processing_class"),
    "trainer: callback by name": (lambda: trainer(callbacks="spectrum"), "callbacks=[hfproj.SpectrumCallback()]"),
    "trainer: one callback": (
        lambda: trainer(callbacks=hfproj.SpectrumCallback()), "callbacks=[hfproj.SpectrumCallback()]"),
    "trainer: compute_metrics": (lambda: trainer(compute_metrics=len), "hfproj.evaluate"),
    "trainer: early stopping without a metric": (
        lambda: trainer(callbacks=[EarlyStoppingCallback()]), "metric_for_best_model"),
    "trainer: a metric that is not measured": (
        lambda: trainer(eval_dataset=images(8), args={"metric_for_best_model": "accuracy", "eval_strategy": "steps"}),
        "knn_h"),
    "trainer: k-NN without labels": (
        lambda: trainer(eval_dataset=images(8, labels=False), args={"metric_for_best_model": "knn_h",
                                                                    "eval_strategy": "steps"}), "label_column"),
    "trainer: resumed from nowhere": (lambda: trainer().train(resume_from_checkpoint="/no/such"), "/no/such"),
    "trainer: resumed without a checkpoint": (lambda: trainer().train(resume_from_checkpoint=True), "checkpoint"),
    "trainer: continued from nowhere": (lambda: trainer(continue_from="/no/such"), "/no/such"),
    "trainer: one epoch by position": (lambda: trainer().train(3), "resume_from_checkpoint", "3"),
    "trainer: a loaded adapter is frozen": (
        lambda: train(of=_frozen()), "is_trainable=True"),
    "trainer: patch dropout of a network without patches": (
        lambda: trainer(of=_plain(), args={"patch_dropout": 0.5}), "patch_dropout"),
}  # fmt: skip
ARGUMENTS = {
    "arguments: lr": (lambda: Arguments("out", lr=1e-3), "learning_rate"),
    "arguments: epochs": (lambda: Arguments("out", epochs=5), "num_train_epochs"),
    "arguments: batch_size": (lambda: Arguments("out", batch_size=64), "per_device_train_batch_size"),
    "arguments: temperature": (lambda: Arguments("out", temperature=0.1), "objective="),
    "arguments: misspelt": (lambda: Arguments("out", learning_rat=1e-3), "Did you mean 'learning_rate'?"),
    "arguments: the older name of a strategy": (lambda: Arguments("out", evaluation_strategy="epoch"), "eval_strategy"),
    "arguments: learning rate as text": (lambda: arguments(learning_rate="1e-3"), "learning_rate", "'1e-3'"),
    "arguments: patch dropout of 1": (lambda: arguments(patch_dropout=1.0), "patch_dropout", "0.5"),
    "arguments: momentum as a percentage": (lambda: arguments(ema_momentum=99.6), "ema_momentum", "0.996"),
    "arguments: bad images": (lambda: arguments(on_bad_image="ignore"), "on_bad_image", "skip"),
    "arguments: a strategy that is none": (lambda: arguments(eval_strategy="epochs"), "eval_strategy", "epoch"),
    "arguments: a schedule that is none": (lambda: arguments(lr_scheduler_type="cos"), "lr_scheduler_type", "cosine"),
    "arguments: an optimizer that is none": (lambda: arguments(optim="adam"), "optim", "adamw_torch"),
    "arguments: a misspelt optimizer": (lambda: arguments(optim="adamww"), "Did you mean 'adamw_torch'?"),
    "arguments: a tracker that is none": (lambda: trainer(args={"report_to": "wandbb"}), "report_to", "wandb"),
    "arguments: remove_unused_columns": (lambda: arguments(remove_unused_columns=True), "leave it False"),
    "arguments: pickles to the Hub": (lambda: arguments(hub_strategy="checkpoint"), "every_save"),
    "arguments: no folder": (lambda: trainer(args={"output_dir": "/proc/none"}), "output_dir"),
    "arguments: negative rate of the head": (lambda: arguments(head_learning_rate=-1.0), "head_learning_rate"),
    "arguments: bf16 and fp16": (lambda: arguments(bf16=True, fp16=True), "fp16", "bf16"),
    "arguments: the best of what is not measured": (
        lambda: trainer(args={"load_best_model_at_end": True}), "eval_strategy"),
}  # fmt: skip
CALLBACKS = {
    "spectrum: metrics as text": (lambda: hfproj.SpectrumCallback(metrics="rankme"), "metrics=['rankme']"),
    "spectrum: misspelt metric": (lambda: hfproj.SpectrumCallback(metrics=["rank_me"]), "Did you mean 'rankme'?"),
    "spectrum: every 0 steps": (lambda: hfproj.SpectrumCallback(every=0), "every"),
    "spectrum: images by position": (lambda: hfproj.SpectrumCallback(images(8)), "metrics"),
    "spectrum: the data set as images": (lambda: hfproj.SpectrumCallback(images=images(8)), "images", "dataset="),
    "collapse: another action": (lambda: hfproj.CollapseCallback(action="halt"), "action", "stop"),
    "collapse: a limit of nothing": (lambda: hfproj.CollapseCallback(limits={"rankme": 3.0}), "rankme_h"),
    "collapse: a misspelt measure": (
        lambda: hfproj.CollapseCallback(limits={"rank_h": 3.0}), "rank_h", "Did you mean 'rankme_h'?"),
    "collapse: a limit on what nothing measures": (
        lambda: train(callbacks=[hfproj.CollapseCallback(limits={"losss": (None, 3.0)})]), "Did you mean 'loss'?"),
    "collapse: a limit alone": (lambda: hfproj.CollapseCallback(limits=0.1), "limits", "{"),
    "collapse: patience 0": (lambda: hfproj.CollapseCallback(patience=0), "patience"),
    "curvature: of nothing": (lambda: hfproj.CurvatureCallback(of="backbones"), "Unknown Hessian", "head"),
    "online probe: without labels": (
        lambda: train(train_dataset=images(8, labels=False), callbacks=[hfproj.OnlineProbeCallback()]), "label"),
    "online probe: k as text": (lambda: hfproj.OnlineProbeCallback(k="20"), "k", "'20'"),
}  # fmt: skip


class Own(torch.nn.Module):
    """An objective that returns what it is told to."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, z, **others):
        return self.value(z)


def _frozen():
    from mistakes.things import saved

    return hfproj.from_pretrained(saved(), backbone=backbone())


def _plain():
    from peft import get_peft_model

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8))
    return get_peft_model(net, hfproj.ProjectionHeadConfig(head="linear", out_dim=4, in_dim=8))


MISTAKES = {**TRAINER, **ARGUMENTS, **CALLBACKS}
