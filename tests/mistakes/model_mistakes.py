"""Mistakes with heads, objectives, backbones and a model's forward: name → (call, words of its one line …)."""

import numpy as np
import torch
from mistakes.things import (
    NotAHead,
    OwnHead,
    attach,
    attach_lora,
    backbone,
    bert,
    config,
    data,
    head_model,
    model,
    nano,
    text_model,
    x,
)  # fmt: skip
from peft import LoraConfig, get_peft_model
from torch import nn

import hfproj
from hfproj.heads.mlp import MLPHead

Config = hfproj.ProjectionHeadConfig


class AnyHead(OwnHead):
    """A head that does something else with z at last."""

    change = None

    def forward(self, h):
        return AnyHead.change(super().forward(h))


def _own_head(change):
    """A model with a head that returns what `change` makes of z."""
    if "any_head" not in hfproj.list_heads():
        hfproj.register_head("any_head", AnyHead)
    AnyHead.change = change
    return get_peft_model(backbone(), Config(head="any_head", out_dim=4))


IDS = torch.ones(2, 5, dtype=torch.long)
CONFIGS = {
    "config: head and width by position": (lambda: Config("mlp", 128), "head='mlp'", "out_dim=128"),
    "config: the head by position": (lambda: Config("mlp"), "head='mlp'"),
    "config: a head's option among the config's": (
        lambda: Config(head="mlp", hidden_dim=512), "head_options={'hidden_dim': 512}"),
    "config: LoRA's option among the config's": (lambda: Config(head="mlp", r=8), "backbone_adapter=LoraConfig(r=8)"),
    "config: LoRA's targets among the config's": (
        lambda: Config(target_modules=["query"]), "backbone_adapter=LoraConfig(target_modules="),
    "config: misspelt field": (lambda: Config(out_dims=128), "Did you mean 'out_dim'?"),
    "config: another library's name of the width": (lambda: Config(projection_dim=128), "projection_dim", "out_dim"),
    "config: a module as head": (lambda: Config(head=nn.Linear(8, 8)), "register_head"),
    "config: a class as head": (lambda: Config(head=MLPHead), "list_heads()"),
    "config: width as text": (lambda: attach(out_dim="128"), "out_dim", "whole number", "'128'"),
    "config: width as float": (lambda: attach(out_dim=128.0), "out_dim", "whole number", "128.0"),
    "config: width 0": (lambda: attach(out_dim=0), "out_dim", "0"),
    "config: negative width": (lambda: attach(out_dim=-1), "out_dim", "-1"),
    "config: misspelt head": (lambda: attach(head="mpl"), "Did you mean 'mlp'?"),
    "config: misspelt option of the head": (
        lambda: attach(head_options={"hidden_dims": 512}), "Did you mean 'hidden_dim'?"),
    "config: option of the head as text": (
        lambda: attach(head_options={"hidden_dim": "512"}), "hidden_dim", "whole number"),
    "config: in_dim among the head's options": (
        lambda: attach(head_options={"hidden_dim": 8, "in_dim": 16}), "in_dim", "head_options"),
    "config: trainable='lora'": (lambda: Config(trainable="lora"), "trainable", "adapter"),
    "config: trainable=True": (lambda: Config(trainable=True), "trainable", "adapter"),
    "config: trainable='2'": (lambda: Config(trainable="2"), "trainable", "2"),
    "config: more blocks than there are": (lambda: attach(trainable=99), "99", "2"),
    "config: trainable blocks beside a LoRA": (
        lambda: Config(trainable=2, backbone_adapter=LoraConfig()), "drop one of the two"),
    "config: pooling by another name": (lambda: attach(pooling="avg"), "pooling", "mean"),
    "config: pooling in capitals": (lambda: attach(pooling="CLS"), "pooling", "Did you mean 'cls'?"),
    "config: pooler of a backbone without one": (lambda: attach(pooling="pooler"), "pooler", "cls"),
    "config: a block that is not there": (lambda: attach(layer=99), "99"),
    "config: a block by name": (lambda: Config(layer="encoder.layer.3"), "layer", "index"),
    "config: prototypes as text": (lambda: Config(prototypes="300"), "prototypes", "'300'"),
    "config: a single prototype": (lambda: Config(prototypes=1), "prototypes", "at least 2"),
    "config: predictor as a width": (lambda: Config(predictor=512), "predictor", "{'head': 'mlp', 'hidden_dim': 512}"),
    "config: predictor=True": (lambda: Config(predictor=True), "predictor", "{'head': 'mlp', 'hidden_dim': 512}"),
    "config: misspelt head of the predictor": (lambda: attach(predictor={"head": "mpl"}), "Did you mean 'mlp'?"),
    "config: scales as a number": (lambda: attach(scales=10.0), "scales", "{"),
    "config: LoRA by name": (lambda: Config(backbone_adapter="lora"), "LoraConfig(r=8)"),
    "config: LoRA's class": (lambda: Config(backbone_adapter=LoraConfig), "LoraConfig(r=8)"),
    "config: LoRA as a dict without its type": (lambda: Config(backbone_adapter={"r": 8}), "peft_type", "LoraConfig"),
    "config: targets that are not there": (lambda: attach_lora(target_modules=["qkvv"]), "qkvv", "target_modules"),
    "config: targets of another architecture": (
        lambda: attach_lora(target_modules=["c_attn"]), "c_attn", "leave them out"),
    "config: modules_to_save": (lambda: attach_lora(modules_to_save=["layernorm"]), "trainable=n"),
    "config: task type": (lambda: Config(task_type="FEATURE_EXTRACTION"), "task_type", "None"),
    "config: a head as the backbone's adapter": (lambda: Config(backbone_adapter=Config()), "head itself", "LoRA"),
    "config: an objective that it does not know": (
        lambda: Config.for_objective("simclr"), "Did you mean 'nt_xent'?"),
    "config: objective's class": (
        lambda: Config.for_objective(type(hfproj.create_objective("nt_xent"))), "'nt_xent'"),
    "attach: a second head by get_peft_model": (lambda: get_peft_model(head_model(), config()), "add_adapter"),
    "attach: name with a dot": (lambda: get_peft_model(backbone(), config(), adapter_name="v1.0"), "'v1_0'"),
    "attach: second name with a dot": (lambda: head_model().add_adapter("v1.0", config()), "'v1_0'"),
    "attach: empty name": (lambda: get_peft_model(backbone(), config(), adapter_name=""), "adapter_name"),
    "attach: a classifier's LoRA first": (
        lambda: get_peft_model(get_peft_model(backbone(), LoraConfig(target_modules="all-linear")).base_model.model,
                               config()), "backbone_adapter"),
    "adapters: weighted": (
        lambda: head_model().add_weighted_adapter(["default"], [1.0], "sum"), "combined", "set_adapter"),
    "adapters: merged": (lambda: head_model().merge_and_unload(), "model.unload()"),
}  # fmt: skip
HEADS = {
    "create_head: width by position": (lambda: hfproj.create_head("mlp", 384), "in_dim=…"),
    "create_head: no width": (lambda: hfproj.create_head("mlp"), "in_dim=…"),
    "create_head: swapped": (lambda: hfproj.create_head(384, "mlp"), "in_dim"),
    "create_head: width by another name": (lambda: hfproj.create_head("mlp", input_dim=384), "in_dim"),
    "create_head: width as text": (lambda: hfproj.create_head("mlp", in_dim="384"), "in_dim", "'384'"),
    "create_head: misspelt option": (
        lambda: hfproj.create_head("mlp", in_dim=8, hidden=512), "Did you mean 'hidden_dim'?"),
    "create_head: option of another head": (
        lambda: hfproj.create_head("linear", in_dim=8, depth=3), "depth", "Available"),
    "create_head: in capitals": (lambda: hfproj.create_head("MLP", in_dim=8), "Did you mean 'mlp'?"),
    "create_head: another library's class name": (
        lambda: hfproj.create_head("SimCLRProjectionHead", in_dim=8), "Did you mean", "simclr"),
    "head: h of another width": (lambda: hfproj.create_head("mlp", in_dim=8)(x(4, 7)), "8", "7"),
    "head: one h": (lambda: hfproj.create_head("mlp", in_dim=8)(x(8)), "[batch"),
    "head: numpy": (lambda: hfproj.create_head("mlp", in_dim=8)(np.zeros((4, 8))), "ndarray", "tensor"),
    "head: whole numbers": (
        lambda: hfproj.create_head("mlp", in_dim=8).eval()(torch.ones(4, 8, dtype=torch.long)), "int64"),
    "head: a number instead of a row": (lambda: _own_head(lambda z: z.sum(-1))(x()), "AnyHead", "[4, 4]", "[4]"),
    "head: nothing": (lambda: _own_head(lambda z: None)(x()), "AnyHead", "None"),
    "head: wider than out_dim": (lambda: _own_head(lambda z: torch.cat([z, z], -1))(x()), "[4, 8]", "out_dim"),
    "register_head: swapped": (lambda: hfproj.register_head(OwnHead, "mine"), "name", "'mine'"),
    "register_head: a taken name": (lambda: hfproj.register_head("mlp", OwnHead), "another name"),
    "register_head: an instance": (lambda: hfproj.register_head("mine", OwnHead(in_dim=3)), "not an instance"),
    "register_head: a function": (lambda: hfproj.register_head("mine", lambda h: h), "class"),
    "register_head: without in_dim": (lambda: hfproj.register_head("mine", NotAHead), "in_dim"),
}  # fmt: skip
OBJECTIVES = {
    "objective: SimCLR by its paper's name": (lambda: hfproj.create_objective("simclr"), "Did you mean 'nt_xent'?"),
    "objective: another spelling": (lambda: hfproj.create_objective("ntxent"), "Did you mean 'nt_xent'?"),
    "objective: a class name of another library": (
        lambda: hfproj.create_objective("NTXentLoss"), "Did you mean 'nt_xent'?"),
    "objective: Barlow": (lambda: hfproj.create_objective("barlow"), "Did you mean 'barlow_twins'?"),
    "objective: InfoNCE": (lambda: hfproj.create_objective("InfoNCE"), "Did you mean 'info_nce'?"),
    "objective: SigLIP": (lambda: hfproj.create_objective("siglip"), "Did you mean 'sigmoid'?"),
    "objective: DINOv2": (lambda: hfproj.create_objective("dinov2"), "Did you mean 'dino'?"),
    "objective: MAE, which is none": (lambda: hfproj.create_objective("mae"), "Available"),
    "objective: none": (lambda: hfproj.create_objective(None), "Unknown objective None. Available"),
    "objective: temperature by position": (lambda: hfproj.create_objective("nt_xent", 0.2), "by name", "**options"),
    "objective: short name of the temperature": (
        lambda: hfproj.create_objective("nt_xent", tau=0.2), "tau", "temperature"),
    "objective: temperature 0": (lambda: hfproj.create_objective("nt_xent", temperature=0), "temperature", "0"),
    "objective: temperature as text": (
        lambda: hfproj.create_objective("nt_xent", temperature="0.1"), "temperature", "'0.1'"),
    "objective: two tensors": (lambda: hfproj.create_objective("nt_xent")(x(8, 4), x(8, 4)), "torch.stack"),
    "objective: one tensor of rows": (lambda: hfproj.create_objective("nt_xent")(x(8, 4)), "[views, batch, dim]"),
    "objective: one view": (lambda: hfproj.create_objective("nt_xent")(x(1, 8, 4)), "view"),
    "objective: views of different batches": (
        lambda: hfproj.create_objective("nt_xent")([x(8, 4), x(7, 4)]), "8", "7"),
    "objective: whole numbers": (
        lambda: hfproj.create_objective("nt_xent")(torch.ones(2, 8, 4, dtype=torch.long)), "int64"),
    "objective: BYOL without a prediction": (lambda: hfproj.create_objective("byol")(x(2, 8, 4)), "prediction"),
    "objective: labels that are missing": (lambda: hfproj.create_objective("supcon")(x(2, 8, 4)), "labels"),
    "objective: labels of another batch": (
        lambda: hfproj.create_objective("supcon")(x(2, 8, 4), labels=torch.zeros(7, dtype=torch.long)), "labels", "7"),
    "regularizer: a sparsity, normalised": (
        lambda: hfproj.create_regularizer("sparse_head", sparsity=0.5, normalise=True), "no effect with a target"),
    "regularizer: shrinking without a target": (
        lambda: hfproj.create_regularizer("sparse_head", shrink=0.5), "no effect without a target"),
    "regularizer: L1 twice": (
        lambda: hfproj.create_regularizer("sparse_head", group="weight", l1=0.5), "L1 already", "leave l1 out"),
    "regularizer: a measure's name": (lambda: hfproj.create_regularizer("rankme"), "Available"),
    "regularizer: weight as an option": (
        lambda: hfproj.create_regularizer("koleo", weight=0.1), "regularizers={'koleo': 0.1}"),
    "preset: in capitals": (lambda: hfproj.get_preset("SimCLR_CIFAR"), "Did you mean 'simclr_cifar'?"),
}  # fmt: skip
BACKBONES = {
    "backbone: timm's without timm/": (
        lambda: hfproj.load_backbone("vit_small_patch16_224"), "timm/vit_small_patch16_224"),
    "backbone: timm's with its weights' tag": (
        lambda: hfproj.load_backbone("vit_small_patch16_224.augreg_in1k"), "timm/vit_small_patch16_224.augreg_in1k"),
    "backbone: resnet50": (lambda: hfproj.load_backbone("resnet50"), "timm/resnet50"),
    "backbone: misspelt timm": (
        lambda: hfproj.load_backbone("timm/vit_smal_patch16_224"), "Did you mean 'vit_small_patch16_224'?"),
    "backbone: Hub id without owner": (lambda: hfproj.load_backbone("dinov2-small"), "facebook/dinov2-small"),
    "backbone: vit-nano": (lambda: hfproj.load_backbone("vit-nano"), "Did you mean 'vit_nano'?"),
    "backbone: a folder that is not there": (lambda: hfproj.load_backbone("./no/model"), "./no/model", "folder"),
    "backbone: a module": (lambda: hfproj.load_backbone(nn.Linear(3, 3)), "needs no loading"),
    "backbone: a type that is none": (lambda: hfproj.load_backbone("vit_nano", dtype="float99"), "dtype", "bfloat16"),
    "backbone: another library": (lambda: hfproj.load_backbone("resnet18", library="torchvision"), "timm"),
    "backbone: an option of timm": (lambda: hfproj.load_backbone("vit_nano", num_classes=0, img_size=32), "img_size"),
    "backbone: device as an option": (lambda: hfproj.load_backbone("vit_nano", device="cuda"), "device", ".to("),
    "backbone: remote code": (lambda: hfproj.load_backbone("vit_nano", trust_remote_code=True), "never run"),
}  # fmt: skip
FORWARD = {
    "forward: uint8": (lambda: model()(x(dtype=torch.uint8)), "uint8", "EvalImages"),
    "forward: uint8 by name": (lambda: model()(pixel_values=x(dtype=torch.uint8)), "uint8", "EvalImages"),
    "forward: uint8 to a bare read": (
        lambda: hfproj.load_backbone("vit_nano") and hfproj.extract_features(
            nano(), [0, 1], collator=lambda items: {"pixel_values": x(len(items), 3, 32, 32, dtype=torch.uint8)}),
        "uint8", "EvalImages"),
    "forward: no image": (lambda: model()(x(0, 3, 16, 16)), "[0, 3, 16, 16]", "empty batches"),
    "forward: one image": (lambda: model()(x(3, 16, 16)), "[batch, 3, height, width]", "[3, 16, 16]"),
    "forward: channels last": (lambda: model()(x(4, 16, 16, 3)), "[batch, 3, height, width]", "permute(0, 3, 1, 2)"),
    "forward: grey images": (lambda: model()(x(4, 1, 16, 16)), "3", "[4, 1, 16, 16]"),
    "forward: a side that the patches do not fill": (lambda: model()(x(4, 3, 18, 18)), "18", "4"),
    "forward: smaller than a patch": (lambda: model()(x(4, 3, 2, 2)), "2", "4"),
    "forward: numpy": (lambda: model()(np.zeros((4, 3, 16, 16), dtype=np.float32)), "ndarray", "torch.from_numpy"),
    "forward: an image": (lambda: model()(data()[0]["image"]), "EvalImages"),
    "forward: a list of tensors": (lambda: model()([x(3, 16, 16)] * 2), "list", "torch.stack"),
    "forward: a path": (lambda: model()("image.png"), "str", "EvalImages"),
    "forward: the batch of a collator": (
        lambda: model()({"pixel_values": x()}), "model(**batch)"),
    "forward: nothing": (lambda: model()(), "pixel_values"),
    "forward: words to an image model": (lambda: model()(input_ids=IDS), "input_ids", "pixel_values"),
    "forward: another name": (lambda: model()(images=x()), "images", "pixel_values"),
    "forward: no data": (lambda: model()(x().to("meta")), "meta"),
    "forward: images to a text model": (lambda: text_model()(pixel_values=x()), "pixel_values", "input_ids"),
    "forward: text to a text model": (lambda: text_model()("a text"), "tokenizer"),
    "forward: texts to a text model": (lambda: text_model()(["a", "text"]), "tokenizer"),
    "forward: ids as floats": (lambda: text_model()(input_ids=IDS.float()), "input_ids", "float32"),
    "forward: ids beyond the vocabulary": (lambda: text_model()(input_ids=IDS + 60), "61", "50"),
    "forward: text longer than the positions": (
        lambda: text_model()(input_ids=torch.ones(2, 20, dtype=torch.long)), "20", "16", "max_length=16"),
    "forward: a mask of another length": (
        lambda: text_model()(input_ids=IDS, attention_mask=torch.ones(2, 4)), "attention_mask", "[2, 5]"),
    "forward: one text's ids": (lambda: text_model()(input_ids=IDS[0]), "[batch, tokens]", "[5]"),
    "forward: views that do not divide the batch": (lambda: model()(x(), num_views=3), "divisor", "3"),
    "forward: ids of another tokenizer": (lambda: get_peft_model(bert(vocabulary=3), config())(input_ids=IDS * 3), "3"),
}  # fmt: skip
MISTAKES = {**CONFIGS, **HEADS, **OBJECTIVES, **BACKBONES, **FORWARD}
