"""Hostile configurations: refused with a reason, with nothing run, written or allocated because a file says so."""

import shutil
import tracemalloc

import pytest
import torch
from cases import make_backbone
from hostile import REFUSED, changed, config_of, refusal, save_adapter, write_config
from peft import PeftModel
from safetensors.torch import load_file, save_file

import hfproj
from hfproj import filenames
from hfproj.hub.pull import open_adapter
from hfproj.hub.untrusted import pattern_cost
from hfproj.hub.validation import backbone_source
from hfproj.strict_json import parse_json


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


BAD = [
    None, True, 0, -1, 10**12, 0.5, "", "../x", "a\n" * 3000, [], ["x", None], {}, {"a": [1]}, {"head": {"head": {}}},
    "(a+)+$",
]  # fmt: skip


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
def test_no_field_takes_what_it_can_not_mean(copied, every):
    """Each entry at any depth, with each of these values: refused, or loaded."""
    values, said, loaded = config_of(copied), [], []

    def paths(value, path=()):
        for name, part in value.items():
            yield (*path, name)
            if isinstance(part, dict):
                yield from paths(part, (*path, name))

    inner = [("backbone_adapter", n) for n in ("r", "target_modules", "init_lora_weights", "rank_pattern", "peft_type",
             "megatron_config", "megatron_core", "layers_pattern", "lora_dropout", "eva_config")]  # fmt: skip
    fields = [p for p in paths(values) if p[0] != "backbone_adapter"] + inner
    assert len(fields) >= 40
    fields = fields[::every]
    for path in fields:
        for bad in BAD:
            write_config(copied, changed(values, path, bad))
            try:
                open_adapter(copied)
                loaded.append((path, bad))
            except hfproj.AdapterFileError as error:
                said.append(str(error))
    refused = len(said)
    assert all(str(copied) in message and "\n" not in message and len(message) < 900 for message in said)
    assert refused > 0.75 * len(fields) * len(BAD)
    for path, bad in loaded[::12]:
        write_config(copied, changed(values, path, bad))
        backbone = make_backbone("vit")
        try:
            hfproj.from_pretrained(copied, backbone=backbone)
        except REFUSED:
            assert not hasattr(backbone, "hfproj")


@pytest.mark.parametrize(("path", "value", "said"), [
    (["auto_map"], {"AutoModel": "evil.py--Evil"}, "names code to run (auto_map"),
    (["trust_remote_code"], True, "names code to run"),
    (["backbone", "kwargs", "trust_remote_code"], True, "names code to run"),
    (["backbone", "kwargs", "code_revision"], "main", "names code to run"),
    (["objective", "deep", "__reduce__"], ["os.system"], "names code to run"),
    (["head_options", "_target_"], "os.system", "names code to run"),
    (["auto_mapping"], {"base_model_class": "system", "parent_library": "os"}, "names code to import"),
    (["auto_mapping"], {"base_model_class": "Popen", "parent_library": "subprocess"}, "names code to import"),
    (["auto_mapping"], {"base_model_class": "x", "parent_library": "../evil"}, "auto_mapping.parent_library"),
    (["auto_mapping"], {"base_model_class": ["x"]}, "auto_mapping.base_model_class"),
    (["peft_type"], "LORA", "holds a LORA adapter"),
    (["peft_type"], "PROJECTION_HEAD\x1b[2J", "no projection head"),
    (["peft_type"], {"a": 1}, "no projection head"),
    (["task_type"], "FEATURE_EXTRACTION", "task_type to be None"),
    (["head"], "os.system", "no head 'os.system'"),
    (["head"], "hfproj.heads.mlp:MLPHead", "Unknown head"),
    (["in_dim"], 10**12, "in_dim=1000000000000"),
    (["out_dim"], -1, "out_dim=-1"),
    (["head_options", "depth"], 10**9, "depth"),
    (["head_options", "depth"], 5, "missing head.hidden.1.linear.weight"),
    (["head_options", "hidden_dim"], 2**20, "has shape (8, 16), expected (1048576, 16)"),
    (["head_options", "hidden_dim"], [2**20] * 255, "hidden_dim"),
    (["head_options"], {"top_k": 3}, "Unknown option of head 'mlp'"),
    (["prototypes"], {"count": 2**20}, "prototypes.weight has shape"),
    (["prototypes"], {"count": 5, "learn_norm": 1}, "prototypes"),
    (["scales"], {"a.b": 1.0}, "scales"),
    (["scales"], {f"s{i}": 1.0 for i in range(10_000)}, "scales"),
    (["trainable"], 10**9, "trainable"),
    (["layer"], 10**9, "layer"),
    (["backbone_adapter", "peft_type"], "XLORA", "can't live beside a head"),
    (["backbone_adapter", "peft_type"], "PROJECTION_HEAD", "can't live beside a head"),
    (["backbone_adapter", "peft_type"], "PROMPT_TUNING", "can't live beside a head"),
    (["backbone_adapter", "peft_type"], ["LORA"], "backbone_adapter.peft_type"),
    (["backbone_adapter", "megatron_config"], {"a": 1}, "megatron_config"),
    (["backbone_adapter", "megatron_core"], "antigravity", "megatron_core"),
    (["backbone_adapter", "init_lora_weights"], "pissa", "rewrites the backbone"),
    (["backbone_adapter", "init_lora_weights"], "pissa_niter_1000000", "rewrites the backbone"),
    (["backbone_adapter", "init_lora_weights"], "../../etc/passwd", "init_lora_weights"),
    (["backbone_adapter", "corda_config"], {"cache_file": "x.pkl", "covariance_file": "y.pkl"}, "corda_config"),
    (["backbone_adapter", "lora_ga_config"], {"cache_file": "x.pkl"}, "lora_ga_config"),
    (["backbone_adapter", "eva_config"], {"rho": 2.0}, "eva_config"),
    (["backbone_adapter", "loftq_config"], {"loftq_bits": 4}, "loftq_config"),
    (["backbone_adapter", "arrow_config"], {"top_k": 3}, "arrow_config"),
    (["backbone_adapter", "runtime_config"], {"ephemeral_gpu_offload": True}, "runtime_config"),
    (["backbone_adapter", "layer_replication"], [[0, 10**6]], "layer_replication"),
    (["backbone_adapter", "modules_to_save"], ["encoder"], "modules_to_save"),
    (["backbone_adapter", "target_parameters"], ["x"], "target_parameters"),
    (["backbone_adapter", "trainable_token_indices"], [1], "trainable_token_indices"),
    (["backbone_adapter", "target_modules"], "(.*)*(.*)*x", "a simple pattern"),
    (["backbone_adapter", "target_modules"], "(a|a)" * 30, "a simple pattern"),
    (["backbone_adapter", "target_modules"], "a?" * 30 + "a" * 30, "a simple pattern"),
    (["backbone_adapter", "exclude_modules"], ".*.*.*.*.*x", "a simple pattern"),
    (["backbone_adapter", "layers_pattern"], ["(a+)+"], "a simple pattern"),
    (["backbone_adapter", "rank_pattern"], {"(a+)+$": 3}, "name of a module"),
    (["backbone_adapter", "rank_pattern"], {"q": 10**6}, "name of a module"),
    (["backbone_adapter", "r"], 10**6, "at most 65,536"),
    (["backbone_adapter", "lora_dropout"], "x", "lora_dropout"),
])  # fmt: skip
def test_configurations_that_mean_harm(copied, path, value, said):
    values = config_of(copied)
    values["backbone"] = {"library": "transformers", "id": "vit_nano", "kwargs": {}}
    write_config(copied, changed(values, path, value))
    for call in (lambda: hfproj.load_head(copied), lambda: hfproj.from_pretrained(copied)):
        refusal(call, said, str(copied))


@pytest.mark.parametrize(("text", "said"), [
    (b"", "not JSON"), (b"null", "expected an object"), (b"[1]", "expected an object"), (b"\xff\xfe{}", "not JSON"),
    (b'{"peft_type": "LORA", "peft_type": "PROJECTION_HEAD"}', "'peft_type' comes twice"),
    (b'{"a": NaN}', "NaN is no number"), (b'{"a": -Infinity}', "no number"), (b'{"a": 1e999}', "too large"),
    (b'{"a": ' + b"9" * 5000 + b"}", "too large"), (b'{"a": ' + b"1" * 19 + b"}", "too large"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    (b'{"a": ' + b'{"a": ' * 40 + b"1" + b"}" * 41, "nested deeper than 32"),
    (b'{"a": "\\ud800"}', "no valid Unicode"), (b'{"a\\u0000": 1}', "no valid Unicode"), (b'{"a": 1} x', "not JSON"),
])  # fmt: skip
def test_json_that_is_none_or_too_much(copied, text, said):
    write_config(copied, text)
    refusal(lambda: hfproj.load_head(copied), filenames.ADAPTER_CONFIG, said)


def test_a_configuration_of_100_megabytes(copied):
    with open(copied / filenames.ADAPTER_CONFIG, "r+b") as file:
        file.truncate(100 * 2**20)
    tracemalloc.start()
    refusal(lambda: hfproj.load_head(copied), "104,857,600 bytes, more than the 1,048,576")
    assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    tracemalloc.stop()


def test_a_rank_beyond_every_width(copied):
    write_config(copied, changed(config_of(copied), ["backbone_adapter", "r"], 5000))
    refusal(lambda: hfproj.from_pretrained(copied, backbone=make_backbone("vit")), "rank 5000", "a rank beyond 16")


# --- backbones ---


@pytest.mark.parametrize("name", [
    "/etc/passwd", "../x", "./x", "~/x", "a/b/c", "C:\\models", "file:///etc/passwd", "https://evil.example/x", "x@y",
    "a--b/..", "\x1b[2J", "hf-hub:someone/x", "models/",
])  # fmt: skip
def test_backbones_that_are_no_ids(saved, name):
    config = open_adapter(saved).config
    for library in (None, "transformers", "timm"):
        config.backbone = {"library": library, "id": name, "kwargs": {}}
        refusal(lambda: backbone_source(config, "me/x", local=False), "as its backbone", "pass it as backbone=")


@pytest.mark.parametrize("name", [
    "timm/hf-hub:someone/x", "hf-hub:hf-hub:someone/x", "timm/local-dir:x", "hf-hub:timm/../x", "timm/a/b",
    "local-dir:x",
])  # fmt: skip
def test_ways_of_timm_to_other_files(saved, name):
    config = open_adapter(saved).config
    config.backbone = {"library": "timm", "id": name, "kwargs": {}}
    refusal(lambda: backbone_source(config, "me/x", local=False), "no id of a model")


@pytest.mark.parametrize("source", [
    {"library": "os", "id": "x"}, {"id": "me/x", "revision": "../../x"}, {"id": "me/x", "revision": "a b"},
])  # fmt: skip
def test_backbones_from_elsewhere(saved, source):
    config = open_adapter(saved).config
    config.backbone = source
    refusal(lambda: backbone_source(config, "me/x", local=False), "pass it as backbone=")


def test_backbones_that_are_ids_and_a_folder_of_the_user(saved, tmp_path):
    config = open_adapter(saved).config
    for library, name in ((None, "me/x"), (None, "bert-base"), ("timm", "hf-hub:timm/x.y"), ("timm", "resnet18"),
                          (None, "timm/resnet18.a1_in1k"), ("transformers", "vit_nano")):  # fmt: skip
        config.backbone = {"library": library, "id": name, "kwargs": {"img_size": [32, 32], "dtype": "float16"}}
        assert backbone_source(config, "me/x", local=False)["name"] == name
    config.backbone = {"library": "transformers", "id": str(tmp_path), "kwargs": {}}
    assert backbone_source(config, "me/x", local=True)["name"] == str(tmp_path)
    refusal(lambda: backbone_source(config, "me/x", local=False), "no id of a model")


def test_a_head_for_another_backbone_leaves_it_as_it_was(saved):
    for name in ("bert", "timm_vit", "timm_cnn"):
        backbone = make_backbone(name)
        before = list(backbone.state_dict())
        refusal(lambda: hfproj.from_pretrained(saved, backbone=backbone))
        assert list(backbone.state_dict()) == before
        assert all(p.requires_grad for p in backbone.parameters())


def test_tensors_that_do_not_fit_leave_the_backbone_trainable(copied):
    file = copied / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "lora_B" not in k}, file)
    backbone = make_backbone("vit")
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    refusal(lambda: hfproj.from_pretrained(copied, backbone=backbone))
    assert all(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items())


def test_a_second_head_is_not_put_over_the_first(saved):
    model = hfproj.from_pretrained(saved, backbone=make_backbone("vit"))
    for backbone in (model, model.get_base_model()):
        refusal(lambda: hfproj.from_pretrained(saved, backbone=backbone), "carries an adapter already")
    assert hfproj.from_pretrained(saved, backbone=model.unload()).active_adapter == "default"


# --- PEFT's own door ---


def test_peft_alone_gets_no_further(copied):
    """What our config and tuner add to PEFT's way of loading refuses what would import, rewrite or be left random."""
    values = config_of(copied)
    for path, value in (
        (["backbone_adapter", "init_lora_weights"], "pissa"), (["backbone_adapter", "peft_type"], "XLORA"),
        (["head"], "os.system"), (["head_options", "depth"], -1), (["trainable"], "all"), (["task_type"], "CAUSAL_LM"),
        (["backbone_adapter", "megatron_config"], {"a": 1}),
    ):  # fmt: skip
        write_config(copied, changed(values, path, value))
        with pytest.raises((*REFUSED, ValueError)):
            PeftModel.from_pretrained(make_backbone("vit"), copied)


# --- parts ---


def test_patterns_of_modules_names():
    assert pattern_cost(r"encoder\.layer\.(\d+)\.(?:attention|mlp)\.[a-z_]+") < 20_000
    assert pattern_cost("|".join(f"blocks\\.{i}\\.attn\\.qkv" for i in range(500))) == 500
    for pattern in (r"(a*)*", r"(?=a)", r"\1", "(?P<n>a)", "(?i)a", "[", "(", "a**", "a{2}{3}", ")", "[a--b]", "[[a]"):
        assert pattern_cost(pattern) == float("inf"), pattern
    with pytest.raises(ValueError, match="comes twice"):
        parse_json(b'{"a": {"b": 1, "b": 2}}')
