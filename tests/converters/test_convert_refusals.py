"""Checkpoints that are not what they are said to be: one error that lists everything, and says what they may be."""

import pytest
import torch
from cases import assert_refused
from official_files import CASES

import hfproj
from hfproj.converters import FAMILIES

WRAPPER = "module."


def refused(case, *said, error=hfproj.AdapterFileError, **options):
    options = {**case.options, **options}
    return assert_refused(lambda: hfproj.convert(case.file, case.method, **options), *said, error=error)


def state_of(case):
    """The state dict that is read, and the prefix of its keys."""
    for inside in ("state_dict", "model", case.options.get("network"), "teacher"):
        if inside in case.file:
            return case.file[inside]
    return case.file


@pytest.mark.parametrize("name", CASES)
def test_each_missing_key_is_named(name):
    """The last key of each dictionary in the file; that of a single layer would show no gap."""
    case = CASES[name]()
    named = 0
    for part in [v for v in case.file.values() if isinstance(v, dict)] or [case.file]:
        names = [k for k, v in part.items() if isinstance(v, torch.Tensor) and is_read(case, k, part)]
        if names:
            key = "module.backbone.bn1.bias" if names[-1] == "module.projector.weight" else names[-1]
            kept = part.pop(key)
            refused(case, "missing 1: ", key.removeprefix(WRAPPER))
            part[key] = kept
            named += 1
    assert named


@pytest.mark.parametrize(("name", "key"), [
    ("dinov2: chunked blocks", "backbone.blocks.1.1.ls2.gamma"),
    ("dinov2: SwiGLU, registers, ibot_head", "backbone.blocks.0.mlp.w3.bias"),
    ("simclr_v2", "net.2.blocks.0.projection.bn.0.weight"),
    ("byol: yaox12, target", "module.target_network.encoder.6.0.downsample.1.running_var"),
])  # fmt: skip
def test_names_that_are_not_timms_are_those_of_the_file(name, key):
    case = CASES[name]()
    part = next(v for v in [*case.file.values(), case.file] if isinstance(v, dict) and key in v)
    del part[key]
    refused(case, f"missing 1: {'resnet.' if name == 'simclr_v2' else ''}{key.removeprefix(WRAPPER)}.")


def test_what_is_not_read_may_be_absent():
    for name, gone in {
        "moco_v2": "module.encoder_k.", "moco_v3: ViT": "module.momentum_encoder.", "barlow_twins": "module.bn.",
        "byol: lucidrains": "net.", "dinov2: teacher": "ibot_head.",
    }.items():  # fmt: skip
        case = CASES[name]()
        state = state_of(case)
        for key in [key for key in state if key.startswith(gone)]:
            del state[key]
        hfproj.convert(case.file, case.method, **case.options)


def is_read(case, key, part):
    """Whether the converter needs a key, by the documentation of its family."""
    network = case.options.get("network")
    other = {
        "query": "encoder_k.", "key": "encoder_q.", "base": "momentum_encoder.", "momentum": ("base_encoder.", "pred"),
        "online": "target_", "target": ("online_", "predictor."),
    }.get(network, "student.")  # fmt: skip
    left_out = {
        "byol": ("net.", "online_encoder.net.fc.", "target_encoder.net.fc."),
        "directclr": "online_head.",
        "dinov2": (
            "dino_loss.",
            "ibot_head." if case.options.get("head") == "dino_head" else "dino_head.",
            "teacher.ibot",
        ),
        "moco_v1": "queue",
        "moco_v2": "queue",
        "simclr_v2": "fc.",
        "barlow_twins": "bn.",
    }.get(case.method, "~")
    if case.method == "dino" and part is not case.file[network]:
        return False
    if case.method == "directclr" and part is case.file.get("head"):
        return False
    key = key.removeprefix(WRAPPER)
    optional = key.endswith("num_batches_tracked") or "mask_token" in key or key.startswith("prototypes.prototypes2")
    return not optional and not key.startswith(other) and not key.startswith(left_out)


def test_all_that_is_missing_is_listed_sorted_once():
    case = CASES["moco_v2"]()
    gone = [
        "encoder_q.layer2.0.bn2.running_mean",
        "encoder_q.fc.2.bias",
        "encoder_q.conv1.weight",
        "encoder_q.fc.0.bias",
    ]
    for key in gone:
        del case.file["state_dict"][WRAPPER + key]
    message = refused(case, "missing 4: encoder_q.conv1.weight, encoder_q.fc.0.bias, encoder_q.fc.2.bias, ")
    assert all(message.count(key) == 1 for key in gone)
    assert "unexpected" not in message
    assert "This is no moco_v2 checkpoint of facebookresearch/moco." in message


@pytest.mark.parametrize(
    "stem", ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.downsample.0.weight"]
)
def test_a_hole_in_a_resnet(stem):
    case = CASES["barlow_twins"]()
    del case.file["model"][f"module.backbone.{stem}"]
    refused(case, f"missing 1: backbone.{stem}.")


@pytest.mark.parametrize(
    "stem", ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "norm.bias"]
)
def test_a_hole_in_a_vit(stem):
    case = CASES["dino: ViT"]()
    del case.file["teacher"][f"backbone.{stem}"]
    refused(case, f"missing 1: backbone.{stem}.")


def test_unexpected_keys_and_what_they_resemble():
    case = CASES["vicreg"]()
    state = case.file["model"]
    state["module.projector.0.wieght"] = state.pop("module.projector.0.weight")
    state["module.backbone.fc.weight"] = torch.zeros(3, 3)
    state["module.stranger"] = torch.zeros(3)
    refused(
        case,
        "missing 1: projector.0.weight",
        "unexpected 3: backbone.fc.weight, projector.0.wieght, stranger",
        "projector.0.wieght resembles projector.0.weight",
    )


@pytest.mark.parametrize(("name", "key", "said"), [
    ("vicreg", "module.projector.3.weight", "projector.3.weight has shape [5, 7], expected [5, 20]"),
    ("vicreg", "module.projector.1.running_var", "projector.1.running_var has shape [5, 7], expected [20]"),
    ("vicreg", "module.backbone.layer3.0.conv2.weight", "layer3.0.conv2.weight has shape [5, 7], expected [12, 12, 3"),
    ("moco_v3: ViT", "module.predictor.3.weight", "predictor.3.weight has shape [5, 7], expected [5, 20]"),
    ("moco_v3: ViT", "module.predictor.0.weight", "predictor.3.weight has shape [12, 20], expected [12, 5]"),
    ("swav: release", "module.prototypes.weight", "prototypes.* are rows of shape [5, 7], but the head"),
    ("dino: ViT", "head.last_layer.weight_g", "head.last_layer.weight_g has shape [5, 7], expected [30, 1]"),
    ("dino: ViT", "backbone.blocks.0.attn.proj.weight", "proj.weight has shape [5, 7], expected [24, 24]"),
])  # fmt: skip
def test_wrong_shapes(name, key, said):
    case = CASES[name]()
    state = state_of(case)
    assert key in state
    state[key] = torch.zeros(5, 7)
    refused(case, "wrong shape", said)


def test_a_linear_layer_that_is_no_matrix():
    case = CASES["vicreg"]()
    case.file["model"]["module.projector.3.weight"] = torch.zeros(3, 3, 3)
    refused(case, "projector.3.weight: expected the matrix of a linear layer")


def test_a_predictor_of_another_width():
    case = CASES["simsiam"]()
    state = case.file["state_dict"]
    state["module.predictor.0.weight"] = torch.zeros(12, 5)
    refused(case, "predictor.* leads from 5 to 64 features, but the head encoder.fc.* gives 64")


def test_a_head_of_another_width_than_the_backbone():
    case = CASES["vicreg"]()
    case.file["model"]["module.projector.0.weight"] = torch.zeros(20, 48)
    refused(case, "48", "64")


@pytest.mark.parametrize(("name", "method", "right"), [
    ("moco_v2", "moco_v1", "moco_v2"),
    ("moco_v1", "moco_v2", "moco_v1"),
    ("moco_v2", "moco_v3", "moco_v2"),
    ("moco_v3: ResNet", "moco_v2", "moco_v3"),
    ("dino: ViT", "dinov2", "dino"),
    ("dinov2: teacher", "dino", "dinov2"),
    ("barlow_twins", "vicreg", "barlow_twins"),
    ("vicreg", "simsiam", "vicreg"),
    ("swav: release", "byol", "swav"),
    ("simclr: sthalles", "simclr_v2", "simclr"),
    ("byol: lucidrains", "simclr", "byol"),
    ("simclr_v2", "directclr", "simclr_v2"),
])  # fmt: skip
def test_the_method_that_was_meant_is_named(name, method, right):
    case = CASES[name]()
    case.method, case.options = method, {}
    refused(case, f"This is no {method} checkpoint", f" Its keys are those of method={right!r}. missing")


def test_a_backbone_whose_head_was_thrown_away():
    case = CASES["barlow_twins"]()
    backbone = {k.removeprefix("module.backbone."): v for k, v in case.file["model"].items() if ".backbone." in k}
    case.file = backbone
    refused(case, "a backbone whose head was thrown away: look for checkpoint.pth ('full checkpoint')")
    case.method = "swav"
    refused(case, "a backbone whose head was thrown away")


@pytest.mark.parametrize(("method", "options", "said"), [
    ("mocov2", {}, "Unknown method 'mocov2'. Did you mean 'moco_v2'?"),
    ("dino", {"network": "techer"}, "Unknown network of 'dino': 'techer'. Did you mean 'teacher'? Available: student"),
    ("dino", {"d0": 3}, "'dino' has no option 'd0'"),
    ("directclr", {"d1": 3}, "Unknown option of 'directclr': 'd1'. Available: d0."),
    ("dinov2", {"head": "dino"}, "Unknown head of 'dinov2': 'dino'. Did you mean 'dino_head'?"),
])  # fmt: skip
def test_what_is_chosen_wrong(method, options, said):
    with pytest.raises(hfproj.UsageError) as caught:
        hfproj.convert({}, method, **options)
    assert said in str(caught.value)


def test_a_file_that_holds_nothing():
    for method in FAMILIES:
        with pytest.raises(hfproj.AdapterFileError, match=f"This is no {method} checkpoint"):
            hfproj.convert({"epoch": 3, "optimizer": {"state": {}}}, method)


def test_a_subvector_longer_than_h():
    case = CASES["directclr"]()
    refused(case, "d0=65 entries can't be taken", error=hfproj.UsageError, d0=65)
