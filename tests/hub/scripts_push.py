"""What tests/hub/test_push.py runs in the client's process: pushing as users do it."""

import gc
import logging
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from cases import make_backbone, make_config, perturb, snapshot
from peft import get_peft_model
from torch import nn

import hfproj
from hfproj import filenames
from hfproj.results import Measurement, pack_outcomes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
MODELS = {}


def model(name="vit", seed=0, adapters=("default",)):
    """A model with heads, kept for the next call: making one takes longer than pushing it."""
    key = (name, adapters)
    if key not in MODELS:
        made = get_peft_model(make_backbone(name), make_config(name, "lora"), adapter_name=adapters[0])
        for more in adapters[1:]:
            made.add_adapter(more, make_config(name, "lora"))
        MODELS[key] = made.eval(), snapshot(made)
    made, first = MODELS[key]
    with torch.no_grad():
        for tensor_name, tensor in (*made.named_parameters(), *made.named_buffers()):
            tensor.copy_(first[tensor_name])
    for adapter in reversed(adapters):
        made.set_adapter(adapter)
        perturb(made, seed)
    return made


def results(value=0.75, **changes):
    outcomes = pack_outcomes(np.arange(20) < 20 * value)
    measured = [
        Measurement("knn", layer, when, value, "me/flowers", "accuracy", {"k": 20, "seed": 0}, outcomes)
        for layer in ("h", "z")
        for when in ("before", "after")
    ]
    settings = {
        "config": {"base_model": None, "adapter": {"head": "mlp", "out_dim": 6, "in_dim": 16}},
        "command": "python simclr_vit.py",
        "spectra": {"h before": [1.0, 0.1], "h after": [1.0, 0.5]},
        "seeds": [0],
        "measurements": measured,
    }
    return hfproj.Results(**{**settings, **changes})


class Buffers(nn.Module):
    """An objective that has nothing but a queue, and a moving average."""

    def __init__(self, value=0.0):
        super().__init__()
        self.register_buffer("queue", torch.full((4, 6), value))

    def save(self, folder):
        from safetensors.torch import save_file

        save_file({"average": self.queue}, folder / "ema.safetensors", metadata={"format": "pt"})


def push(repo_id, *, name="vit", seed=0, adapters=("default",), active=None, measured=None, state=False, **options):
    """Push, and return what came back and what the same adapters are when they are saved here."""
    made = model(name, seed, tuple(adapters))
    made.set_adapter(active or adapters[0])
    options = {"results": results(measured) if measured is not None else None, **options}
    if state:
        options |= {"objective": Buffers(1.0), "ema": Buffers(2.0)}
    options["adapters"] = options.pop("only", None)
    info = hfproj.push_to_hub(made, repo_id, **options)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        saved = {str(p.relative_to(folder)): p.read_bytes().hex() for p in Path(folder).rglob("*.safetensors")}
    return {"oid": info.oid, "pr_url": info.pr_url, "url": info.commit_url, "saved": saved}


def push_results(repo_id, text, where="notes", **environment):
    """Push results that hold `text`."""
    os.environ |= environment
    try:
        changed = results(0.5, **({"command": text} if where == "command" else {}))
        if where == "config":
            changed.config["recipe"] = {"dataset": text}
        if where == "notes":
            changed.notes = [text]
        return hfproj.push_to_hub(model(), repo_id, results=changed).oid
    finally:
        for name in environment:
            del os.environ[name]


def processor(repo_id):
    """Return how far our own preparation of an image and that of the repository are apart."""
    from PIL import Image
    from transformers import AutoImageProcessor

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    made = hfproj.EvalImages.for_model(model("vit_nano"))([{"image": image}])["pixel_values"]
    theirs = AutoImageProcessor.from_pretrained(repo_id)(images=image, return_tensors="pt")["pixel_values"]
    return (made - theirs).abs().max().item()


def as_other(account, **arguments):
    """Push with the token of another account in the environment."""
    kept = os.environ["HF_TOKEN"]
    os.environ["HF_TOKEN"] = account
    try:
        return push(**arguments)
    finally:
        os.environ["HF_TOKEN"] = kept


def _trainer(folder, **options):
    from small import head_model, trainer

    extra = options.pop("extra", {})
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "push_to_hub": True}
    model = head_model(options.pop("seed", 0))
    return trainer(Path(folder), model, extra={"objective": "moco", **extra}, **run | options)


def train_and_push(folder, call=None, measured=None, **options):
    """Train, push at the end, and return what was pushed and what was logged."""
    from small import adapter

    gc.collect()
    gc.freeze()  # accelerate collects garbage after each training, which looks through all that is imported
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("hfproj.training").addHandler(handler)
    try:
        run = _trainer(folder, **options)
        run.train()
        measured = results(measured) if measured is not None else None
        info = run.push_to_hub(results=measured, **call) if call is not None else None
    finally:
        logging.getLogger("hfproj.training").removeHandler(handler)
    files = sorted(p.name for p in Path(folder).iterdir() if p.is_file())
    total = sum(t.double().sum().item() for t in adapter(run.model).values())
    return {"oid": info and info.oid, "log": lines, "files": files, "total": total, "repo": run.hub_model_id}


def make_trainer(folder, **options):
    return _trainer(folder, **options).hub_model_id


def go_on(folder, source, **options):
    """Make a trainer that goes on from the Hub; return where it stands and a sum of its tensors."""
    from small import adapter

    run = _trainer(folder, seed=9, push_to_hub=False, extra={"continue_from": source}, **options)
    total = sum(t.double().sum().item() for t in adapter(run.model).values())
    return {"started": list(run.started), "total": total, "queue": run.objective.queues[0].rows.sum().item()}


def push_command(repo_id, folder, flags):
    """Save an adapter with results and buffers, and push it by ``hfproj push``; return what was printed."""
    import contextlib
    import io

    from hfproj.commands import program
    from hfproj.objectives.buffers import save_buffers

    made, path = model("vit_nano"), Path(folder)
    made.save_pretrained(path)
    results(0.75).save(path)
    save_buffers(Buffers(1.0), path)
    for name in filenames.OF_OWN_DATA:  # of the user's own images and texts, as the recipes leave them there
        (path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    argv, sys.argv = sys.argv, ["hfproj", "push", folder, repo_id, *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            program.main()
    finally:
        sys.argv = argv
    return printed.getvalue()
