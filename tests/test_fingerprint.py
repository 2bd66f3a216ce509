"""The fingerprint of a backbone: what it recognises, what it tells apart, and that both hold on every family."""

import copy
import json
import math
import re

import pytest
import timm
import torch
from cases import BACKBONES, make_backbone, make_inputs, timm_vit
from fingerprints import taken, tensors_of
from thinned import thinned
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from hfproj.backbones import bare_tensors
from hfproj.backbones.fingerprint import compare, digest, fingerprint, is_fingerprint

FAMILIES = [n for n in BACKBONES if n != "plain"]


def kind(one, other):
    return compare(taken(one), taken(other)).kind


@pytest.mark.parametrize("name", thinned(FAMILIES))
def test_it_recognises_copies_and_casts(name):
    backbone = make_backbone(name)
    assert kind(backbone, make_backbone(name)) == "same"
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(backbone).to(dtype)
        assert kind(backbone, cast) == "cast"
        assert kind(cast, backbone) == "cast"
        assert kind(backbone, copy.deepcopy(cast).float()) == "cast"  # the values are still rounded
        assert kind(cast, copy.deepcopy(cast).float()) == "same"
    assert kind(copy.deepcopy(backbone).half(), copy.deepcopy(backbone).bfloat16()) == "cast"


@pytest.mark.parametrize("name", thinned(FAMILIES))
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_one_small_step_is_told_apart(name, decay):
    backbone = make_backbone(name)
    tuned = copy.deepcopy(backbone).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-5, weight_decay=decay)
    output = tuned(**make_inputs(name))
    output = output if isinstance(output, torch.Tensor) else output[0]
    output.square().mean().backward()
    optimizer.step()
    assert kind(backbone, tuned) == "weights"


@pytest.mark.parametrize("shift", thinned([1, 9]))
def test_another_seed_is_told_apart_in_every_precision(shift):
    models = []
    for seed in (3, 3 + shift):
        torch.manual_seed(seed)
        models.append(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2))
    for one in (torch.float32, torch.bfloat16, torch.float16):
        for other in (torch.float32, torch.bfloat16, torch.float16):
            assert kind(copy.deepcopy(models[0]).to(one), copy.deepcopy(models[1]).to(other)) == "weights"


class Renamed(nn.Module):
    """The same modules under other names, in another order."""

    def __init__(self, vit, names):
        super().__init__()
        for name in reversed(names):
            setattr(self, names[name], nn.Module())
            getattr(self, names[name]).inner = getattr(vit, name)


def test_renamed_modules_are_recognised():
    vit = make_backbone("timm_vit")
    renamed = Renamed(vit, {"patch_embed": "stem", "blocks": "layers", "norm": "final"})
    renamed.tokens, renamed.positions = vit.cls_token, vit.pos_embed
    saved = fingerprint(vit, bare_tensors(vit))
    assert compare(saved, fingerprint(renamed, bare_tensors(renamed))).kind == "same"
    half = fingerprint(renamed, {n: t.bfloat16() for n, t in bare_tensors(renamed).items()})
    assert compare(saved, half).kind == "cast"
    with torch.no_grad():
        vit.blocks[1].mlp.fc1.weight[0] += 1e-5
    assert compare(saved, fingerprint(renamed, bare_tensors(renamed))).kind == "weights"


def test_swapped_modules_are_told_apart():
    vit, blocks = make_backbone("timm_vit"), make_backbone("timm_vit")
    blocks.blocks[0], blocks.blocks[2] = blocks.blocks[2], blocks.blocks[0]
    assert kind(vit, blocks) == "weights"
    bert, layers = make_backbone("bert"), make_backbone("bert")
    attention = layers.encoder.layer[1].attention.self
    attention.query, attention.key = attention.key, attention.query  # of one shape and in one block
    assert kind(bert, layers) == "weights"
    renamed = {n.replace("encoder.layer", "layers"): t for n, t in bare_tensors(vit).items()}
    swapped = {n.replace("encoder.layer", "layers"): t for n, t in bare_tensors(blocks).items()}
    assert compare(fingerprint(vit, renamed), fingerprint(vit, swapped)).kind == "weights"


def test_constant_tensors_are_compared_by_their_values():
    def layer_scale(value):
        module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        with torch.no_grad():
            for number, parameter in enumerate(module.parameters()):
                parameter.fill_(value * (1 + number))
        return module

    one, other = layer_scale(1e-5), layer_scale(1.001e-5)
    prints = [fingerprint(m, bare_tensors(m)) for m in (one, other, copy.deepcopy(one).bfloat16())]
    assert compare(prints[0], prints[1]).kind == "weights"
    assert compare(prints[0], prints[2]).kind == "cast"


def test_a_pooler_that_is_not_read_does_not_count():
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    one = BertModel(config)
    other, none = BertModel(config), BertModel(config, add_pooling_layer=False)
    state = {k: v for k, v in one.state_dict().items() if "pooler" not in k}
    other.load_state_dict(state, strict=False)
    none.load_state_dict(state)
    assert kind(one, other) == kind(one, none) == "same"


def test_statistics_of_batch_norm_are_apart():
    cnn, moved = make_backbone("timm_cnn"), make_backbone("timm_cnn")
    next(b for n, b in moved.named_buffers() if n.endswith("running_var")).mul_(1.01)
    found = compare(taken(cnn), taken(moved))
    assert (found.kind, found.refused) == ("statistics", True)
    assert "BatchNorm" in found.words


STRUCTURES = [
    ({"num_hidden_layers": 4}, "it has 4 tensors of 32x16, expected 3"),
    ({"intermediate_size": 40}, "it has no tensors of 32x16, expected 3"),
    ({"num_attention_heads": 4}, "its num_attention_heads is 4, expected 2"),
    ({"layer_norm_eps": 1e-5}, "its layer_norm_eps is 1e-05, expected 1e-12"),
    ({"hidden_act": "relu"}, "its hidden_act is 'relu', expected 'gelu'"),
]


@pytest.mark.parametrize(("changes", "said"), STRUCTURES)
def test_another_structure_is_named(changes, said):
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    one, other = (
        ViTModel(ViTConfig(**small | {"image_size": 32, "patch_size": 8} | c), add_pooling_layer=False)
        for c in ({}, changes)
    )
    found = compare(taken(one), taken(other))
    assert found.kind == "structure"
    assert said in found.words


def test_heads_of_a_timm_model_have_no_shape_and_count():
    models = [timm.create_model("vit_tiny_patch16_224", depth=1, num_heads=n, num_classes=0) for n in (2, 3)]
    models[1].load_state_dict(models[0].state_dict())
    found = compare(*map(taken, models))
    assert found.kind == "structure"
    assert "num_heads" in found.words


def test_quantized_tensors_are_counted_and_the_others_compared():
    vit = make_backbone("timm_vit")
    quantized = copy.deepcopy(vit)
    for name in ("qkv", "proj"):
        layer = getattr(quantized.blocks[1].attn, name)
        codes = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
        layer.weight = nn.Parameter(codes, requires_grad=False)
    found = compare(taken(vit), taken(quantized))
    assert (found.kind, found.refused) == ("quantized", False)
    assert "2 of its tensors are quantized, 0 were" in found.words
    with torch.no_grad():
        quantized.blocks[0].norm1.bias += 1e-4
    assert compare(taken(vit), taken(quantized)).kind == "weights"
    quantized.blocks.append(copy.deepcopy(quantized.blocks[0]))
    assert compare(taken(vit), taken(quantized)).kind == "structure"


def test_tensors_that_are_not_in_memory_are_not_compared():
    vit = make_backbone("timm_vit")
    empty = copy.deepcopy(vit).to("meta")
    assert compare(taken(vit), taken(empty)).kind == "unknown"
    assert digest(empty, tensors_of(empty)) is None


@pytest.mark.parametrize(
    "damage",
    [
        {"version": "1"}, {"shapes": {"3x3": "many"}}, {"shapes": []}, {"weights": {"3x3": [1, 2]}},
        {"weights": {"3x3": [1, 2, 3, 0.1, [1], [1], [1]]}}, {"id": "a\nb"},
        {"weights": {"3x3": [1, 2, 3, None, *3 * [3 * [0.0]]]}},
    ],
    ids=str,
)  # fmt: skip
def test_the_form_is_checked(damage):
    whole = taken(make_backbone("timm_vit"))
    assert is_fingerprint(whole)
    assert not is_fingerprint(whole | damage)
    assert not is_fingerprint(list(damage))


def test_a_later_version_can_not_be_compared():
    whole = taken(make_backbone("timm_vit"))
    assert compare(whole | {"version": 99}, whole).kind == "unknown"


def test_the_digest_is_exact_and_kept_until_something_changes(monkeypatch):
    vit = make_backbone("vit")
    tensors = tensors_of(vit)
    found = digest(vit, tensors)
    assert len(found) == 64
    same = make_backbone("vit").to(memory_format=torch.channels_last)  # how the file or the memory is laid out
    assert digest(same, tensors_of(same)) == found
    monkeypatch.setattr("hashlib.sha256", lambda: pytest.fail("it was made again"))
    assert digest(vit, tensors) == found
    monkeypatch.undo()
    with torch.no_grad():
        next(iter(tensors.values())).view(-1)[0] += 1e-6
    assert digest(vit, tensors) != found


def test_false_alarms_of_two_casts_are_rare_by_the_error_of_rounding():
    generator = torch.Generator().manual_seed(0)
    kinds = []
    for _ in range(200):
        module = nn.Sequential(*[nn.Linear(12, 12) for _ in range(3)])
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * math.exp(torch.randn((), generator=generator)))
        half, brain = copy.deepcopy(module).half(), copy.deepcopy(module).bfloat16()
        kinds.append(compare(fingerprint(half, bare_tensors(half)), fingerprint(brain, bare_tensors(brain))).kind)
    assert kinds == ["cast"] * 200


def two(make, **changes):
    """Return two backbones of the same weights, the second with other settings."""
    first, second = make(), make(**changes)
    second.load_state_dict(first.state_dict())
    return first, second


def encoder(**options):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, **options), 2)


def plain_cnn(act=nn.ReLU, stride=1):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=stride), act(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1))


def llama(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=30, **sizes, **options))


def roberta(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return RobertaModel(RobertaConfig(vocab_size=30, **{"pad_token_id": 1, **sizes, **options}))


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (timm_vit, {"act_layer": nn.ReLU}, "its modules is ReLU, expected GELU"),
        (timm_vit, {"global_pool": "avg", "fc_norm": False}, "global_pool is avg, expected token"),
        (encoder, {"norm_first": True}, "norm_first is True, expected False"),
        (encoder, {"activation": "gelu"}, "activation is gelu, expected relu"),
        (plain_cnn, {"act": nn.GELU}, "its modules is GELU, expected ReLU"),
        (plain_cnn, {"stride": 2}, r"its Conv2d.stride is \(2, 2\), expected \(1, 1\)"),
        (llama, {"rope_theta": 7.0}, "rope_theta is 7.0, expected 10000.0"),
        (llama, {"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, expected 1e-06"),
        (roberta, {"pad_token_id": 3}, "pad_token_id is 3, expected 1"),
        (roberta, {"is_decoder": True}, "is_decoder is True, expected False"),
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_same_weights_in_another_computation_are_another_backbone(make, changes, said):
    first, second = (fingerprint(model, bare_tensors(model)) for model in two(make, **changes))
    found = compare(first, second)
    assert found.kind == "structure"
    assert re.search(said, found.words)
    assert compare(json.loads(json.dumps(first)), first).kind == "same"


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (timm_vit, {"drop_path_rate": 0.2, "proj_drop_rate": 0.1}),
        (timm_vit, {"weight_init": "jax"}),
        (timm_vit, {"dynamic_img_size": True}),
        (encoder, {"dropout": 0.4}),
        (roberta, {"hidden_dropout_prob": 0.3, "use_cache": False, "initializer_range": 1.0, "num_labels": 7}),
        (llama, {"attention_dropout": 0.3, "pad_token_id": 4, "output_hidden_states": True}),
    ],
)
def test_what_changes_nothing_in_eval_mode_is_the_same_backbone(make, changes):
    first, second = (fingerprint(model, bare_tensors(model)) for model in two(make, **changes))
    assert compare(first, second).kind == "same"


def test_settings_that_only_this_version_has_do_not_count_in_another():
    first, second = (fingerprint(m, bare_tensors(m)) for m in two(timm_vit, global_pool="avg", fc_norm=False))
    assert compare(first | {"made_with": "0.9"}, second).kind == "same"
    first, second = (fingerprint(m, bare_tensors(m)) for m in two(plain_cnn, stride=2))
    assert compare(first | {"made_with": "2.0"}, second).kind == "structure"  # of torch's own layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_changed_entry_is_seen(dtype):
    module = nn.Linear(300, 300).to(dtype)
    before = fingerprint(module, bare_tensors(module))
    for value in (1.0, math.nan, math.inf):
        changed = copy.deepcopy(module)
        with torch.no_grad():
            changed.weight[7, 7] += value
        assert compare(before, fingerprint(changed, bare_tensors(changed))).kind == "weights"


def test_a_fingerprint_that_was_edited_is_not_silent():
    module, other = nn.Linear(8, 8), nn.Linear(8, 8)
    found, now = (fingerprint(m, bare_tensors(m)) for m in (module, other))
    assert compare({n: v for n, v in found.items() if n != "weights"}, now).kind == "unknown"
    assert compare({**found, "weights": {}}, now).kind == "unknown"
    assert compare({**found, "rounding": {"8x8": 10.0}}, now).kind == "weights"
    large = {shape: [*sums[:3], 1e30, *sums[4:]] for shape, sums in found["weights"].items()}
    assert compare({**found, "weights": large}, now).kind == "weights"
