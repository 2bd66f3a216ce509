"""Every trained tensor gets a gradient from the first backward pass, or the training ends with its name."""

import copy
import logging

import forked
import pytest
import timm
import torch
import unlearned
from peft import LoraConfig, get_peft_model
from small import Counting, adapter, differs, head_model, trainer, views
from torch import nn
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

import hfproj
from hfproj.training.gradients import CHECKPOINTING, is_reentrant, part_of, same_rows

CHECKPOINTED = {CHECKPOINTING: True}
REENTRANT = {"use_reentrant": True}


def refused(run, message):
    steps = []
    run.add_callback(unlearned.Steps(steps))
    with pytest.raises(hfproj.UsageError, match=message):
        run.train()
    assert not steps, "an optimizer step was taken"


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_part_that_the_objective_does_not_use(tmp_path, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "extra": {"objective": unlearned.Unused()}}
    run = trainer(tmp_path, head_model(predictor={"head": "mlp", "hidden_dim": 8}), **options)
    refused(run, r"of \d+ trained tensors got no gradient.*predictor.*objective does not use the adapter's predictor")


def test_a_tensor_of_the_backbone_that_h_does_not_depend_on(tmp_path):
    run = trainer(tmp_path, unlearned.with_pooler())
    refused(run, r"2 of \d+ trained tensors.*: pooler\.dense\.weight, pooler\.dense\.bias\. .*does not depend on those")


def test_many_names_are_shortened(tmp_path):
    model = head_model(predictor={"head": "mlp", "hidden_dim": 8, "depth": 4})
    run = trainer(tmp_path, model, extra={"objective": unlearned.Unused()})
    with pytest.raises(hfproj.UsageError, match=r"and \d+ more\. ") as caught:
        run.train()
    assert len(str(caught.value)) < 800


def test_the_first_backward_pass_after_a_resume_is_checked_again(tmp_path):
    class Used(unlearned.Unused):
        def forward(self, z, *, prediction=None, **others):
            return super().forward(prediction, **others)

    def run(objective):
        model = head_model(predictor={"head": "linear"})
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return trainer(tmp_path, model, extra={"objective": objective}, **options)

    run(Used()).train()
    again = run(unlearned.Unused())
    with pytest.raises(hfproj.UsageError, match="predictor"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 2
    run(Used()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class Mixture(nn.Module):
    """A mixture that sends every row to its second expert."""

    def __init__(self, prefix):
        super().__init__()
        self.second, kinds = f"{prefix}1", {"wi": nn.Linear(768, 8), "spare": nn.Linear(8, 8)}
        self.experts = nn.ModuleDict({f"{prefix}{i}": nn.ModuleDict(copy.deepcopy(kinds)) for i in range(3)})

    def forward(self, x):
        return self.experts[self.second].wi(x.flatten(1))


@pytest.mark.parametrize("prefix", ["expert_", ""])
def test_experts_to_which_a_batch_sends_nothing(tmp_path, prefix, caplog):
    config = hfproj.ProjectionHeadConfig(head="linear", out_dim=6, in_dim=8, trainable="full")
    model = get_peft_model(nn.Sequential(Mixture(prefix)), config)
    experts = model.get_base_model()[0].experts.values()
    for expert in experts:
        expert.wi.requires_grad_(True)
    trainer(tmp_path, model, max_steps=1).train()
    assert "4 of 7 trained tensors are of experts to which the first batch sent nothing" in caplog.text
    for expert in experts:
        expert.spare.requires_grad_(True)
    refused(trainer(tmp_path, model), r"6 of 13 trained tensors got no gradient.*spare")


def test_what_the_objective_freezes_needs_no_gradient(tmp_path):
    class Late(Counting):
        needs = frozenset({"prediction"})

        def frozen(self, step):
            return {"predictor"} if step.global_step < 2 else set()

        def forward(self, z, *, prediction=None, step=None, **others):
            return super().forward(z if step.global_step < 2 else prediction, step=step, **others)

    model = head_model(predictor="linear")
    before = adapter(model)
    trainer(tmp_path, model, max_steps=3, extra={"objective": Late()}).train()
    after = adapter(model)
    assert differs({n: t for n, t in before.items() if "predictor" in n}, after)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("config", [{}, {"trainable": 1}, {"trainable": "full"}], ids=["lora", "blocks", "full"])
def test_healthy_runs_pass_under_checkpointing_and_autocast(tmp_path, config, bf16):
    model = head_model(**config)
    before = adapter(model)
    trainer(tmp_path, model, **CHECKPOINTED, bf16=bf16, max_steps=2).train()
    assert differs(before, adapter(model))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_the_user_made_reentrant_is_found(tmp_path):
    model = head_model(trainable=1)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(REENTRANT)
    assert is_reentrant(model)
    refused(trainer(tmp_path, model), r"got no gradient.*use_reentrant': False")
    enable({"use_reentrant": False})
    assert not is_reentrant(model)
    trainer(tmp_path, model, max_steps=1).train()


def test_an_optimizer_that_does_not_have_all_tensors(tmp_path):
    model = head_model()
    head = [p for n, p in model.named_parameters() if ".hfproj." in n]
    run = trainer(tmp_path, model, extra={"optimizers": (torch.optim.SGD(head, lr=0.1), None)})
    refused(run, r"optimizer that was passed does not have \d+ of \d+ trained tensors.*lora_A")
    every = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer(tmp_path, model, extra={"optimizers": (every, None)}, max_steps=1).train()


def test_parameters_outside_of_the_adapter(tmp_path):
    class Learnable(Counting):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, z, **others):
            loss, terms = super().forward(z, **others)
            return loss / self.temperature, terms

    with pytest.raises(hfproj.UsageError, match=r"objective\.temperature: trainable parameters outside the adapter"):
        trainer(tmp_path, extra={"objective": Learnable()})
    regularizers = {"ruler": unlearned.Ruler(learnable=True)}
    with pytest.raises(hfproj.UsageError, match=r"ruler\.length: trainable"):
        trainer(tmp_path, extra={"regularizers": regularizers})
    model, objective = head_model(), Learnable()
    every = [*(p for p in model.parameters() if p.requires_grad), objective.temperature]
    extra = {"objective": objective, "optimizers": (torch.optim.SGD(every, lr=0.1), None)}
    trainer(tmp_path, model, max_steps=1, warmup_steps=0, extra=extra).train()
    assert objective.temperature != 1
    objective.temperature.requires_grad_(False)
    trainer(tmp_path, head_model(), max_steps=1, extra={"objective": objective}).train()


def test_what_can_not_be_asked_is_said(tmp_path, caplog):
    run = trainer(tmp_path, head_model(predictor="linear"), max_steps=1, extra={"objective": unlearned.Unused()})
    run.args.optim = "galore_adamw_layerwise"
    run.create_optimizer = lambda *args: (
        setattr(run, "optimizer", torch.optim.SGD(run.model.parameters())) or run.optimizer
    )
    with caplog.at_level(logging.WARNING, "hfproj.training"):
        run.train()
    assert "is not checked: galore_adamw_layerwise uses them up" in caplog.text


def test_names_of_parts():
    assert part_of("a.hfproj.projection_head_modules.mine.prototypes.weight") == "prototypes"
    assert part_of("a.layers.0.hfproj_like.weight") is None
    assert same_rows(torch.ones(2, 3), torch.ones(2, 3) + 1e-7)
    assert not same_rows(torch.ones(2, 3), torch.ones(2, 3) + 1e-3)


# --- gradient checkpointing ---


def dinov2(**config):
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(**sizes))
    return get_peft_model(model, hfproj.ProjectionHeadConfig(**{"head": "linear", "out_dim": 6, **config}))


LORA = {"backbone_adapter": LoraConfig(r=2)}


@pytest.mark.parametrize("config", [LORA, {"trainable": 1}, {"trainable": "full"}], ids=["lora", "blocks", "full"])
def test_reentrant_checkpointing_of_a_trained_backbone_is_refused(tmp_path, config):
    options = {**CHECKPOINTED, f"{CHECKPOINTING}_kwargs": REENTRANT}
    with pytest.raises(hfproj.UsageError, match=r"use \{'use_reentrant': False\}"):
        trainer(tmp_path, dinov2(**config), **options)


def test_options_of_checkpointing_keep_it_from_being_reentrant(tmp_path):
    options = {**CHECKPOINTED, f"{CHECKPOINTING}_kwargs": {"preserve_rng_state": False}}
    trainer(tmp_path, dinov2(**LORA), max_steps=1, **options).train()
    with pytest.raises(hfproj.UsageError, match=f"would have no effect: set {CHECKPOINTING}=True"):
        trainer(tmp_path, dinov2(**LORA), **{f"{CHECKPOINTING}_kwargs": REENTRANT})
    head_alone = {**CHECKPOINTED, f"{CHECKPOINTING}_kwargs": REENTRANT}
    assert trainer(tmp_path, dinov2(), **head_alone)  # nothing behind the frozen input is trained


def timm_model(name, config, **options):
    model = timm.create_model(name, pretrained=False, num_classes=0, **options)
    return get_peft_model(model, hfproj.ProjectionHeadConfig(**{"head": "linear", "out_dim": 6, **config}))


TIMM = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
        LORA,
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, {"trainable": "full"}),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_checkpoints_by_its_own_switch(tmp_path, name, monkeypatch):
    kind, options, config = TIMM[name]
    size = {"collator": views(size=32)} if name == "convnext" else {}
    model = timm_model(kind, config, **options)
    backbone, calls = model.get_base_model(), []
    switch = backbone.set_grad_checkpointing
    monkeypatch.setattr(backbone, "set_grad_checkpointing", lambda on=True: (calls.append(on), switch(on)))
    run = trainer(tmp_path, model, **CHECKPOINTED, max_steps=2, **size)
    before = adapter(model)
    run.train()
    assert set(calls) == {True}
    assert getattr(run.args, CHECKPOINTING) is True
    assert differs(before, adapter(model))
    given = {f"{CHECKPOINTING}_kwargs": {"every_n_layers": 2}}
    with pytest.raises(hfproj.UsageError, match="has no options, got every_n_layers"):
        trainer(tmp_path, model, **CHECKPOINTED, **given)


def test_models_that_can_not_checkpoint(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8))

        def forward(self, x):
            return self.layers(x)

    model = get_peft_model(Plain(), hfproj.ProjectionHeadConfig(head="linear", in_dim=8, out_dim=4, trainable="full"))
    with pytest.raises(hfproj.UsageError, match="Plain can't checkpoint its activations"):
        trainer(tmp_path, model, **CHECKPOINTED)
    model = dinov2(**LORA)
    model.get_base_model().supports_gradient_checkpointing = False
    with pytest.raises(hfproj.UsageError, match="Dinov2Model can't checkpoint"):
        trainer(tmp_path, model, **CHECKPOINTED)


def test_timm_through_transformers(tmp_path):
    from transformers import TimmWrapperConfig, TimmWrapperModel

    args = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args, num_labels=0)
    config = hfproj.ProjectionHeadConfig(head="linear", out_dim=6, **LORA), TimmWrapperModel(config)
    model = get_peft_model(*reversed(config))
    before = adapter(model)
    trainer(tmp_path, model, **CHECKPOINTED, max_steps=2).train()
    assert model.get_base_model().timm_model.grad_checkpointing
    assert differs(before, adapter(model))


def test_text_with_checkpointing(tmp_path):
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    head = hfproj.ProjectionHeadConfig(head="linear", out_dim=6, backbone_adapter=LoraConfig(r=2))
    model = get_peft_model(BertModel(config, add_pooling_layer=False), head)
    before = adapter(model)
    run = trainer(
        tmp_path, model, unlearned.SENTENCES, hfproj.TextViews(unlearned.tokenizer()), max_steps=2, **CHECKPOINTED
    )
    run.train()
    assert differs(before, adapter(model))


# --- two processes ---


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return forked.returned(unlearned.both, tmp_path_factory.mktemp("unlearned"), world=2)


def test_all_processes_end_with_the_names(two):
    for found in two:
        for case in ("part", "part, accumulated", "backbone", "backbone, checkpointed", "backbone, compiled"):
            assert found[case]["steps"] == 0
            assert "trained tensors got no gradient from the first backward pass" in found[case]["error"], case
        assert "predictor" in found["part"]["error"]
        assert found["healthy, compiled"] == {"error": "", "steps": 2}
        assert "pooler.dense.weight" in found["backbone, checkpointed"]["error"]


def test_shares_are_those_of_one_process_with_the_global_batch(two, tmp_path):
    expected = unlearned.shares(tmp_path)
    names = {name for row in expected for name in row}
    assert {"ruler_grad_share", "koleo_grad_share", "werank_grad_share"} <= names
    for found in two:
        assert [row.keys() for row in found["shares"]] == [row.keys() for row in expected]
        for row, other in zip(found["shares"], expected):
            assert row == pytest.approx(other, rel=1e-6)
