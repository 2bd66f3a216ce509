"""A good call of every public function and class: name → a function that returns positional and keyword arguments."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from faults.image_inputs import PIXELS, tokenizer
from small import head_model, images
from torch import nn

import hfproj
from hfproj import results
from hfproj.objectives.base import Step


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def given(*args, **kwargs):
    return lambda: (args, kwargs)


def folder():
    return Path(tempfile.mkdtemp(prefix="hfproj-fuzz-"))


def square(z):
    return z.square().sum(-1)


def head():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def measured(when="after"):
    found = [results.Measurement("knn", "h", when, 0.5), results.Measurement("rankme", "h", when, 3.0)]
    return hfproj.Results(measurements=found, seeds=[0])


def saved_results():
    where = folder()
    measured().save(where)
    return where


def arguments(**options):
    return {"output_dir": str(folder()), "report_to": "none", "use_cpu": True, **options}


@functools.cache
def vit_nano():
    return hfproj.load_backbone("vit_nano")


def train(**options):
    """One step of training with a checkpoint; `resume` is what `train` gets, the rest are training arguments."""
    resume, where = options.pop("resume", None), options.pop("output_dir") if "output_dir" in options else str(folder())
    few = {"per_device_train_batch_size": 4, "max_steps": 1, "disable_tqdm": True, "use_cpu": True, "report_to": "none"}
    args = hfproj.ProjectionTrainingArguments(**{"output_dir": where, **few, **options})
    views = hfproj.ImageViews(**{**PIXELS, "size": 16})
    run = hfproj.ProjectionTrainer(head_model(), args, train_dataset=DATA, data_collator=views)
    return run.train(resume_from_checkpoint=resume)


def fields():
    """Return the training arguments and their defaults; not those that compile, or change how torch works."""
    left_out = {"full_determinism", "torch_compile", "torch_compile_backend", "torch_compile_mode", "tf32"}
    found = {f.name: f for f in dataclasses.fields(hfproj.ProjectionTrainingArguments) if f.name not in left_out}
    missing = dataclasses.MISSING
    return {n: f.default if f.default is not missing else f.default_factory() for n, f in found.items()}


DATA = images(8)
EVAL = {"collator": None, "device": None, "batch_size": 4, "num_workers": 0}
F, VIEWS, SQUARE = rows(16, 6), rows(2, 8, 6), rows(4, 4) @ rows(4, 4).T
H3, H_EFF = rows(5, 3), rows(3, 3) @ rows(3, 3).T
LABELS = torch.arange(16) % 3
HISTORY = [{"step": 1, "epoch": 0.5, "rankme_h": 3.0, "std_h": 0.1}, {"step": 2, "epoch": 1.0, "rankme_h": 4.0}]
DIAGNOSTICS = {
    **{name: given(F) for name in (
        "alpha_req", "coherence", "correlation_offdiag_energy", "covariance_condition_number", "nesum",
        "covariance_offdiag_energy", "covariance_spectrum", "effective_rank", "matrix_entropy", "numerical_rank",
        "participation_ratio", "pseudo_condition_number", "rankme", "representation_std", "self_cluster",
        "singular_values", "stable_rank", "uniformity", "vicreg_covariance", "wasserstein_uniformity", "whiteness",
    )},
    "alpha_req": given(F, fit_range=(1, 5)), "effective_rank": given(F, center=True, on="eigenvalues"),
    "covariance_spectrum": given(F, center=True, normalize=False), "numerical_rank": given(F, tol=1e-6, center=False),
    "singular_values": given(F, center=True, normalize=False), "rankme": given(F, eps=1e-7),
    "matrix_entropy": given(F, alpha=2.0), "uniformity": given(F, kernel_scale=2.0), "coherence": given(F, tol=1e-8),
    "covariance_condition_number": given(F, center=True, normalize=True, tol=1e-8, floor=1e-7),
    "participation_ratio": given(F, center=True), "clid": given(F, clusters=3, protocol="prequential", seed=0),
    "cluster_learnability": given(F, clusters=3, protocol="prequential", seed=0),
    "intrinsic_dimension": given(F, estimator="fit"), "feature_weights": given(F, rows(16, 2)),
    "information_bounds": given(VIEWS, VIEWS, alpha=2.0, temperature=0.2),
    "layer_inequality": given({"h": F, "z": F}, rows(16, 6)), "lidar": given(rows(8, 4, 3), ridge=1e-4),
    "lidar_of_views": given(VIEWS, ridge=1e-4), "matrix_mutual_information": given(F, F, alpha=2.0),
    "positive_cosine": given(VIEWS), "alignment": given(VIEWS, alpha=2.0), "weight_inequality": given(torch.ones(4)),
    "SpectrumState": given(normalize=True), "ViewState": given(alpha=2.0),
}  # fmt: skip
GEOMETRY = {
    "EffectiveHessianOperator": lambda: ((head(), square, H3), {"dtype": torch.float64}),
    "HessianOperator": lambda: ((lambda: SQUARE.sum(), [nn.Parameter(SQUARE)]), {}),
    "alignment_gain": given(rows(3, 4, 5), rows(3, 4, 2)), "augmentation_tangents": given(H3, H3 + 0.1, 0.1),
    "bottom_overlap": lambda: ((head(), H3, H3), {"dim": 1, "rtol": 1e-6}),
    "collapse_report": lambda: ((head(), square, H3), {}),
    "compression": given(rows(3, 4, 5), rows(3, 4, 2), normalize=True),
    "constructed_equilibrium": lambda: ((nn.Linear(2, 3), rows(4, 2)), {"alpha": 1.0}),
    "count_negative": given(rows(3, 4)), "curvature_barrier": given(rows(2, 4, 4), rows(3, 2)),
    "effective_hessian": lambda: ((head(), square, H3), {}),
    "extreme_eigenvalues": given(SQUARE.double().matmul, 4, steps=4, tol=1e-6, method="lanczos", vectors=False),
    "gradient_flow": lambda: ((lambda w: w.square().sum(), rows(3).double()),
                              {"time": 0.1, "record": 1, "method": "rk45", "rtol": 1e-6, "atol": 1e-8}),
    "head_orbits": lambda: ((head(), rows(2, 4, 3)), {"normalize_input": False}),
    "jacobian": lambda: ((head(), H3), {"dtype": torch.float64}),
    "layerwise_condition_number": lambda: ((head(), H3), {"rtol": 1e-6, "dtype": torch.float64}),
    "linear_invariant": given(rows(4, 3), rows(2, 4), rows(4)), "local_curvature": given(rows(2, 5, 3), normalize=True),
    "metric_condition_number": lambda: ((head(), H3), {"rtol": 1e-6, "dtype": torch.float64}),
    "metric_degeneracy": lambda: ((head(), H3, H3), {"dtype": torch.float64}),
    "metric_spectrum": lambda: ((head(), H3), {"dtype": torch.float64}),
    "metric_variation": lambda: ((head(), H3), {"dtype": torch.float64}), "nullity": given(SQUARE, rtol=1e-6),
    "orbit_metrics": given(rows(3, 4, 5), normalize=True),
    "pullback_metric": lambda: ((head(), H3), {"dtype": torch.float64}),
    "relu_invariant": given(rows(4, 3), rows(2, 4), rows(4)), "subspace_whitening": given(SQUARE, rows(3, 2)),
    "timescale_ratio": lambda: ((head(), head(), 0.1), {"backbone_learning_rate": 0.1}),
    "whitening_score": given(H_EFF, rank=2),
}  # fmt: skip
PLOTS = {
    "orbit_coordinates": given(rows(3, 4, 5)), "plot_covariance": given({"h": SQUARE.tolist()}, None, width=6.4),
    "plot_curves": given({"a": {"x": [1, 2], "y": [1.0, 2.0]}}, "x", "y", None, x_scale="linear", width=6.4),
    "plot_history": given(HISTORY, None, metrics=("rankme", "std"), width=6.4),
    "plot_metric_condition": given({"a": [1.0, 2.0]}, None, width=6.4),
    "plot_spectrum": given({"h after": [3.0, 2.0, 1.0]}, None, width=6.4),
}  # fmt: skip
PROBES = {
    "KNNProbe": given(k=3, temperature=0.07), "LinearProbe": given(l2=1.0, holdout=0.1, max_iter=10, seed=0),
    "FewShotProbe": given(n=2, draws=2, probe="knn", seed=0), "KMeansProbe": given(clusters=3, n_init=2, seed=0),
    "MLPProbe": given(hidden=8, epochs=1, batch_size=8, learning_rate=1e-3, weight_decay=0.0, seed=0),
    "ManyRatesProbe": given(rates=(0.1,), epochs=1, batch_size=8, holdout=0.1, seed=0),
    "RetrievalProbe": given(k=(1, 5)), "GroupRobustProbe": given(l2=1.0, draws=2, standardize=True, seed=0),
    "AttentiveProbe": given(heads=2, queries=1, epochs=1, min_steps=1, batch_size=8, learning_rate=1e-3, seed=0),
    "FineTuneProbe": given(fraction=1.0, epochs=1, batch_size=8, learning_rate=1e-3, warmup=0.1, precision=None),
    "group_accuracies": given(torch.tensor([True, False]), [0, 1]),
    "RotatedImages": given(DATA, image_column="image", label_column="label", channels=3),
}  # fmt: skip
DATASETS = {
    "EpochSampler": given(8, seed=0, shuffle=True), "EvalImages": given(**PIXELS, resize=8, label_column="label"),
    "ImageViews": given(**PIXELS, num_views=2, local_views=1, local_size=4, seed=0, scale=(0.5, 1.0)),
    "EvalText": lambda: ((tokenizer(),), {"column": "text", "max_length": 8}),
    "TextViews": lambda: ((tokenizer(),), {"columns": "text", "num_views": 2, "max_length": 8}),
    "IndexedDataset": given(DATA, on_bad_image="raise", image_column="image", channels=3),
    "StreamDataset": given(DATA, on_bad_image="raise", image_column="image", channels=3),
    "load_image_dataset": given("digits", split="test", limit=3, seed=0), "to_rgb_tensor": given(np.zeros((4, 4))),
    "split_off": lambda: ((hfproj.load_image_dataset("digits", split="test"), 3), {"seed": 0}),
    "without_bad_images": given(DATA, image_column="image", channels=3),
    "Augmentation": given(scale=(0.5, 1.0), ratio=(0.7, 1.3), flip_probability=0.5, hue=0.1, blur_sigma=(0.1, 2.0)),
    "CorruptedDataset": given(DATA, "gaussian_noise", 3, size=8, seed=0), "FeatureViews": given(2, seed=0),
    "corrupt": given(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "gaussian_noise", 3, seed=0, index=[0, 1]),
    "CachedFeatures": given(rows(8, 2, 6), torch.arange(8)), "coarse_labels": given(list(range(100))),
}  # fmt: skip
MODELS = {
    "create_head": given("mlp", in_dim=8, out_dim=4, hidden_dim=8, depth=2, norm="batch"),
    "create_objective": given("nt_xent", temperature=0.2), "create_probe": given("knn", k=3),
    "create_regularizer": given("koleo", on="h"), "get_preset": given("simclr_cifar"),
    "load_backbone": given("vit_nano", library=None, revision=None), "FeatureBackbone": given(8, pooling="cls"),
    "ProjectionHeadConfig": given(head="mlp", out_dim=4, head_options={"hidden_dim": 8}, trainable="head", layer=-1),
    "detach": lambda: ((head_model(),), {"adapter_name": None}),
    "evaluate": lambda: ((head_model(),), {"probes": "knn", "train": DATA, "test": DATA, **EVAL, "layers": (),
                                           "when": "after", "labels": "auto", "seed": 0, "dataset": "a"}),
    "extract_features": lambda: ((head_model(), DATA), {**EVAL, "pooling": None, "layers": (), "tokens": False}),
    "cache_features": lambda: ((head_model(), DATA, hfproj.ImageViews(**{**PIXELS, "size": 16})),
                               {"passes": 1, "batch_size": 4, "num_workers": 0}),
    "export_merged": lambda: ((head_model(), folder()), {}),
    "export_backbone_adapter": lambda: ((head_model(), folder()), {"adapter_name": None}),
    "from_pretrained": given("nobody/nothing", adapter="default", revision=None), "list_adapters": given("no/thing"),
    "load_head": given("nobody/nothing", adapter="default"), "convert": given({}, "moco_v2", network=None),
    "register_head": given("fuzz", nn.Linear), "register_objective": given("fuzz", nn.Linear),
    "register_regularizer": given("fuzz", nn.Linear), "register_probe": given("fuzz", object),
    "push_to_hub": lambda: ((head_model(), "me/fuzz"), {"private": None, "token": None}),
    "image_preprocessing": lambda: ((head_model(),), {}), "blocks_of": lambda: ((head_model().get_base_model(),), {}),
    "ImagePreprocessing": given(8, (0.5,) * 3, (0.5,) * 3, interpolation="bicubic", resize=8),
    "resolve_read_point": lambda: ((head_model().get_base_model(),), {"pooling": "cls", "layer": -1}),
    "fit_image_size": lambda: ((head_model().get_base_model(), (16, 16)), {}),
    "library_of": lambda: ((head_model().get_base_model(),), {}),
    "Weighted": given(nn.Identity(), 1.0, schedule="linear", end_weight=0.5),
    "linear_cka": given(F, F, unbiased=False), "mutual_knn": given(F, F, k=3), "NeighbourBank": given(F, sharded=False),
}  # fmt: skip
TRAINING = {
    "SpectrumCallback": given(metrics=("rankme",), every=2, images=8, dataset=None),
    "CollapseCallback": given(limits={"std_z": 0.1}, patience=2, action="warn", warmup=2, every=2),
    "CurvatureCallback": given(of="head", steps=8, every=2, images=8), "UpdateRatioCallback": given(every=5),
    "OnlineProbeCallback": given(learning_rate=0.1, momentum=0.9, k=3, temperature=0.07, bank=16, every=2, images=8),
    "ProjectionTrainingArguments": lambda: ((), arguments(learning_rate=1e-3, patch_dropout=0.0, eval_knn_k=3,
                                                         on_bad_image="raise", lars=False, ema_momentum=0.9)),
    "ProjectionTrainer": lambda: ((head_model(), hfproj.ProjectionTrainingArguments(**arguments())), {
        "objective": "nt_xent", "regularizers": {"koleo": 0.1}, "train_dataset": DATA, "eval_dataset": DATA,
        "bank_dataset": None, "data_collator": None, "callbacks": None, "optimizers": (None, None),
        "continue_from": None}),
}  # fmt: skip
RESULTS = {
    "Measurement": given("knn", "h", "after", 0.5, dataset="a", unit="", protocol={}),
    "Missing": given("knn", "h", "after", "no labels"), "findings": lambda: ((measured(),), {}),
    "verdicts": lambda: ((measured(),), {"layer": "h"}), "rank_changes": lambda: ((measured(),), {"layers": ("h",)}),
    "paired_interval": given([True, False], [False, False], level=0.9, draws=10, seed=0),
    "pack_outcomes": given([True, False]), "unpack_outcomes": lambda: ((results.pack_outcomes([True, False]),), {}),
    "write_history": lambda: ((HISTORY, folder()), {}), "check_license": given("mit"),
    "read_history": lambda: ((results.write_history(HISTORY, folder()),), {"until": 1}),
    "report": lambda: ((saved_results(),), {"path": None}), "render_report": lambda: ((measured(),), {}),
    "write_card": lambda: ((measured(), folder()), {"repo_id": "me/x", "license": "mit", "adapter": "default"}),
    "render_card": lambda: ((measured(),), {"repo_id": "me/x", "license": None, "adapter": "default"}),
    "write_eval_results": lambda: ((measured(), folder()), {}),
}  # fmt: skip
ROOMS = {
    "diagnostics": DIAGNOSTICS, "geometry": GEOMETRY, "plots": PLOTS, "probes": PROBES, "data": DATASETS,
    "": MODELS, "training": TRAINING, "results": RESULTS,
}  # fmt: skip
METHODS = {  # of objects: a call after they are made
    "Results.value": lambda: (measured().value, ("knn",), {"layer": "h", "when": "after"}),
    "Results.merge": lambda: (measured().merge, (measured("before"),), {}),
    "Results.save": lambda: (measured().save, (folder(),), {}),
    "Results.load": lambda: (hfproj.Results.load, (saved_results(),), {}),
    "Augmentation.__call__": lambda: (hfproj.data.Augmentation(), ([torch.rand(3, 8, 8)],),
                                      {"size": 8, "seed": 0, "epoch": 0, "index": [0], "view": 0}),
    "KNNProbe.fit": lambda: (hfproj.KNNProbe(k=3).fit, (F, LABELS), {}),
    "KNNProbe.score": lambda: (hfproj.KNNProbe(k=3).fit(F, LABELS).score, (F, LABELS), {}),
    "LinearProbe.fit": lambda: (hfproj.LinearProbe(l2=1.0, max_iter=5).fit, (F, LABELS), {}),
    "EpochSampler.set_epoch": lambda: (hfproj.EpochSampler(4).set_epoch, (1,), {}),
    "ImageViews.__call__": lambda: (hfproj.ImageViews(**PIXELS), ([{**DATA[0], "index": 0}],), {}),
    "ImageViews.for_model": lambda: (hfproj.ImageViews.for_model, (head_model(),), {**PIXELS, "num_views": 2}),
    "EvalImages.for_model": lambda: (hfproj.EvalImages.for_model, (head_model(),), dict(PIXELS)),
    "EvalImages.for_model, vit_nano": lambda: (hfproj.EvalImages.for_model, (vit_nano(),), {
        "size": 8, "resize": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resizer": "pil",
        "resize_mode": "exact", "crop_rounding": "even", "image_column": "image", "label_column": None,
        "flip_channels": True}),
    "ImageViews.for_model, vit_nano": lambda: (hfproj.ImageViews.for_model, (vit_nano(),), {
        "size": 16, "num_views": 2, "local_views": 1, "local_size": 16, "local_scale": (0.1, 0.5), "seed": 0,
        "mean": (0.5,) * 3, "std": (0.5,) * 3, "scale": (0.5, 1.0), "hue": 0.1, "blur_probability": "auto",
        "augmentation": None, "local_augmentation": None, "flip_channels": False, "label_column": None}),
    "TextViews.for_model": lambda: (hfproj.TextViews.for_model, (head_model(),), {"columns": "text", "max_length": 8}),
    "train": lambda: (train, (), {"resume": "auto"}),
    "training arguments": lambda: (train, (), {**fields(), "output_dir": str(folder()), "report_to": "none",
                                               "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 1}),
    "write_history, a row": lambda: (lambda **row: results.write_history([row], folder()), (),
                                     {"step": 1, "seed": 0, "rankme_h": 3.0}),
    "ProjectionHeadConfig.for_objective": lambda: (hfproj.ProjectionHeadConfig.for_objective, ("byol",),
                                                   {"out_dim": 4, "head": "mlp"}),
    "Step.at": lambda: (Step.at, (0, 1, 0.5), {"device": "cpu"}),
    "NTXent.forward": lambda: (hfproj.create_objective("nt_xent"), (VIEWS,), {"labels": None, "index": None}),
    "MLPHead.forward": lambda: (hfproj.create_head("mlp", in_dim=6, hidden_dim=8, out_dim=4), (VIEWS,), {}),
    "SpectrumState.update": lambda: (hfproj.diagnostics.SpectrumState().update, (F,), {}),
    "NeighbourBank.search": lambda: (hfproj.features.NeighbourBank(F).search, (F, 3), {}),
}  # fmt: skip
