"""What h depends on is found, PEFT layers that can't act are refused, and what is trained is what h depends on."""

import copy

import pytest
import timm
import torch
from cases import make_backbone
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
)

import hfproj
from hfproj.backbones import acting_modules, feeds_representation, resolve_read_point
from hfproj.backbones.dry_run import dry_run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The PyTorch API of nested tensors")


def config(**options):
    return hfproj.ProjectionHeadConfig(head="linear", out_dim=4, **options)


def attach(backbone, **options):
    return get_peft_model(backbone, config(**options)).eval()


# --- adapters of version 1 of the rules ---


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


# --- PEFT layers that can't act ---


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_layers_whose_weight_is_used_without_running_them(name):
    sizes = {"img_size": 28, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
    backbone = timm.create_model(name, **{**sizes, "patch_size": 14})
    targets = attach(copy.deepcopy(backbone), backbone_adapter=LoraConfig(r=2)).peft_config["default"]
    assert not any("qkv" in t or "q_proj" in t for t in targets.backbone_adapter["target_modules"])
    used = {n.rpartition(".")[2] for n in _idle(backbone)}
    assert used
    for target in used:
        bare = copy.deepcopy(backbone)
        names = list(dict(bare.named_modules()))
        with pytest.raises(hfproj.UsageError, match="without running the layer"):
            attach(bare, backbone_adapter=LoraConfig(r=2, target_modules=[target]))
        assert list(dict(bare.named_modules())) == names


def _idle(backbone):
    point = resolve_read_point(backbone)
    owners = {n.rpartition(".")[0] for n in feeds_representation(backbone, point)}
    idle = owners - acting_modules(backbone, point)
    return [n for n in idle if type(backbone.get_submodule(n)) is nn.Linear]


class Encoder(nn.Module):
    """A plain module around torch's own encoder."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, **options)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding=None):
        return self.encoder(self.embed(x), src_key_padding_mask=padding)


@pytest.mark.parametrize("targets", [None, ["linear1"], ["self_attn"]])
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_fused_encoder_layers_do_not_leave_out_the_lora(targets, padded):
    torch.manual_seed(0)
    bare = Encoder().eval()
    adapter = LoraConfig(r=2, target_modules=targets)
    model = get_peft_model(copy.deepcopy(bare), config(backbone_adapter=adapter)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    x = torch.randn(3, 5, 6)
    padding = (torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]) if padded else None
    with torch.no_grad():
        evaluated = model(x, padding=padding).representation
        expected = bare(x, padding)
        with model.disable_adapter():
            off = model(x, padding=padding)
        if targets != ["self_attn"]:  # where PEFT's own layer keeps torch from fusing
            assert torch.equal(off, expected)
        else:
            torch.testing.assert_close(off[0], expected[0])
    assert torch.backends.mha.get_fastpath_enabled()
    trained = model(x, padding=padding).representation
    kept = slice(None) if not padded else slice(0, 1)  # the fused path sets padding to zero, the other does not
    torch.testing.assert_close(evaluated[kept], trained[kept], rtol=1e-4, atol=1e-5)
    assert (evaluated - expected.mean(1)).abs().max() > 0.01


def test_dilated_convolutions_are_left_out_and_refused():
    backbone = timm.create_model("skresnet18", num_classes=0)
    model = attach(copy.deepcopy(backbone), backbone_adapter=LoraConfig(r=2))
    adapted = [m.base_layer for m in model.modules() if isinstance(m, LoraLayer)]
    assert adapted
    assert all(c.dilation == (1, 1) for c in adapted)
    model(torch.randn(2, 3, 64, 64)).projection.sum().backward()
    dilated = next(n for n, m in backbone.named_modules() if getattr(m, "dilation", (1, 1)) == (2, 2))
    with pytest.raises(hfproj.UsageError, match="dilated convolution"):
        attach(backbone, backbone_adapter=LoraConfig(r=2, target_modules=[dilated]))


def test_out_proj_of_multihead_attention_is_refused():
    with pytest.raises(hfproj.UsageError, match="without running the layer"):
        attach(Encoder(), backbone_adapter=LoraConfig(r=2, target_modules=["out_proj"]))


# --- the run without data ---


class Branches(nn.Module):
    """Has what h depends on and what it does not, in an order and under names that tell nothing."""

    def __init__(self, values=False):
        super().__init__()
        self.values = values
        self.pooler = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))  # is read
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))  # runs, and its output is not used
        self.dead = nn.Linear(8, 8)  # never runs
        self.scale = nn.Parameter(torch.ones(8))
        self.mask_token = nn.Parameter(torch.zeros(8))  # is read, too
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x):
        h = self.pooler(x) * self.scale + self.mask_token + self.shift
        self.body(h)
        if self.values and x.sum().item() > 1e9:
            return self.body(h)
        return h


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_h_depends_on_is_found(values, mode):
    backbone = Branches(values)
    before, state = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    with mode():
        point = resolve_read_point(backbone)
        names = set(feeds_representation(backbone, point))
    assert {n.split(".")[0] for n in names} == {"pooler", "scale", "mask_token", "shift"}
    assert {n for n in names if n.startswith("pooler")} == {n for n in before if n.startswith("pooler")}
    assert acting_modules(backbone, point) == {"", "pooler.0", "pooler.1"}
    assert all(torch.equal(before[n], t) for n, t in backbone.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert backbone.training
    model = get_peft_model(backbone, config(trainable="full")).train()
    model(torch.randn(4, 6)).projection.sum().backward()
    wrong = [n for n, p in model.named_parameters() if (p.grad is not None) != p.requires_grad]
    assert not wrong


class Experts(nn.Module):
    """Two rows reach at most two of its experts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, ids):
        x = self.embed(ids).mean(1)
        for i, expert in enumerate(self.experts):
            chosen = (ids[:, 0] % 4 == i).nonzero()[:, 0].tolist()
            if chosen:
                x = x.index_copy(0, torch.tensor(chosen), expert(x[chosen]))
        return x


def test_experts_that_no_blank_row_reaches():
    backbone = Experts()
    point = resolve_read_point(backbone)
    assert set(feeds_representation(backbone, point)) == set(backbone.state_dict())
    assert {f"experts.{i}" for i in range(4)} <= acting_modules(backbone, point)


def test_adapters_and_switching_change_nothing_of_it():
    model = attach(make_backbone("vit"), backbone_adapter=LoraConfig(r=2))
    backbone = model.get_base_model()
    first = dry_run(backbone)
    assert first is not None
    assert dry_run(make_backbone("vit")) is first  # kept by structure
    model.add_adapter("other", config(trainable=1, pooling="mean"))
    assert dry_run(backbone) is first
    other = timm.create_model("test_vit", num_classes=0)
    assert dry_run(other) is not first
