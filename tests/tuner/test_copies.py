"""Copies of a model with a head, its memory and dtypes, checkpointing and compilation."""

import copy
import gc
import weakref

import jaxtyping
import pytest
import torch
from cases import (
    Blocks,
    make_backbone,
    make_config,
    make_inputs,
    perturb,
)
from peft import LoraConfig, PeftModel, get_peft_model

import hfproj


def attach(name: str, trained: str = "head", **options: object) -> PeftModel:
    return get_peft_model(make_backbone(name), make_config(name, trained, **options))


@pytest.mark.parametrize(("name", "layer"), [("vit", -1), ("vit", 1), ("timm_vit", -1), ("timm_cnn", 1)])
def test_a_deep_copy_uses_its_own_head(name, layer):
    model, inputs = attach(name, "lora", layer=layer), make_inputs(name)
    perturb(model)
    model.train()(**inputs).projection.sum().backward()  # a step, as before an EMA copy
    teacher = copy.deepcopy(model).eval()
    z = teacher(**inputs).projection
    perturb(model, 1)
    assert torch.equal(teacher(**inputs).projection, z)
    perturb(teacher, 2)
    z = model.eval()(**inputs).projection
    bare = teacher.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
    assert torch.equal(model(**inputs).projection, z)


def test_features_are_not_kept():
    model = attach("timm_vit", "lora", layer=1)
    model.get_base_model().set_grad_checkpointing(True)  # runs blocks, with their hooks, again in the backward
    out = model.train()(**make_inputs("timm_vit"))
    feature = weakref.ref(out.representation)
    out.projection.sum().backward()
    assert not any("_hfproj_feature" in m.__dict__ for m in model.modules())
    del out
    gc.collect()
    assert feature() is None
    copy.deepcopy(model)


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(trained, layer):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = attach("vit", trained, layer=layer).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        model(**make_inputs("vit")).projection.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", ["vit", "timm_vit", "timm_cnn"])
@pytest.mark.parametrize(("trained", "low_cpu_mem_usage"), [("lora", False), ("head", True), ("full", True)])
def test_bfloat16_backbone_keeps_a_float32_head(name, trained, low_cpu_mem_usage, tmp_path):
    """LoRA with low_cpu_mem_usage is missing: PEFT rounds it to the backbone's dtype then."""
    backbone = make_backbone(name).to(torch.bfloat16)
    model = get_peft_model(backbone, make_config(name, trained))
    perturb(model)
    inputs = {n: x.to(torch.bfloat16) for n, x in make_inputs(name).items()}
    out = model.eval()(**inputs)
    assert (out.representation.dtype, out.projection.dtype) == (torch.bfloat16, torch.float32)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".hfproj." in n or ".lora_" in n)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_backbone(name).to(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(loaded(**inputs).projection, out.projection)


def test_autocast():
    model, inputs = attach("vit", "lora").train(), make_inputs("vit")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).projection.float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_float64_backbone_gets_a_float64_head(tmp_path):
    model = get_peft_model(make_backbone("vit").double(), make_config("vit", "lora"))
    perturb(model)
    inputs = {n: x.double() for n, x in make_inputs("vit").items()}
    out = model.eval()(**inputs)
    assert out.projection.dtype == torch.float64
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone("vit").double(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(loaded(**inputs).projection, out.projection)
    model.float()
    assert model(**make_inputs("vit")).projection.dtype == torch.float32


@pytest.fixture
def _unchecked_shapes():
    jaxtyping.config.update("jaxtyping_disable", True)  # compiling the checks takes most of the time
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_unchecked_shapes")
def test_compiled():
    options = {"head": "linear", "in_dim": 8, "backbone_adapter": LoraConfig(r=2)}
    model, x = get_peft_model(Blocks(), hfproj.ProjectionHeadConfig(**options, layer=0)), torch.randn(4, 8)
    perturb(model)
    with torch.no_grad():
        z = model(x).projection
    compiled = torch.compile(model, backend="eager")
    out = compiled(x)
    torch.testing.assert_close(out.projection.detach(), z)
    out.projection.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        assert isinstance(compiled(x), torch.Tensor)
    torch.testing.assert_close(compiled(x).projection.detach(), z)

    model.add_adapter("b", hfproj.ProjectionHeadConfig(**options))
    model.set_adapter("b")
    torch.compiler.reset()  # needed: compiled code does not notice new hooks
    torch.testing.assert_close(compiled(x).projection, model(x).projection)
    torch.compiler.reset()
