"""Right and wrong uses of the public API, for type checkers: exactly the lines that end in ``# wrong`` are errors.

Nothing here runs. `tests/test_typing.py` gives the file to mypy and to pyright.
"""

from collections.abc import Iterator
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoModel

import hfproj
from hfproj.data import IndexedDataset, to_rgb_tensor
from hfproj.diagnostics import SpectrumState, effective_rank, lidar, rankme
from hfproj.geometry import extreme_eigenvalues, pullback_metric
from hfproj.heads.mlp import MLPHead
from hfproj.objectives.nt_xent import NTXent
from hfproj.probes import AttentiveProbe, FineTuneProbe, RotatedImages, register_probe
from hfproj.regularizers.koleo import KoLeo
from hfproj.results import Measurement, paired_interval, verdicts
from hfproj.studies import CorruptedDataset, DigitsOnImages, SpuriousMixture, coarse_labels


def right(dataset: torch.utils.data.Dataset, x: torch.Tensor) -> None:
    backbone = AutoModel.from_pretrained("facebook/dinov2-small")
    config = hfproj.ProjectionHeadConfig(head="mlp", out_dim=128, backbone_adapter=LoraConfig(r=8))
    model = get_peft_model(backbone, config)
    args = hfproj.ProjectionTrainingArguments(output_dir="out", num_train_epochs=10, lars=True)
    objective = hfproj.create_objective("nt_xent", temperature=0.2)
    trainer = hfproj.ProjectionTrainer(
        model,
        args,
        objective=objective,
        regularizers={"werank": 0.01},
        train_dataset=dataset,
        callbacks=[hfproj.SpectrumCallback(), hfproj.CollapseCallback(action="restore")],
    )
    trainer.train()
    trainer = hfproj.ProjectionTrainer(model, args, objective="byol", train_dataset=dataset)
    results = hfproj.evaluate(model, probes=["knn", hfproj.LinearProbe()], train=dataset, test=dataset)
    text: str = results.table()
    for verdict in verdicts(results):
        text += verdict.headline
    hfproj.push_to_hub(model, "me/my-head", results=results, private=True)
    hfproj.report("out").name.upper()
    head: nn.Module = hfproj.load_head("my-head")
    z = head(x)
    rank: float = rankme(z)
    state = SpectrumState()
    state.update(z)
    loaded = hfproj.from_pretrained("my-head", revision="main")
    loaded.eval()
    probe = hfproj.KNNProbe(k=20).fit(x, x)
    accuracy: float = probe.score(x, x)
    hfproj.results.Results.load("results.json")
    print(rank + accuracy + lidar(x[None]), text, hfproj.heads.list_heads()["mlp"], paired_interval([1], [0]).low)


class Own:
    """A data set that derives from nothing."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise IndexError


def stream() -> Iterator[dict[str, Any]]:
    yield {}


def right_data(
    model: PeftModel,
    table: datasets.Dataset,
    tables: dict[str, datasets.Dataset],
    stored: datasets.IterableDataset,
    pictures: list[Image.Image],
    pairs: list[tuple[Image.Image, int]],
    dataset: torch.utils.data.Dataset,
    options: dict[str, Any],
) -> None:
    hfproj.evaluate(model, train=pairs, test=table, layers="all", when="before")
    hfproj.evaluate(model, train=Own(), test=[{"image": pictures[0], "label": 3}], labels=None, layers=["blocks.0", 3])
    hfproj.evaluate(model, test=hfproj.load_image_dataset("digits"))
    hfproj.extract_features(model, IndexedDataset(table), pooling="cls_mean")
    hfproj.extract_features(model, table, layers="head").by_name()["head.0"]
    kept: str = (
        hfproj.autopsy("my-head", train=table, test=pairs, views=hfproj.ImageViews.for_model(model)).cuts[0].keep
    )
    hfproj.cut_head(model, kept)
    hfproj.invariance_report(model, table, hfproj.ImageViews.for_model(model)).cells()
    hfproj.cache_features(model, torch.utils.data.Subset(dataset, [0]), hfproj.ImageViews.for_model(model))
    hfproj.ImageViews.for_model(model, num_views=3, flip_probability=None, blur_probability="auto", label_column=None)
    hfproj.EvalImages.for_model(model, interpolation="bilinear", resize=40)
    hfproj.ProjectionTrainer(model, train_dataset=table, eval_dataset=tables, bank_dataset=RotatedImages(pictures))
    hfproj.ProjectionTrainer(model, train_dataset=stored, eval_dataset={"a": table, "b": pairs}, **options)
    hfproj.ProjectionTrainer(model, train_dataset=stream(), eval_dataset=dataset)
    FineTuneProbe(precision="bf16", pooling="mean").fit(model, CorruptedDataset(table, "fog", 3)).score(dataset)
    to_rgb_tensor(pictures[0]).float()
    coarse_labels(table).sum()
    coarse_labels([0, 91]).sum()
    SpuriousMixture(table, classes=("cat", 3), attribute="patch")
    hfproj.ProjectionHeadConfig(trainable=2, pooling="cls")
    hfproj.ProjectionHeadConfig(trainable="full", pooling=None)


def wrong(model: PeftModel, dataset: torch.utils.data.Dataset, x: torch.Tensor) -> None:
    hfproj.ProjectionTrainr  # wrong
    hfproj.resutls  # wrong
    hfproj.data.ImageView  # wrong
    hfproj.probes.evalute  # wrong
    hfproj.ProjectionHeadConfig(haed="mlp")  # wrong
    hfproj.ProjectionHeadConfig(out_dim="wide")  # wrong
    hfproj.ProjectionHeadConfig.for_objectiv("byol")  # wrong
    hfproj.ProjectionTrainingArguments(output_dir="out", head_learning_rat=0.1)  # wrong
    hfproj.ProjectionTrainer(model, objectiv="nt_xent")  # wrong
    hfproj.ProjectionTrainer(model, objective=3)  # wrong
    hfproj.ProjectionTrainer(model, objective="nt_xent", regularizers="werank:0.1")  # wrong
    hfproj.create_head("mlp")  # wrong
    hfproj.create_head("mlp", in_dim="384")  # wrong
    hfproj.create_objective(temperature=0.2)  # wrong
    hfproj.evaluate(model, tset=dataset)  # wrong
    hfproj.autopsy(model, train=dataset)  # wrong
    hfproj.cut_head(model, 1)  # wrong
    hfproj.evaluate(model, test=dataset, batch_size="256")  # wrong
    hfproj.evaluate(model, test=dataset).tabel()  # wrong
    hfproj.push_to_hub(model)  # wrong
    hfproj.push_to_hub(model, "me/x", result=None)  # wrong
    hfproj.from_pretrained("me/x", adaptr="a")  # wrong
    hfproj.load_head("me/x").predict(x)  # wrong
    hfproj.report(output="out")  # wrong
    hfproj.KNNProbe(n_neighbors=5)  # wrong
    hfproj.KNNProbe(k=5).fit(x)  # wrong
    hfproj.LinearProbe(l2="big", seeds=1)  # wrong
    hfproj.SpectrumCallback(evry=5)  # wrong
    hfproj.extract_features(model, dataset, layer="all")  # wrong
    hfproj.Results(mesurements=[])  # wrong
    hfproj.write_card()  # wrong
    hfproj.convert("file.pth", method=3)  # wrong
    hfproj.load_backbone()  # wrong
    hfproj.export_onnx(model)  # wrong
    rankme("features")  # wrong
    rankme(x, epsilon=1e-7)  # wrong
    SpectrumState().updates(x)  # wrong
    pullback_metric(x)  # wrong
    extreme_eigenvalues(lambda v: v, dim="8")  # wrong
    Measurement("knn", "h", "after")  # wrong
    AttentiveProbe(head=8)  # wrong
    register_probe("mine")  # wrong
    hfproj.ImageViews.for_modl(model)  # wrong
    hfproj.ImageViews.for_model(model, veiws=2)  # wrong
    hfproj.ImageViews.for_model(model, num_views="two")  # wrong
    hfproj.ImageViews(size=8, mean=(0.5,), std=(0.5,), flip=0.5)  # wrong
    hfproj.EvalImages.for_model(model, interpolation="cubic")  # wrong


def wrong_data(model: PeftModel, dataset: torch.utils.data.Dataset, x: torch.Tensor) -> None:
    hfproj.evaluate(model, test=3)  # wrong
    hfproj.evaluate(model, test="cifar10")  # wrong
    hfproj.evaluate(model, test=None)  # wrong
    hfproj.evaluate(model, train=3, test=dataset)  # wrong
    hfproj.evaluate(model, test=stream())  # wrong
    hfproj.evaluate(model, test={"test": dataset})  # wrong
    hfproj.extract_features(model, 3)  # wrong
    hfproj.cache_features(model, 3, hfproj.ImageViews.for_model(model))  # wrong
    hfproj.ProjectionTrainer(model, train_dataset=7)  # wrong
    hfproj.ProjectionTrainer(model, train_dataset="cifar10")  # wrong
    hfproj.ProjectionTrainer(model, eval_dataset=stream())  # wrong
    hfproj.ProjectionTrainer(model, bank_dataset=7)  # wrong
    hfproj.ProjectionTrainer(model, processing_class=7)  # wrong
    hfproj.ProjectionTrainer(model).train().training_los  # wrong
    hfproj.SpectrumCallback(dataset=7)  # wrong
    to_rgb_tensor(7)  # wrong
    IndexedDataset(7)  # wrong
    IndexedDataset(stream())  # wrong
    RotatedImages(7)  # wrong
    CorruptedDataset(7, "fog", 3)  # wrong
    DigitsOnImages(7)  # wrong
    SpuriousMixture(7, classes=(0, 1))  # wrong
    FineTuneProbe().fit(model, 7)  # wrong
    FineTuneProbe().predict(7)  # wrong
    FineTuneProbe().score(7)  # wrong


def wrong_words(model: PeftModel, dataset: torch.utils.data.Dataset, x: torch.Tensor) -> None:
    hfproj.ProjectionHeadConfig(trainable="adaptor")  # wrong
    hfproj.ProjectionHeadConfig(trainable=0.5)  # wrong
    hfproj.ProjectionHeadConfig(pooling="clz")  # wrong
    hfproj.CollapseCallback(action="explode")  # wrong
    hfproj.SpectrumCallback(metrics=["rankmee"])  # wrong
    hfproj.evaluate(model, test=dataset, when="during")  # wrong
    hfproj.evaluate(model, test=dataset, labels="none")  # wrong
    hfproj.extract_features(model, dataset, pooling="average")  # wrong
    hfproj.load_backbone("x", library="torchvision")  # wrong
    hfproj.export_onnx(model, "x.onnx", part="tail")  # wrong
    hfproj.EvalImages(size=8, mean=[0.5], std=[0.5], interpolation="area")  # wrong
    hfproj.regularizers.Weighted(nn.Identity(), 0.1, schedule="step")  # wrong
    MLPHead(in_dim=8, norm="instance")  # wrong
    MLPHead(in_dim=8, activation="swish")  # wrong
    NTXent(tile_rows="all")  # wrong
    KoLeo(on="x")  # wrong
    FineTuneProbe(precision="int8")  # wrong
    effective_rank(x, on="values")  # wrong
    extreme_eigenvalues(lambda v: v, 8, method="qr")  # wrong
    DigitsOnImages([{"image": x}], place="left")  # wrong
    Measurement("knn", "h", "during", 0.9)  # wrong


def wrong_keywords(model: PeftModel, dataset: torch.utils.data.Dataset) -> None:
    hfproj.ProjectionTrainer(model, foo=None)  # wrong
    hfproj.ProjectionTrainer(model, traindataset=None)  # wrong
    hfproj.ProjectionTrainer(model, compute_metrics=None)  # wrong
    hfproj.ProjectionTrainer(model, train_dataset=dataset, foo=3)  # wrong
