"""Mistakes in saving, loading, pushing, exporting and on a recipe's command line: name → (call, words …)."""

import tempfile
from pathlib import Path

from mistakes.things import (
    backbone,
    bert,
    config,
    head_model,
    lora_model,
    model,
    own_head_model,
    recipe,
    results,
    saved,
    saved_lora,
    saved_own_head,
    x,
)  # fmt: skip
from peft import PeftModel, get_peft_model

import hfproj
from hfproj.hub.staging import stage

push, pull = hfproj.push_to_hub, hfproj.from_pretrained
SMALL = ("--max_steps", 1, "--train_limit", 64, "--test_limit", 64, "--use_cpu", 1, "--output_dir")


def folder():
    return Path(tempfile.mkdtemp(prefix="hfproj-mistakes-"))


SHARING = {
    "push: swapped": (lambda: push("me/mine", model()), "push_to_hub(model, 'me/mine')"),
    "push: no repository": (lambda: push(model()), "repo_id"),
    "push: no owner": (lambda: push(model(), "mine"), "'user/name'"),
    "push: an address": (lambda: push(model(), "https://huggingface.co/me/mine"), "'me/mine'"),
    "push: a backbone": (lambda: stage(backbone(), folder(), "me/mine"), "projection head"),
    "push: the results by position": (lambda: push(model(), "me/mine", results()), "results=…"),
    "push: results that are a dict": (lambda: push(model(), "me/mine", results={"knn": 0.5}), "results"),
    "push: an adapter that is not there": (lambda: stage(model(), folder(), "me/mine", adapters=["other"]), "other"),
    "push: private as text": (lambda: push(model(), "me/mine", private="yes"), "private"),
    "push: to a commit": (lambda: push(model(), "me/mine", revision="0" * 40), "branch"),
    "push: an own head": (lambda: stage(own_head_model(), folder(), "me/mine"), "someones_own", "register_head"),
    "pull: an own head": (
        lambda: pull(saved_own_head()), "someones_own", "hfproj.register_head('someones_own', …)"),
    "pull: an own head alone": (
        lambda: hfproj.load_head(saved_own_head()), "someones_own", "hfproj.register_head('someones_own', …)"),
    "pull: an own head through PEFT": (
        lambda: PeftModel.from_pretrained(hfproj.load_backbone("vit_nano"), str(saved_own_head())),
        "someones_own", "hfproj.register_head('someones_own', …)"),
    "pull: a folder that is not there": (lambda: pull("./no/such/folder"), "folder"),
    "pull: an empty folder": (lambda: pull(folder()), "adapter_config.json"),
    "pull: an adapter that is not there": (lambda: pull(saved(), adapter="student"), "adapter='default'"),
    "pull: name of a backbone": (lambda: pull(saved(), backbone="vit_nano"), "backbone", "load_backbone"),
    "pull: the backbone that ships": (lambda: pull("vit_nano"), "backbone", "hfproj.load_backbone('vit_nano')"),
    "pull: the head of the backbone that ships": (
        lambda: hfproj.load_head("vit_nano"), "backbone", "hfproj.load_backbone('vit_nano')"),
    "pull: the backbone by position": (lambda: pull(saved(), backbone()), "backbone=…"),
    "pull: the backbone first": (lambda: pull(backbone(), saved()), "backbone="),
    "pull: onto a model with a head": (lambda: pull(saved(), backbone=head_model()), "load_adapter"),
    "pull: onto a text model": (lambda: pull(saved(), backbone=bert()), "another backbone"),
    "pull: onto other weights": (
        lambda: pull(saved(), backbone=backbone(weights=1)), "backbone_check"),
    "pull: a backbone that nobody knows": (lambda: pull(saved()), "backbone="),
    "pull: a LoRA": (lambda: pull(saved_lora()), "LORA"),
    "pull: a name with a dot": (lambda: pull(saved(), backbone=backbone(), adapter_name="v1.0"), "'v1_0'"),
    "pull: a backbone's folder": (lambda: pull(_backbone_folder()), "load_backbone"),
    "pull: a model": (lambda: hfproj.load_head(model()), "detach"),
    "pull: the backbone from an adapter's folder": (lambda: hfproj.load_backbone(str(saved())), "from_pretrained"),
    "adapters: of a folder that is not there": (lambda: hfproj.list_adapters("/no/such"), "/no/such"),
    "detach: a backbone": (lambda: hfproj.detach(backbone()), "get_peft_model"),
    "detach: an adapter that is not there": (lambda: hfproj.detach(model(), "other"), "other", "default"),
    "export: swapped": (lambda: hfproj.export_onnx("model.onnx", model()), "path", "PeftModel"),
    "export: no folder": (lambda: hfproj.export_merged(lora_model()), "folder"),
    "export: a backbone": (lambda: hfproj.export_merged(backbone(), folder()), "head"),
    "convert: a method that is none": (lambda: hfproj.convert({}, "simclr_v3"), "Unknown", "Available"),
    "convert: a file that is not there": (lambda: hfproj.convert("/no/such.pth", "moco_v3"), "/no/such.pth"),
    "convert: a file of other tensors": (lambda: hfproj.convert({"a": x(3)}, "moco_v3"), "moco_v3"),
    "load: PEFT's verb on a second backbone": (
        lambda: PeftModel.from_pretrained(get_peft_model(backbone(), config()), str(saved())), "load_adapter"),
}  # fmt: skip
RECIPES = {
    "recipe: misspelt head": (lambda: recipe("simclr_vit", *SMALL, folder(), "--head", "mpl"), "Did you mean 'mlp'?"),
    "recipe: SimCLR by its paper's name": (
        lambda: recipe("simclr_vit", *SMALL, folder(), "--objective", "simclr"), "Did you mean 'nt_xent'?"),
    "recipe: a folder that is not there": (
        lambda: recipe("simclr_vit", *SMALL, folder(), "--dataset", "/no/such"), "/no/such"),
    "recipe: a backbone of timm": (
        lambda: recipe("simclr_vit", *SMALL, folder(), "--backbone", "resnet50"), "timm/resnet50"),
    "recipe: crops beyond the image": (
        lambda: recipe("simclr_vit", *SMALL, folder(), "--crop_scale", -1), "scale"),
    "recipe: metrics that are none": (
        lambda: recipe("simclr_vit", *SMALL, folder(), "--watch_metrics", "rank"), "rankme"),
    "recipe: trainable blocks beside its LoRA": (
        lambda: recipe("simclr_vit", *SMALL, folder(), "--trainable", 2), "trains the backbone itself"),
    "recipe: trainable='lora'": (lambda: recipe("simclr_vit", *SMALL, folder(), "--trainable", "lora"), "adapter"),
    "recipe: more to hold out than there is": (
        lambda: recipe("simclr_vit", *SMALL, folder(), "--holdout", 5000), "5000"),
    "recipe: the backbone of no preset": (
        lambda: recipe("simclr_vit", *SMALL, folder(), "--backbone", "preset"), "--preset"),
    "reproduce recipe: a table that is none": (
        lambda: recipe("reproduce", "last_layer.table7"), "Did you mean 'last_layer.table"),
    "reproduce recipe: a scale that is none": (
        lambda: recipe("reproduce", "last_layer.table2", "--scale", "small"), "mini"),
    "reproduce recipe: a row that is none": (
        lambda: recipe("reproduce", "last_layer.table2", "--rows", "SimCRL"), "Did you mean 'SimCLR'?"),
    "reproduce recipe: a folder without data sets": (
        lambda: recipe("reproduce", "last_layer.table2", "--data", folder()), "cifar10", "leave it out"),
    "reproduce recipe: no worker": (lambda: recipe("reproduce", "last_layer.table2", "--workers", 0), "at least 1"),
    "probe recipe: a probe that is none": (
        lambda: recipe("probe", "--model", "vit_nano", "--probes", "kkn"), "Did you mean 'knn'?"),
    "probe recipe: a GPU that is not there": (
        lambda: recipe("probe", "--model", "vit_nano", "--device", "cuda:99"), "--device", "cuda:99"),
    "probe recipe: a model that is none": (lambda: recipe("probe", "--model", "/no/model"), "/no/model"),
    "probe recipe: a layer that is none": (
        lambda: recipe("probe", "--model", "vit_nano", "--layers", "99", "--test_limit", 8, "--train_limit", 8), "99"),
}  # fmt: skip


def _backbone_folder():
    where = folder()
    backbone().save_pretrained(where)
    return where


MISTAKES = {**SHARING, **RECIPES}
