"""Models that do not learn all that they train; and what two processes do with them."""

import torch
from peft import LoraConfig, get_peft_model
from processes import Double
from small import HEAD, Counting, head_model, images, trainer, views
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback, ViTConfig, ViTModel

import hfproj
from hfproj import distributed
from hfproj.training.gradients import CHECKPOINTING

WORDS = ["[PAD]", "[UNK]", "a", "small", "large", "cat", "dog", "sleeps", "runs"]
SENTENCES = [
    {"text": f"a {size} {animal} {verb}"} for size in WORDS[3:5] for animal in WORDS[5:7] for verb in WORDS[7:]
]


def tokenizer():
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")


class Unused(Counting):
    """Asks for predictions and does not use them."""

    needs = frozenset({"prediction"})


class Ruler(nn.Module):
    """A regularizer: the mean square of z, over a length that may be learned."""

    def __init__(self, learnable=False):
        super().__init__()
        self.length = nn.Parameter(torch.ones(()), requires_grad=learnable)

    def forward(self, model, h, z, *, step=None):
        rows = distributed.gather_rows(z.transpose(0, 1).contiguous())
        return rows.square().mean() / self.length


class Steps(TrainerCallback):
    """Keeps the steps that begin to be taken."""

    def __init__(self, steps):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def with_pooler(**config):
    """A ViT whose pooler, which the head does not read, was unfrozen by hand."""
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**sizes, intermediate_size=24), add_pooling_layer=True)
    config = {"pooling": "mean", "backbone_adapter": LoraConfig(r=2), **config}
    model = get_peft_model(vit, hfproj.ProjectionHeadConfig(**{**HEAD, **config}))
    model.get_base_model().pooler.requires_grad_(True)
    return model


def shares(folder):
    """Return what is logged of the shares in three steps of a global batch of 8, in float64."""
    regularizers = {"ruler": {"module": None}, "koleo": {"weight": 0.1, "on": "h"}, "werank": {"weight": 1e-3}}
    regularizers["ruler"] = hfproj.regularizers.Weighted(Ruler(), 0.5)
    run = trainer(
        folder,
        head_model().double(),
        images(35),
        Double(views()),
        extra={"regularizers": regularizers, "objective": "nt_xent"},
        per_device_train_batch_size=8 // distributed.world_size(),
        gradient_accumulation_steps=2,
        logging_steps=2,
        max_steps=4,
        optim="sgd",
    )
    run.train()
    return [{n: v for n, v in row.items() if "_grad_share" in n} for row in run.state.log_history if "loss" in row]


def attempt(folder, model, **options):
    steps = []
    run = trainer(folder, model, images(24), **options)
    run.add_callback(Steps(steps))
    try:
        run.train()
    except hfproj.UsageError as error:
        return {"error": str(error), "steps": len(steps)}
    return {"error": "", "steps": len(steps)}


def both(out):
    """Return what becomes of each case, on all processes."""
    predictor = {"predictor": {"head": "linear"}}
    unused = {"extra": {"objective": Unused()}}
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    return {
        "shares": shares(out / "shares"),
        "part": attempt(out / "a", head_model(**predictor), **unused),
        "part, accumulated": attempt(out / "b", head_model(**predictor), gradient_accumulation_steps=2, **unused),
        "backbone": attempt(out / "c", with_pooler()),
        "healthy, compiled": attempt(out / "e", head_model(), **compiled),
        "backbone, compiled": attempt(out / "f", with_pooler(), **compiled),
        "backbone, checkpointed": attempt(out / "d", with_pooler(), **{CHECKPOINTING: True}),
    }
