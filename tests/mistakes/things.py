"""What the mistakes are made with: small models, data sets of every kind, saved adapters; each made once."""

import functools
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from faults.image_inputs import tokenizer
from peft import LoraConfig, get_peft_model
from small import HEAD, PIXELS, backbone, head_model, images
from torch import nn
from transformers import BertConfig, BertModel

import hfproj

__all__ = ["HEAD", "PIXELS", "backbone", "head_model", "images", "tokenizer"]
TEXTS = [{"text": "a b", "label": i % 2} for i in range(8)]


class OwnHead(nn.Module):
    """A head that only its author has."""

    def __init__(self, *, in_dim: int, out_dim: int = 4):
        super().__init__()
        self.in_dim, self.out_dim, self.layer = in_dim, out_dim, nn.Linear(in_dim, out_dim)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h)


class NotAHead(nn.Module):
    """A head without the option that every head has."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h


class Triples(torch.utils.data.Dataset):
    """Items that are neither dicts nor pairs."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple:
        return images(8)[index]["image"], index, "a name"


@functools.cache
def model():
    return head_model(lora=False, trainable="head").eval()


@functools.cache
def lora_model():
    return head_model().eval()


@functools.cache
def nano():
    return hfproj.load_backbone("vit_nano")


def bert(positions=16, vocabulary=50, dropout=0.1):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=positions, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


@functools.cache
def text_model(positions=16, vocabulary=50):
    return get_peft_model(bert(positions, vocabulary), config()).eval()


def config(**options):
    return hfproj.ProjectionHeadConfig(**{**HEAD, **options})


def attach(**options):
    """Attach a head with these options to a small ViT."""
    return get_peft_model(backbone(), config(**options))


def attach_lora(**options):
    return attach(backbone_adapter=LoraConfig(**{"r": 2, **options}))


@functools.cache
def data(labels=True, count=8):
    """A `datasets.Dataset` of images."""
    rng = np.random.default_rng(0)
    columns = {"image": [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(count)]}
    if labels:
        columns["label"] = [i % 2 for i in range(count)]
    features = datasets.Features({"image": datasets.Image(), **({"label": datasets.Value("int64")} if labels else {})})
    return datasets.Dataset.from_dict(columns, features=features)


@functools.cache
def splits():
    return datasets.DatasetDict({"train": data(), "test": data()})


def x(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    shape = shape or (4, 3, 16, 16)
    return torch.rand(*shape).mul(255).to(dtype) if dtype == torch.uint8 else torch.rand(*shape).to(dtype)


def eval_images(**options):
    return hfproj.EvalImages(**{**PIXELS, **options})


def views(**options):
    return hfproj.ImageViews(**{**PIXELS, **options})


def item(**entries):
    return {"image": np.zeros((16, 16, 3), dtype=np.uint8), "index": 0, **entries}


@functools.cache
def saved(name="default"):
    """The folder of a saved adapter."""
    folder = Path(tempfile.mkdtemp(prefix="hfproj-mistakes-"))
    head_model(name=name).save_pretrained(folder)
    return folder


@functools.cache
def saved_own_head():
    """The folder of an adapter with a head that is not registered here any more."""
    from hfproj.heads import HEADS

    folder = Path(tempfile.mkdtemp(prefix="hfproj-mistakes-"))
    model = own_head_model()
    model.save_pretrained(folder)
    del HEADS._entries["someones_own"]
    return folder


def own_head_model():
    from hfproj.heads import HEADS

    if "someones_own" not in HEADS._entries:
        hfproj.register_head("someones_own", OwnHead)
    return get_peft_model(nano(), hfproj.ProjectionHeadConfig(head="someones_own", out_dim=4))


@functools.cache
def saved_lora():
    folder = Path(tempfile.mkdtemp(prefix="hfproj-mistakes-"))
    get_peft_model(backbone(), LoraConfig(r=2, target_modules=["q_proj", "query"])).save_pretrained(folder)
    return folder


@functools.cache
def results():
    from hfproj.results import Measurement

    return hfproj.Results(measurements=[Measurement("knn", "h", "after", 0.5)], seeds=[0])


def arguments(**options):
    folder = tempfile.mkdtemp(prefix="hfproj-mistakes-")
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return hfproj.ProjectionTrainingArguments(
        **{"output_dir": folder, "per_device_train_batch_size": 4, "max_steps": 1, **quiet, **options}
    )


def trainer(*, of=None, args=None, **options):
    """A trainer on small images with these options of the trainer."""
    defaults = {"train_dataset": images(8), "data_collator": views(), "eval_collator": eval_images()}
    chosen = head_model(lora=False, trainable="head") if of is None else of
    return hfproj.ProjectionTrainer(chosen, arguments(**(args or {})), **{**defaults, **options})


def train(**options):
    return trainer(**options).train()


def evaluate(of=None, **options):
    given = {"train": images(8), "test": images(8), "collator": eval_images(), **options}
    return hfproj.evaluate(model() if of is None else of, **{n: v for n, v in given.items() if v is not ...})


def recipe(name, *flags):
    """Run a recipe's main here with these flags; its error is raised."""
    import importlib.util
    import sys

    path = Path(__file__).resolve().parents[2] / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"mistaken_{name}", path)
    module = importlib.util.module_from_spec(spec)
    before, sys.argv = sys.argv, [path.name, *map(str, flags)]
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        module.main()
    finally:
        sys.argv = before
