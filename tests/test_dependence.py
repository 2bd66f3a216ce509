"""What h depends on is found, and PEFT layers that can't act are refused."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import ConvNextConfig, ConvNextModel

import hfproj

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_an_old_adapter_trains_what_h_depends_on_and_keeps_the_rest(tmp_path):
    """The rules of hfproj 0.1.0 saved the norm that only ConvNeXt's pooler reads."""
    torch.manual_seed(0)
    backbone = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32))
    config = hfproj.ProjectionHeadConfig(head="linear", out_dim=4, trainable="full", pooling="mean", reading=1)
    model = get_peft_model(copy.deepcopy(backbone), config)
    with torch.no_grad():
        model.get_base_model().layernorm.weight.fill_(3)
    model.save_pretrained(tmp_path)
    loaded = hfproj.from_pretrained(tmp_path, backbone=backbone, is_trainable=True).train()
    loaded(torch.randn(2, 3, 32, 32)).projection.sum().backward()
    norm = loaded.get_base_model().layernorm.weight
    assert (norm == 3).all()
    assert not norm.requires_grad
    trained = [p for p in loaded.parameters() if p.requires_grad]
    assert len(trained) > 20
    assert all(p.grad is not None for p in trained)
