"""Results for the tests of cards, and how a card is taken apart."""

import re

import numpy as np
from huggingface_hub import ModelCard

from hfproj.results import Measurement, Results, pack_outcomes

ROWS = 400


def knn(layer, when, value, dataset="uoft-cs/cifar10", seed=0, **settings):
    protocol = {"k": 20, "temperature": 0.07, "bank": 1000, "queries": ROWS, "seed": seed, **settings}
    outcomes = pack_outcomes(np.arange(ROWS) < round(ROWS * value))
    return Measurement("knn", layer, when, value, dataset, "accuracy", protocol, outcomes)


def rank(layer, when, value, dataset="uoft-cs/cifar10", seed=0):
    return Measurement("rankme", layer, when, value, dataset, "", {"rows": ROWS, "eps": 1e-7, "seed": seed})


def a_result(base="facebook/dinov2-small", h=(0.8, 0.9), z=(0.7, 0.85), ranks=(20.0, 30.0), config=(), **changes):
    measured = [
        m
        for when, i in (("before", 0), ("after", 1))
        for m in (knn("h", when, h[i]), knn("z", when, z[i]), rank("z", when, ranks[i]))
    ]
    adapter = {
        "head": "mlp",
        "head_options": {"hidden_dim": 512, "depth": 2},
        "in_dim": 384,
        "out_dim": 128,
        "pooling": "cls",
        "trainable": "adapter",
        "objective": {"name": "nt_xent", "temperature": 0.2},
        "regularizers": {"werank": {"weight": 0.1}},
        "backbone_adapter": {"peft_type": "LORA", "r": 8, "target_modules": ["a", "b"]},
        "backbone": {"library": "transformers", "id": base},
    }
    training = {"learning_rate": 1e-3, "num_train_epochs": 3, "per_device_train_batch_size": 256}
    recipe = {"dataset": "uoft-cs/cifar10", "image_column": None, "crop_scale": 0.4, "rotation": 0.0}
    settings = {
        "config": {"base_model": base, "adapter": adapter, "training": training, "recipe": recipe, **dict(config)},
        "seeds": [0],
        "command": "python simclr_vit.py --epochs 3",
        "measurements": measured,
        "spectra": {"h before": [1.0, 0.1], "h after": [1.0, 0.5]},
        "history": [{"step": s, "loss": 3.0 - s, "rankme_h": 10.0 + s} for s in range(3)],
        "notes": ["Trained at night."],
    }
    return Results(**{**settings, **changes})


def body(text):
    return ModelCard(text).text


def blocks(text, language="python"):
    return re.findall(rf"```{language}\n(.*?)\n```", body(text), re.DOTALL)
