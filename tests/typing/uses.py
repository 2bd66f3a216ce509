"""Right and wrong uses of the public API, for type checkers: exactly the lines that end in ``# wrong`` are errors.

Nothing here runs. `tests/test_typing.py` gives the file to mypy and to pyright.
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, PreTrainedModel

import hfproj
from hfproj.diagnostics import SpectrumState, lidar, rankme
from hfproj.geometry import extreme_eigenvalues, pullback_metric
from hfproj.probes import AttentiveProbe, register_probe
from hfproj.results import Measurement, paired_interval, verdicts


def right(backbone: PreTrainedModel, dataset: torch.utils.data.Dataset, x: torch.Tensor) -> None:
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
    AutoModel.from_pretrained("x"), hfproj.ImageViews.for_modl(model)  # wrong
