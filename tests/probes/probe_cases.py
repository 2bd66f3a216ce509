"""Every registered probe with options that make it quick; the tests of all probes run over these rows.

A probe on features or tokens is fitted and scored on `training_set`, on a CPU (`test_all_probes.py`) and, in float64,
float32 and float16, on a GPU (`tests/test_cuda_measures.py`); `test_evaluate.py` scores each on a model.
"""

import torch

CASES = {
    "attentive": {"heads": 2, "epochs": 2, "min_steps": 1, "batch_size": 32},
    "few_shot": {"n": 3, "draws": 2},
    "fine_tune": {"epochs": 1, "batch_size": 20},
    "kmeans": {"n_init": 2},
    "knn": {"k": 5},
    "linear": {"l2": 0.1},
    "many_rates": {"epochs": 3, "batch_size": 32},
    "mlp": {"hidden": 8, "epochs": 10, "batch_size": 32, "learning_rate": 0.02},
    "retrieval": {"k": (1, 5)},
}


def training_set(on="features"):
    """Return 120 rows in three clusters: features `[rows, 8]`, or tokens `[rows, 2, 4]`, and labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(120) % 3
    f = 2 * torch.eye(3, 8)[labels] + torch.randn(120, 8, generator=generator)
    return f.view(120, 2, 4) if on == "tokens" else f, labels
