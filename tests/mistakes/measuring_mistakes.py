"""Mistakes in evaluation, probes, features, diagnostics and results: name → (call, words of its one line …)."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from mistakes.things import (
    TEXTS,
    backbone,
    data,
    eval_images,
    evaluate,
    images,
    model,
    results,
    splits,
    text_model,
    tokenizer,
    views,
    x,
)  # fmt: skip
from torch.utils.data import DataLoader

import hfproj
from hfproj import diagnostics, plots
from hfproj.reporting import write_image_pictures, write_text_pictures
from hfproj.results import Measurement
from hfproj.studies.head_geometry.study import Study
from hfproj.studies.pooled import pooled_interval

Y = torch.arange(8) % 2
NAMES = [{**item, "label": "cat"} for item in images(8)]
NO_GPU = "mps" if torch.cuda.is_available() else "cuda"
LABELLED, UNLABELLED = images(8), images(8, labels=False)
EVALUATE = {
    "evaluate: data by position": (lambda: hfproj.evaluate(model(), LABELLED, LABELLED), "train=…", "test=…"),
    "evaluate: the test set by position": (lambda: hfproj.evaluate(model(), LABELLED), "test=…"),
    "evaluate: no test set": (lambda: hfproj.evaluate(model(), train=LABELLED), "test=…"),
    "evaluate: swapped": (lambda: hfproj.evaluate(LABELLED, test=model()), "model", "list"),
    "evaluate: a probe without a training set": (lambda: evaluate(probes="knn", train=...), "train=…"),
    "evaluate: labelled test set, no training set": (lambda: evaluate(train=...), "train=…"),
    "evaluate: a training set without labels": (lambda: evaluate(probes="knn", train=UNLABELLED), "'label'"),
    "evaluate: a test set without labels": (lambda: evaluate(probes="knn", test=UNLABELLED), "'label'"),
    "evaluate: misspelt probe": (lambda: evaluate(probes="kkn"), "Did you mean 'knn'?"),
    "evaluate: probe in capitals": (lambda: evaluate(probes="kNN"), "Did you mean 'knn'?"),
    "evaluate: scikit-learn's word": (lambda: evaluate(probes="logistic_regression"), "Did you mean 'linear'?"),
    "evaluate: probes with a comma": (lambda: evaluate(probes="knn,linear"), "['knn', 'linear']"),
    "evaluate: probe's class": (lambda: evaluate(probes=hfproj.KNNProbe), "KNNProbe()"),
    "evaluate: options by name": (lambda: evaluate(probes={"knn": {"k": 5}}), "{'name': 'knn', 'k': 5}"),
    "evaluate: a number as probe": (lambda: evaluate(probes=5), "{'name': 'knn', 'k': 10}"),
    "evaluate: `probe`": (lambda: evaluate(probe="knn"), "Did you mean 'probes'?"),
    "evaluate: `dataset` for the test set": (
        lambda: hfproj.evaluate(model(), dataset=LABELLED, test=LABELLED, collator=eval_images(), train=LABELLED),
        "the name of the data set", "test=…"),
    "evaluate: all splits": (lambda: evaluate(test=splits()), "['test']"),
    "evaluate: name of a data set": (lambda: evaluate(test="digits"), "load_image_dataset('digits'"),
    "evaluate: a loader": (lambda: evaluate(test=DataLoader(LABELLED)), "DataLoader"),
    "evaluate: a stream": (lambda: evaluate(test=iter(LABELLED)), "list"),
    "evaluate: nothing to measure": (lambda: evaluate(test=[]), "empty"),
    "evaluate: column of labels": (lambda: evaluate(labels="label"), "labels='auto'", "label_column"),
    "evaluate: the labels themselves": (lambda: evaluate(labels=[0, 1] * 4), "labels='auto'", "label_column"),
    "evaluate: labels that are names": (lambda: evaluate(test=NAMES), "class numbers"),
    "evaluate: the last layer in words": (lambda: evaluate(layers="last"), "'last'", "layers=[-1]"),
    "evaluate: a GPU that is not there": (lambda: evaluate(device=NO_GPU), NO_GPU, "use 'cpu'"),
    "evaluate: layers as one name": (lambda: evaluate(layers="layers.0"), "layers=['layers.0']"),
    "evaluate: one layer's number": (lambda: evaluate(layers=1), "layers=[1]"),
    "evaluate: a block that is not there": (lambda: evaluate(layers=[99]), "99"),
    "evaluate: a layer that the head has not": (lambda: evaluate(layers=["head.9"]), "head.9", "head.0"),
    "evaluate: a layer of the head as one name": (lambda: evaluate(layers="head.0"), "layers=['head.0']"),
    "evaluate: layers of a head that is not there": (lambda: evaluate(backbone(), layers="head"), "an active head",
                                                     "attach"),
    "evaluate: when='trained'": (lambda: evaluate(when="trained"), "'before'", "'after'"),
    "evaluate: a collator of views": (lambda: evaluate(collator=views()), "EvalImages"),
    "evaluate: a collator of pixels as views": (lambda: evaluate(views=eval_images()), "ImageViews"),
    "evaluate: collator's class": (lambda: evaluate(collator=hfproj.EvalImages), "EvalImages.for_model(model)"),
    "evaluate: texts to an image model": (lambda: evaluate(collator=hfproj.EvalText(tokenizer()), test=TEXTS,
                                                           train=TEXTS), "input_ids", "pixel_values"),
    "evaluate: a text model without a collator": (
        lambda: evaluate(text_model(), collator=None, test=TEXTS, train=TEXTS), "EvalText"),
    "evaluate: images to a text model": (lambda: evaluate(text_model()), "pixel_values", "EvalText"),
    "evaluate: batches of 0": (lambda: evaluate(batch_size=0), "batch_size"),
    "evaluate: device='gpu'": (lambda: evaluate(device="gpu"), "'cuda'"),
    "evaluate: images in another column": (
        lambda: evaluate(test=[{"img": i["image"], "label": 0} for i in LABELLED]), "image_column"),
    "evaluate: not a folder for the cache": (lambda: evaluate(cache_dir=True), "cache_dir"),
    "evaluate: fewer rows than neighbours, by text": (lambda: evaluate(probes={"name": "knn", "k": "5"}), "k", "'5'"),
}  # fmt: skip
PROBES = {
    "probe: k by position": (lambda: hfproj.KNNProbe(20), "k=…"),
    "probe: scikit-learn's word for k": (lambda: hfproj.KNNProbe(n_neighbors=20), "n_neighbors", "k"),
    "probe: k=0": (lambda: hfproj.KNNProbe(k=0), "k", "0"),
    "probe: k as text": (lambda: hfproj.KNNProbe(k="20").fit(x(8, 4), Y).score(x(8, 4), Y), "k", "'20'"),
    "probe: scored before it is fitted": (lambda: hfproj.KNNProbe().score(x(8, 4), Y), "fit"),
    "probe: labels first": (lambda: hfproj.KNNProbe().fit(Y, x(8, 4)), "features"),
    "probe: labels of other rows": (lambda: hfproj.KNNProbe().fit(x(8, 4), Y[:7]), "8", "7"),
    "probe: no labels": (lambda: hfproj.KNNProbe().fit(x(8, 4)), "y=…"),
    "probe: numpy": (lambda: hfproj.KNNProbe().fit(np.zeros((8, 4)), Y), "ndarray", "tensor"),
    "probe: features of two widths": (lambda: hfproj.KNNProbe(k=3).fit(x(8, 4), Y).score(x(8, 5), Y), "4", "5"),
    "probe: what extract_features gives": (
        lambda: hfproj.KNNProbe().fit(hfproj.extract_features(model(), LABELLED, collator=eval_images()), Y),
        "Features", ".h"),
    "probe: a model": (lambda: hfproj.KNNProbe().fit(model(), LABELLED), "features"),
    "probe: names as labels": (lambda: hfproj.KNNProbe().fit(x(8, 4), ["a", "b"] * 4), "class numbers"),
    "probe: NaN": (lambda: hfproj.KNNProbe(k=3).fit(x(8, 4) * torch.nan, Y).score(x(8, 4), Y), "finite"),
}  # fmt: skip
FEATURES = {
    "features: swapped": (lambda: hfproj.extract_features(LABELLED, model()), "model", "list"),
    "features: no data": (lambda: hfproj.extract_features(model()), "dataset"),
    "features: a loader": (lambda: hfproj.extract_features(model(), DataLoader(LABELLED)), "DataLoader"),
    "features: pixels instead of items": (
        lambda: hfproj.extract_features(model(), x(8, 3, 16, 16), collator=torch.stack), "pixel_values"),
    "features: type as text": (
        lambda: hfproj.extract_features(model(), LABELLED, collator=eval_images(), dtype="float16"), "torch.float16"),
    "features: pooling by another name": (
        lambda: hfproj.extract_features(model(), LABELLED, collator=eval_images(), pooling="avg"), "pooling"),
    "features: cache with an own collator": (
        lambda: hfproj.extract_features(model(), LABELLED, collator=lambda items: eval_images()(items),
                                        cache_dir="/tmp/none"), "preprocessing_key"),
    "features: heads trained on features that change": (
        lambda: hfproj.FeatureBackbone.of(model().get_base_model()), "peft"),
    "rankme: a model": (lambda: diagnostics.rankme(model()), "features", "extract_features"),
    "rankme: what extract_features gives": (
        lambda: diagnostics.rankme(hfproj.extract_features(model(), LABELLED, collator=eval_images())), ".h"),
    "rankme: one row": (lambda: diagnostics.rankme(x(1, 8)), "row"),
    "rankme: views": (lambda: diagnostics.rankme(x(2, 8, 4)), "[rows, dim]"),
    "rankme: whole numbers": (lambda: diagnostics.rankme(torch.ones(8, 4, dtype=torch.long)), "int64"),
    "rankme: numpy": (lambda: diagnostics.rankme(np.zeros((8, 4))), "ndarray", "tensor"),
    "alignment: rows": (lambda: diagnostics.alignment(x(8, 4)), "views"),
}  # fmt: skip
INSIDE = {
    "autopsy: a backbone without a head": (lambda: hfproj.autopsy(backbone(), train=LABELLED, test=LABELLED),
                                           "active projection head", "attach"),
    "autopsy: data without labels": (
        lambda: hfproj.autopsy(model(), train=UNLABELLED, test=UNLABELLED, collator=eval_images()),
        "labels in `train`"),
    "autopsy: a folder that is not there": (
        lambda: hfproj.autopsy("/none/there", train=LABELLED, test=LABELLED), "/none/there"),
    "autopsy: without train": (lambda: hfproj.autopsy(model(), test=LABELLED), "train=…"),
    "autopsy: a collator that makes no views": (
        lambda: hfproj.autopsy(model(), train=LABELLED, test=LABELLED, views=eval_images()), "ImageViews"),
    "invariance report: a collator that makes no views": (
        lambda: hfproj.invariance_report(model(), LABELLED, eval_images()), "ImageViews"),
    "invariance report: few images": (lambda: hfproj.invariance_report(model(), LABELLED[:3], views()), "16 images"),
    "cut_head: a number": (lambda: hfproj.cut_head(model(), 0), "layer", "0"),
    "cut_head: the last layer": (lambda: hfproj.cut_head(model(), "head.1"), "head.0", "'head.1'"),
    "cut_head: h": (lambda: hfproj.cut_head(model(), "h"), "head.0", "'h'"),
    "spectrum: h as a layer of the head": (lambda: hfproj.SpectrumCallback(layers=["h"]), "['head.0']", "h and z"),
    "plot: an autopsy of something else": (lambda: plots.plot_autopsy({"layers": 1}), "Autopsy.to_dict"),
}  # fmt: skip
RESULTS = {
    "results: a number that is not there": (lambda: results().value("linear", "h", "after"), "linear", "knn"),
    "results: an accuracy by another name": (lambda: results().value("accuracy", "h", "after"), "knn"),
    "results: a list to merge": (lambda: results().merge([results()]), "merge(*results)"),
    "results: a folder without": (lambda: hfproj.Results.load("/no/such/run"), "/no/such/run"),
    "results: before and after of other test sets": (
        lambda: _ranks("before", 64).merge(_ranks("after", 30)), "64 test rows before", "30 after", "the same rows"),
    "report: a folder without": (lambda: hfproj.report("/no/such/run"), "/no/such/run"),
    "report: a path that can't be written": (lambda: hfproj.report(_run(), path="/proc/none.html"), "/proc/none.html"),
    "pictures: of images, of texts": (
        lambda: write_image_pictures(_run(), model(), TEXTS, x(8, 4), x(8, 4)), "text", "write_text_pictures"),
    "pictures: of texts that are empty": (
        lambda: write_text_pictures(_run(), [{"text": ""}] * 8, x(8, 4), x(8, 4)), "'text'", "empty"),
    "report: the results": (lambda: hfproj.report(results()), "folder"),
    "card: swapped": (lambda: hfproj.write_card(Path("/tmp"), results()), "Results"),
    "card: no folder": (lambda: hfproj.write_card(results()), "folder"),
    "pooled_interval: a name that is not there": (
        lambda: pooled_interval({"a": [0.1, 0.2]}, "a", "b"), "values of 'b'", "['a']"),
    "pooled_interval: one seed each": (lambda: pooled_interval({"a": [0.1], "b": [0.2]}, "a", "b"), "two seeds"),
    "pooled_interval: per cent": (
        lambda: pooled_interval({"a": [51.0, 53.0], "b": [48.0]}, "a", "b", rows=100), "fractions", "52.0"),
    "a study: what was not run": (
        lambda: Study("digits", Path("/tmp/none"), Path("/tmp/none")).recorded("hessian"), "results.json", "`hessian`"),
    "plot: features": (lambda: plots.plot_spectrum(x(8, 4)), "spectr"),
    "plot: the results": (lambda: plots.plot_history(results()), "Results"),
    "plot: a path that can't be written": (
        lambda: plots.plot_spectrum({"h": [3.0, 2.0]}, "/proc/none/all.png"), "/proc/none"),
    "data of evaluate: a `datasets` set of unknown columns": (
        lambda: evaluate(test=data().rename_column("image", "picture")), "image_column"),
}  # fmt: skip


def _ranks(when, rows):
    """RankMe of so many rows."""
    return hfproj.Results(measurements=[Measurement("rankme", "h", when, 3.0, protocol={"rows": rows})], seeds=[0])


def _run():
    """The folder of a run."""
    folder = Path(tempfile.mkdtemp(prefix="hfproj-mistakes-"))
    results().save(folder)
    return folder


MISTAKES = {**EVALUATE, **PROBES, **FEATURES, **INSIDE, **RESULTS}
