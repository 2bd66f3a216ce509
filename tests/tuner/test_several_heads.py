"""Several heads on one backbone: adding, switching and deleting them."""

import peft
import pytest
import torch
from cases import (
    TRAINED,
    assert_same_tensors,
    make_backbone,
    make_config,
    make_inputs,
    perturb,
    snapshot,
    trainable_names,
)
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

import hfproj


def attach(name: str, trained: str = "head", **options: object) -> PeftModel:
    return get_peft_model(make_backbone(name), make_config(name, trained, **options))


@pytest.mark.parametrize("active", TRAINED)
@pytest.mark.parametrize("added", TRAINED)
def test_adding_a_head_leaves_the_active_one_alone(active, added, tmp_path):
    inputs = make_inputs("vit")
    attach("vit", added).save_pretrained(tmp_path)
    model = attach("vit", active)
    perturb(model)
    z, names, before = model.eval()(**inputs).projection, trainable_names(model), snapshot(model)
    model.add_adapter("b", make_config("vit", added))
    model.load_adapter(tmp_path, adapter_name="c")
    assert model.active_adapter == "default"
    assert trainable_names(model) == names
    assert torch.equal(model(**inputs).projection, z)
    now = {n.replace(".base_layer.", "."): t for n, t in snapshot(model).items()}
    assert_same_tensors({n.replace(".base_layer.", "."): t for n, t in before.items()},
                        {n: now[n] for n in (m.replace(".base_layer.", ".") for m in before)})  # fmt: skip
    with model.disable_adapter():
        pass
    assert trainable_names(model) == names
    assert not any(m.training for m in model.modules())


def test_adding_while_disabled_stays_disabled():
    inputs, model = make_inputs("vit"), attach("vit")
    expected = make_backbone("vit")(**inputs).last_hidden_state
    with model.disable_adapter():
        model.add_adapter("b", make_config("vit", "lora", backbone_adapter=LoraConfig(r=2, init_lora_weights=False)))
        model.set_adapter("b")
        assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert not torch.equal(model(**inputs).backbone_output.last_hidden_state, expected)


def test_deleting_an_adapter():
    inputs = make_inputs("vit")
    model = attach("vit", "lora")
    for name, trained in (("z_head", "head"), ("b_lora", "lora")):
        model.add_adapter(name, make_config("vit", trained))
        model.set_adapter(name)
        perturb(model)
    z = model.eval()(**inputs).projection
    model.delete_adapter("z_head")  # not the active one
    assert torch.equal(model(**inputs).projection, z)
    with pytest.warns(UserWarning, match="default is active now"):
        model.delete_adapter("b_lora")
    assert not any("b_lora" in n or "z_head" in n for n in model.state_dict())
    assert model.active_adapters == ["default"]
    assert {
        tuple(m.active_adapters) for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)
    } == {("default",)}
    assert model(**inputs).projection.shape == (4, 6)
    assert list(model.get_base_model().hfproj.points) == ["default"]
    with pytest.raises(ValueError, match="b_lora"):
        model.delete_adapter("b_lora")
    model.delete_adapter("default")
    assert torch.equal(model.base_model(**inputs).last_hidden_state, make_backbone("vit")(**inputs).last_hidden_state)


def test_two_active_heads_are_refused():
    model = attach("vit")
    model.add_adapter("b", make_config("vit"))
    with pytest.raises(hfproj.UsageError, match="Only one head can be active at a time"):
        model.base_model.set_adapter(["default", "b"])
    assert model.base_model.active_adapters == ["default"]


def test_kinds_that_would_wrap_each_other_are_refused():
    model, inputs = attach("vit", "lora"), make_inputs("vit")
    perturb(model)
    z = model.eval()(**inputs).projection
    with pytest.raises(hfproj.UsageError, match="another head's LORA wraps already"):
        model.add_adapter("b", make_config("vit", "lora", backbone_adapter=IA3Config()))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(**inputs).projection, z)


def test_peft_reports_its_status():
    model = attach("vit", "lora")
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.num_adapter_layers) == (True, ["default"], 3 * 6 + 1)
    assert len(model.get_layer_status()) == 3 * 6 + 1
