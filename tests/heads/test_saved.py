"""Every head through PEFT: what was saved is what is loaded, to the last bit."""

import pytest
import torch
from cases import snapshot
from peft import PeftModel, get_peft_model
from torch import nn

import hfproj
from hfproj.heads import list_heads

IN_DIM = 6
SMALL = {"hidden_dim": 8}  # of the heads that are MLPs

OPTIONS = {
    **{name: {} for name in ("identity", "linear", "simcse", "symmetric_relu")},
    "reweight": {"kappa": 1.5},
    "subvector": {"d0": 4},
    "constant_subvector": {"d0": 4, "constant": "inverse_sqrt"},
    "quantized": {"head": "mlp", "head_options": {"hidden_dim": 8, "last_norm": "batch"}, "levels": 100},
    "topk": {"width": 16, "top_k": 5, "stem": "mlp", "stem_options": {"hidden_dim": 8, "out_dim": 3}},
}
KEEPS_WIDTH = ("identity", "simcse", "symmetric_relu", "reweight", "subvector", "constant_subvector", "topk")
PREDICTORS = {
    "byol": "byol_predictor",
    "simsiam": "simsiam_predictor",
    "nnclr": "nnclr_predictor",
    "moco_v3": "moco_v3_predictor",
}


class Tiny(nn.Module):
    """A backbone of which the same seed makes the same one."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.linear = nn.Linear(5, IN_DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@torch.no_grad()
def perturb_everything(module: nn.Module) -> None:
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 + torch.rand_like(tensor))  # variances stay positive
        else:
            tensor.add_(torch.randint_like(tensor, 1, 100))


@pytest.mark.parametrize("name", list_heads())
def test_round_trip(name, tmp_path):
    options = OPTIONS.get(name, SMALL)
    config = hfproj.ProjectionHeadConfig(
        head=name,
        in_dim=IN_DIM,
        out_dim=None if name in KEEPS_WIDTH else 3,
        head_options=options,
        predictor={"head": PREDICTORS[name], **SMALL} if name in PREDICTORS else None,
        prototypes=5 if name in ("dino", "swav") else None,
    )
    model = get_peft_model(Tiny(), config)
    perturb_everything(model.base_model.model.hfproj)
    model.eval().save_pretrained(tmp_path)
    x = torch.randn(16, 5)
    with torch.no_grad():
        before = model(x)
    for adapter, low_cpu_mem_usage in (("default", False), ("other", True)):
        loaded = PeftModel.from_pretrained(Tiny(), tmp_path, adapter_name=adapter, low_cpu_mem_usage=low_cpu_mem_usage)
        with torch.no_grad():
            after = loaded.eval()(x)
        assert before.keys() == after.keys()
        for field in before.keys() & {"projection", "prediction", "scores"}:
            assert (before[field] - after[field]).abs().max() == 0, (field, adapter)
        saved, read = (m.base_model.model.hfproj.projection_head_modules for m in (model, loaded))
        saved, read = snapshot(saved["default"]), snapshot(read[adapter])
        assert all(torch.equal(saved[key], read[key]) for key in saved)
    head = hfproj.load_head(tmp_path)
    with torch.no_grad():
        assert torch.equal(head.eval()(before.representation), before.projection)


def test_perturbing_changes_z():
    """So that a load which does nothing would be seen."""
    for name in list_heads():
        model = get_peft_model(
            Tiny(),
            hfproj.ProjectionHeadConfig(
                head=name,
                in_dim=IN_DIM,
                out_dim=None if name in KEEPS_WIDTH else 3,
                head_options=OPTIONS.get(name, SMALL),
            ),
        ).eval()
        x = torch.randn(16, 5)
        modules = model.base_model.model.hfproj
        with torch.no_grad():
            before = model(x).projection
            perturb_everything(modules)
            assert torch.equal(model(x).projection, before) == (not modules.state_dict())
