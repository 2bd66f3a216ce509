"""Keys of feature caches: what matters changes them, what does not leaves them, and what is unknown has none."""

import datasets
import numpy as np
import pytest
import torch
from cases import BLOCKS, make_backbone
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models
from torch import nn
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerFast

import hfproj
from hfproj.data import EvalImages, EvalText, IndexedDataset
from hfproj.errors import UsageError
from hfproj.features.cache_key import data_identity, digest, model_identity, preprocessing_identity


def adapted(**config):
    torch.manual_seed(1)
    config = {"head": "mlp", "out_dim": 4, "backbone_adapter": LoraConfig(r=2, init_lora_weights=False), **config}
    return get_peft_model(make_backbone("vit"), hfproj.ProjectionHeadConfig(**config))


def key(model):
    return digest(model_identity(model))


def test_the_same_model_has_the_same_key_whatever_its_mode():
    for make in (adapted, lambda: make_backbone("vit"), lambda: make_backbone("timm_cnn")):
        model, other = make(), make()
        expected = key(model)
        assert key(other) == expected
        other.train().requires_grad_(False)
        for module in other.modules():
            module.name_or_path = "elsewhere"
        other(torch.zeros(2, 3, 32, 32))
        other.eval().load_state_dict(model.state_dict())
        assert key(other) == expected


def test_every_tensor_in_use_counts():
    model = adapted()
    expected = key(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
            assert key(model) != expected, name
            tensor.copy_(before)
    assert key(model) == expected


def test_adapters_that_are_not_active_do_not_count():
    model = adapted()
    expected = key(model)
    config = hfproj.ProjectionHeadConfig(head="mlp", out_dim=4, backbone_adapter=LoraConfig(r=3))
    model.add_adapter("other", config)
    model.add_adapter("third", config)
    assert key(model) == expected
    model.set_adapter("other")
    other = key(model)
    assert other != expected
    with torch.no_grad():
        next(model.get_base_model().hfproj.projection_head_modules["third"].parameters()).add_(1)
    assert key(model) == other
    model.set_adapter("default")
    assert key(model) == expected
    with model.disable_adapter():
        disabled = key(model)
    assert disabled not in (expected, other)
    model.delete_adapter("third")
    assert key(model) == expected


def test_settings_without_weights_count():
    keys = [key(adapted(head_options={"activation": name})) for name in ("relu", "gelu")]
    keys += [key(adapted(backbone_adapter=LoraConfig(r=2, lora_alpha=a, init_lora_weights=False))) for a in (8, 16)]
    scaled = adapted()
    for module in scaled.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    keys += [key(scaled), key(nn.LayerNorm(4, eps=1e-5)), key(nn.LayerNorm(4, eps=1e-6))]
    plain = nn.Linear(2, 2)
    keys.append(key(plain))
    plain.temperature = 0.5
    keys.append(key(plain))
    assert len(set(keys)) == len(keys)
    assert key(adapted()) in keys  # an alpha of 8 is the default


def test_weights_trained_in_place_by_an_adapter_count_while_it_is_active():
    model = adapted(backbone_adapter=None, trainable="full")
    with model.disable_adapter():
        bare = key(model)
    expected = key(model)
    with torch.no_grad():
        model.get_base_model().get_submodule(f"{BLOCKS}.0.layernorm_before").weight.add_(1)
    assert key(model) != expected
    with model.disable_adapter():
        assert key(model) == bare


def test_types_and_shapes_of_tensors_count():
    tensors = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(())]
    tensors += [torch.zeros(4, dtype=torch.bfloat16), torch.zeros(0)]

    def of(tensor):
        module = nn.Module()
        module.register_buffer("a", tensor)
        return key(module)

    assert len({of(t) for t in tensors}) == len(tensors)
    assert of(torch.arange(6.0).view(2, 3).T) == of(torch.arange(6.0).view(2, 3).T.contiguous())
    with pytest.raises(UsageError, match="meta"):
        key(nn.Linear(2, 2, device="meta"))


# --- preprocessing ---

HALF = (0.5, 0.5, 0.5)


def test_settings_of_collators_count():
    base = {"size": 8, "mean": HALF, "std": HALF}
    changes = [{}, {"size": 16}, {"mean": (0.1, 0.5, 0.5)}, {"resize": 10}, {"interpolation": "bilinear"}]
    changes += [{"label_column": None}, {"image_column": "img"}]
    keys = {digest(preprocessing_identity(EvalImages(**base | change))) for change in changes}
    assert len(keys) == len(changes)
    assert digest(preprocessing_identity(EvalImages(**base))) in keys
    views = [hfproj.ImageViews(**base, seed=seed, brightness=b) for seed, b in ((0, 0.4), (1, 0.4), (0, 0.3))]
    assert len({digest(preprocessing_identity(v)) for v in views}) == 3


def test_a_tokenizer_counts_by_its_content_and_not_by_what_it_did_last():
    def collator(words, **options):
        model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        return EvalText(
            PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]"), **options
        )

    words = ["[PAD]", "[UNK]", "a", "b"]
    used = collator(words)
    expected = preprocessing_identity(used)
    used([{"text": "a b"}])
    assert preprocessing_identity(used) == expected == preprocessing_identity(collator(words))
    others = [collator([*words, "c"]), collator(words[:2] + words[:1:-1]), collator(words, max_length=5)]
    assert all(preprocessing_identity(other) != expected for other in others)


def test_unknown_collators_need_a_key():
    class Own:
        pass

    class Derived(EvalImages):
        pass

    derived = Derived(size=8, mean=HALF, std=HALF)
    for collator in (Own(), derived, lambda items: items, torch.utils.data.default_collate):
        with pytest.raises(UsageError, match=r"preprocessing_key='…'.*cache_key"):
            preprocessing_identity(collator)
        assert preprocessing_identity(collator, "mine") == {"key": "mine"}
    Own.cache_key = "v1"
    assert preprocessing_identity(Own())["key"] == "v1"
    odd = EvalImages(size=8, mean=HALF, std=HALF)
    odd.function = lambda x: x
    with pytest.raises(UsageError, match=r"without a plain form.*preprocessing_key"):
        preprocessing_identity(odd)


# --- data ---


def test_fingerprints_and_wrappers():
    rows = datasets.Dataset.from_dict({"x": list(range(10))})
    expected = data_identity(rows)
    assert expected == {"fingerprint": rows._fingerprint, "rows": 10}
    others = [rows.select(range(9)), rows.map(lambda row: {"x": row["x"] + 1}), IndexedDataset(rows)]
    others += [Subset(rows, [0, 1]), Subset(rows, [1, 0])]
    keys = {digest(data_identity(other)) for other in others}
    assert len(keys | {digest(expected)}) == len(others) + 1
    assert data_identity(rows, "mine") == {"key": "mine", "rows": 10}


def test_the_content_of_items_counts():
    def image(value, mode="RGB", size=(2, 2)):
        return Image.new(mode, size, value)

    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    other = palette.copy()
    other.putpalette([0, 0, 0, 8, 8, 8])
    values = [1, 1.0, "1", b"1", None, True, [1], [[1]], {"a": 1}, {"b": 1}, np.ones(2), np.ones(2, dtype=np.float32)]
    values += [np.ones((2, 1)), torch.ones(2), torch.ones(2, 1), np.float32(1), palette, other]
    values += [image((1, 1, 1)), image((1, 1, 2)), image(1, "L"), image((1, 1, 1), size=(1, 4))]
    keys = {digest(data_identity([{"x": value}])) for value in values}
    assert len(keys) == len(values)
    assert digest(data_identity([{"x": [1, 2]}])) != digest(data_identity([{"x": 1}, {"x": 2}]))


def test_at_most_256_items_are_read_and_all_where_there_are_no_more():
    class Counting(list):
        def __getitem__(self, i):
            read.add(i)
            return super().__getitem__(i)

    for rows, expected in ((200, 200), (256, 256), (5000, 256)):
        read = set()
        found = data_identity(Counting(range(rows)))
        assert len(read) == found["sampled"] == expected
        assert {0, rows - 1} <= read


def test_data_without_a_key():
    class Random(list):
        def __getitem__(self, i):
            return {"x": torch.rand(2)}

    with pytest.raises(UsageError, match="differs between two readings"):
        data_identity(Random(range(3)))
    with pytest.raises(UsageError, match=r"hold a object.*data_key"):
        data_identity([object()])
