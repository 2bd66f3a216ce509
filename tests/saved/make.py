"""What an old version wrote, for `tests/test_saved_files.py`: adapters, a training run, a checkpoint, cached features.

Run once per released format, in a checkout of that version, from which `hfproj` and a small DINO file are imported:

    git worktree add /tmp/base 455e39c
    cd /tmp/base && PYTHONPATH=/tmp/base:/tmp/base/tests/hub/convert OMP_NUM_THREADS=1 \
        python …/tests/saved/make.py …/tests/saved/0.1.0

The files in `0.1.0/` were written at commit 455e39c (hfproj 0.1.0, torch 2.14.1, transformers 5.24.0, PEFT 0.21.2,
timm 1.0.31), `surface.json` by `surface.py` at the same commit. The test uses the rest of this module (backbones,
inputs, the training run) too: it is written with public names only, and reads the backbones' weights from files.
"""

import json
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hfproj

VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    "intermediate_size": 24,
}  # fmt: skip
BERT = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TIMM = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
MLP = {"head": "mlp", "out_dim": 6, "head_options": {"hidden_dim": 8, "last_norm": "batch"}}
JOINT = {**MLP, "head_options": {"hidden_dim": 8, "last_norm": "batch", "batch_statistics": "joint"}}
# name → backbone, options of the config
ADAPTERS: dict[str, tuple[str, dict]] = {
    "head": ("vit", {"trainable": "head"}),
    "lora": ("vit", {"backbone_adapter": LoraConfig(r=2), "pooling": "mean"}),
    "two_blocks": ("vit", {"trainable": 2}),
    "full": ("vit", {"trainable": "full", "layer": 0}),
    "predictor": ("vit", {"predictor": {"head": "mlp", "hidden_dim": 5}, "scales": {"logit_scale": 2.5}}),
    "prototypes": ("vit", {"prototypes": {"count": 7, "learn_norm": True}}),
    "joint_statistics": ("vit", JOINT),
    "topk": ("vit", {"head": "topk", "out_dim": None, "head_options": {"width": 16, "top_k": 5}}),
    "text": ("bert", {"backbone_adapter": LoraConfig(r=2)}),
    "timm": ("timm", {"backbone_adapter": LoraConfig(r=2)}),
}
RUN = {  # 12 images, batches of 4: 3 steps an epoch, so that step 4 lies within the second
    "per_device_train_batch_size": 4, "max_steps": 7, "learning_rate": 1e-2, "logging_steps": 1.0,
    "save_strategy": "steps", "save_steps": 4.0, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    "dataloader_pin_memory": False,
}  # fmt: skip
PIXELS = {"size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}
MOCO = {"name": "moco", "queue_size": 8, "out_dim": 6}


class Net(nn.Module):
    """A backbone of torch's layers alone, so that the key of its features does not depend on other libraries.

    Attributes:
        seen: Rows of each forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 12)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.second(torch.tanh(self.first(x)))


class ImageNet(Net):
    """The same on the mean colours of two halves of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(2, (2, -1)).mean((3, 4)).flatten(1))


ARCHITECTURES = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False),
    "timm": lambda: timm.create_model("vit_tiny_patch16_224", **TIMM),
    "net": Net,
    "image_net": ImageNet,
}


def backbone(name: str, folder: Path) -> nn.Module:
    """Return a backbone in eval mode with the weights of its file in a folder of fixtures."""
    model = ARCHITECTURES[name]()
    model.load_state_dict(load_file(folder / "backbones" / f"{name}.safetensors"))
    return model.eval()


def inputs(name: str) -> dict[str, Tensor]:
    """Return the inputs that h and z were written for."""
    generator = torch.Generator().manual_seed(5)
    if name == "bert":
        ids = torch.randint(3, 50, (4, 7), generator=generator)
        return {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([3, 4, 5, 7])[:, None]).long()}
    images = torch.randn(4, 3, 16, 16, generator=generator)
    return {"x": images} if name == "timm" else {"pixel_values": images}


@torch.no_grad()
def outputs(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return h, z, p and the prototype logits, those that there are."""
    out = model.eval()(**given)
    found = {"h": out.representation, "z": out.projection, "p": out.prediction, "scores": out.scores}
    return {name: value.clone() for name, value in found.items() if value is not None}


def machine() -> dict[str, str]:
    """Return what the last bits of a float32 sum depend on."""
    versions = {library.__name__: library.__version__ for library in (torch, transformers, timm)}
    cpu = {"cpu": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine()}
    return {**versions, **cpu, "instructions": vector_instructions()}


def vector_instructions() -> str:
    """Return the vector instructions of the processor, among which libraries choose; "" where it does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return " ".join(sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma"))))


def photos(count: int, seed: int = 0) -> list[dict]:
    """Return items with a small image of noise and a label."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [{"image": Image.fromarray(p), "label": i % 3} for i, p in enumerate(pixels)]


def moco_trainer(fixtures: Path, folder: Path, **changes: object) -> "hfproj.ProjectionTrainer":
    """Return a trainer of a MoCo with its queue and EMA target network, whose objective the adapter's config names."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_dropout=0.2, init_lora_weights=False)
    model = get_peft_model(backbone("vit", fixtures), hfproj.ProjectionHeadConfig(**MLP, backbone_adapter=lora))
    return hfproj.ProjectionTrainer(
        model,
        hfproj.ProjectionTrainingArguments(output_dir=str(folder), **{**RUN, **changes}),
        objective=dict(MOCO),
        train_dataset=photos(12),
        eval_dataset=photos(9, seed=1),
        data_collator=hfproj.ImageViews(**PIXELS),
        eval_collator=hfproj.EvalImages(**PIXELS),
        callbacks=[hfproj.SpectrumCallback(every=2, images=12)],
    )


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the tensors of the active adapter."""
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


class Rows:
    """300 items made when they are read."""

    cache_key = "rows of tests/saved"

    def __len__(self) -> int:
        return 300

    def __getitem__(self, i: int) -> dict:
        return {"x": torch.sin(torch.arange(1.0, 7) * (i + 1)), "label": i % 5}


class Stacked:
    """Collator of `Rows`."""

    cache_key = "stacked by tests/saved"

    def __call__(self, items: list) -> dict[str, Tensor]:
        x, labels = torch.stack([item["x"] for item in items]), torch.tensor([item["label"] for item in items])
        return {"pixel_values": x, "labels": labels}


def stored_features(name: str, fixtures: Path, cache_dir: Path) -> tuple["hfproj.features.Features", list[int]]:
    """Return the features of one cache, and how many rows each forward pass that was needed for them had."""
    net = backbone("image_net" if name == "images" else "net", fixtures)
    if name == "images":
        collator = hfproj.EvalImages(**PIXELS)
        found = hfproj.extract_features(net, photos(20), collator=collator, data_key="noise", cache_dir=cache_dir)
        return found, net.seen
    model: nn.Module = net
    if name == "head":
        torch.manual_seed(0)
        config = hfproj.ProjectionHeadConfig(in_dim=12, out_dim=3, head="mlp", head_options={"hidden_dim": 8})
        model = get_peft_model(net, config).eval()
    net.seen.clear()
    return hfproj.extract_features(model, Rows(), collator=Stacked(), batch_size=64, cache_dir=cache_dir), net.seen


STORES = ("backbone", "head", "images")


# --- writing, at the old version ---


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Change every trainable tensor and every BatchNorm statistic of the adapter: nothing keeps an initial value."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if getattr(tensor, "requires_grad", False) or "running" in name:
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))


def write_adapters(folder: Path) -> None:
    for name, (kind, options) in ADAPTERS.items():
        torch.manual_seed(0)
        model = get_peft_model(backbone(kind, folder), hfproj.ProjectionHeadConfig(**{**MLP, **options}))
        perturb(model)
        expected = outputs(model, inputs(kind))
        model.save_pretrained(folder / "adapters" / name)
        save_file(expected, folder / "adapters" / name / "expected.safetensors")
        (folder / "adapters" / name / "README.md").unlink()  # PEFT's template
    from official_files import CASES  # of tests/hub/convert at that commit

    case = CASES["dino: ViT"]()
    model = hfproj.convert(case.file, case.method, **case.options)
    model.save_pretrained(folder / "adapters" / "converted_dino")
    images = {"x": inputs("timm")["x"]}
    save_file(outputs(model, images), folder / "adapters" / "converted_dino" / "expected.safetensors")
    (folder / "adapters" / "converted_dino" / "README.md").unlink()


def write_run(folder: Path, scratch: Path) -> None:
    trainer = moco_trainer(folder, scratch)
    measured = {"train": photos(30, seed=2), "test": photos(15, seed=3), "dataset": "noise"}
    measured["collator"] = hfproj.EvalImages(**PIXELS)
    probes = [hfproj.KNNProbe(k=3), hfproj.LinearProbe()]
    before = hfproj.evaluate(trainer.model, probes=probes, when="before", **measured)
    trainer.train()
    results = before.merge(hfproj.evaluate(trainer.model, probes=probes, when="after", **measured))
    results.log, results.history = trainer.state.log_history, trainer.history
    results.config["training"] = trainer.args.chosen()
    (folder / "run").mkdir()
    results.save(folder / "run")
    save_file(adapter_tensors(trainer.model), folder / "run" / "step_7.safetensors")
    shutil.copytree(scratch / "checkpoint-4", folder / "checkpoint-4")
    (folder / "checkpoint-4" / "README.md").unlink()
    from hfproj.history import read_history, write_history

    write_history(trainer.history, folder / "run")
    expected = json.dumps(read_history(folder / "run"), indent=1)
    (folder / "run" / "expected_history.json").write_text(f"{expected}\n")


def write_features(folder: Path) -> None:
    for name in STORES:
        found, seen = stored_features(name, folder, folder / "features" / name)
        assert sum(seen) >= len(found)
        for lock in (folder / "features" / name).glob("*.lock"):
            lock.unlink()


def main(folder: Path) -> None:
    for part in ("adapters", "run", "checkpoint-4", "features", "backbones"):
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / "backbones").mkdir(parents=True)
    for seed, (name, make) in enumerate(ARCHITECTURES.items()):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))  # zero biases and unit scales hide mistakes
        save_file(
            {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "backbones" / f"{name}.safetensors"
        )
    write_adapters(folder)
    scratch = folder / "scratch"
    write_run(folder, scratch)
    shutil.rmtree(scratch)
    write_features(folder)
    (folder / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from saved import make  # keys of features contain the names of classes, and of this module: not "__main__"

    make.main(Path(sys.argv[1]).resolve())
