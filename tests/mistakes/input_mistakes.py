"""Mistakes with images, texts and data sets: name → (call, words of its one line …)."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from mistakes.things import (
    PIXELS,
    TEXTS,
    bert,
    config,
    data,
    evaluate,
    images,
    item,
    model,
    splits,
    text_model,
    tokenizer,
    train,
    trainer,
    views,
    x,
)  # fmt: skip
from peft import get_peft_model

import hfproj
from hfproj.data import StreamDataset, split_off

for_model = hfproj.ImageViews.for_model
NANO = {"size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def files(**named):
    """A folder with these files."""
    folder = Path(tempfile.mkdtemp(prefix="hfproj-mistakes-"))
    for name, content in named.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


IMAGES = {
    "views: nothing": (lambda: hfproj.ImageViews(), "size=…", "ImageViews.for_model(model)"),
    "views: the size alone": (lambda: hfproj.ImageViews(size=32), "mean=…", "ImageViews.for_model(model)"),
    "views: the model to the class": (lambda: hfproj.ImageViews(model()), "ImageViews.for_model(model)"),
    "views: for a name": (lambda: for_model("vit_nano"), "load_backbone"),
    "views: one number as scale": (lambda: for_model(model(), scale=0.4, **NANO), "scale", "(0.4, 1.0)"),
    "views: one number as scale, of the model's own": (lambda: for_model(model(), scale=0.4), "scale", "(0.4, 1.0)"),
    "views: a percentage": (lambda: views(flip_probability=50), "flip_probability", "0 to 1"),
    "views: a range upside down": (lambda: views(scale=(1.0, 0.4)), "scale", "low"),
    "views: torchvision's name of an option": (lambda: views(crop_scale=0.4), "crop_scale", "scale"),
    "views: n_views": (lambda: views(n_views=4), "Did you mean 'num_views'?"),
    "views: none": (lambda: views(num_views=0), "num_views"),
    "views: text as number": (lambda: views(num_views="2"), "num_views", "'2'"),
    "views: a size of two numbers": (lambda: views(size=(16, 16)), "size", "(16, 16)"),
    "views: one mean": (lambda: views(mean=0.5, std=0.5), "mean", "0.5"),
    "views: a mean of 255": (lambda: views(mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4)), "[0, 1]", "255"),
    "views: a transform": (lambda: views(augmentation=torch.nn.Identity()), "Augmentation"),
    "views: local views without a size": (lambda: views(local_views=4), "local_size"),
    "views: local views of no patches": (lambda: for_model(model(), local_views=1, local_size=7, **NANO), "local_size"),
    "views: a batch of pixels": (lambda: views()(x()), "IndexedDataset"),
    "views: one item": (lambda: views()(item()), "list"),
    "views: items without an index": (lambda: views()([{"image": np.zeros((8, 8))}]), "IndexedDataset"),
    "views: another column": (lambda: views()([{"img": np.zeros((8, 8)), "index": 0}]), "image_column"),
    "views: a path as image": (lambda: views()([item(image="cat.png")]), "datasets.Image()"),
    "views: pixels to 255 as floats": (lambda: views()([item(image=np.full((8, 8, 3), 200.0))]), "255"),
    "views: names as labels": (lambda: views()([item(label="cat")]), "class numbers", "label_column"),
    "views: of a text model": (lambda: for_model(text_model()), "TextViews"),
    "eval images: of a text model": (lambda: hfproj.EvalImages.for_model(text_model()), "EvalText"),
    "eval images: the model to the class": (lambda: hfproj.EvalImages(model()), "EvalImages.for_model(model)"),
    "eval images: PIL's constant": (lambda: hfproj.EvalImages(**PIXELS, interpolation=3), "interpolation", "bicubic"),
    "eval images: smaller before the crop": (lambda: hfproj.EvalImages(**PIXELS, resize=8), "resize", "16"),
    "eval images: an option of views": (
        lambda: hfproj.EvalImages(**PIXELS, flip_probability=0.5), "flip_probability", "It takes"),
}  # fmt: skip
TEXT = {
    "texts: name of a tokenizer": (lambda: hfproj.TextViews("bert-base-uncased"), "AutoTokenizer.from_pretrained"),
    "texts: nothing": (lambda: hfproj.TextViews(), "tokenizer", "TextViews.for_model(model)"),
    "texts: the model": (lambda: hfproj.TextViews(text_model()), "TextViews.for_model(model)"),
    "texts: of an image model": (lambda: hfproj.TextViews.for_model(model()), "ImageViews"),
    "texts: eval of an image model": (lambda: hfproj.EvalText.for_model(model()), "EvalImages"),
    "texts: a column that is not there": (
        lambda: hfproj.TextViews(tokenizer(), columns="sentence")([{**TEXTS[0], "index": 0}]), "'text'", "columns"),
    "texts: `column` for views": (lambda: hfproj.TextViews(tokenizer(), column="text"), "Did you mean 'columns'?"),
    "texts: `columns` for evaluation": (lambda: hfproj.EvalText(tokenizer(), columns="text"), "'column'"),
    "texts: strings as items": (lambda: hfproj.EvalText(tokenizer())(["a", "b"]), "{'text': …}"),
    "texts: no token": (lambda: hfproj.TextViews(tokenizer(), max_length=0), "max_length"),
    "texts: evaluation without a token": (lambda: hfproj.EvalText(tokenizer(), max_length=0), "max_length"),
    "texts: a list of tokens": (
        lambda: hfproj.EvalText(tokenizer())([{"text": ["a", "b"]}]), "'text'", "string"),
    "texts: longer than the positions": (
        lambda: evaluate(text_model(), collator=hfproj.EvalText(tokenizer()), train=_long(), test=_long()),
        "16", "max_length=16"),
    "texts: longer than the positions, in training": (
        lambda: train(of=text_model(), data_collator=hfproj.TextViews(tokenizer(), max_length=32),
                      train_dataset=_long()), "16", "max_length=16"),
    "texts: a tokenizer of another model": (
        lambda: evaluate(get_peft_model(bert(vocabulary=3), config()), collator=hfproj.EvalText(tokenizer()),
                         train=TEXTS, test=TEXTS), "3", "tokenizer"),
    "texts: a tokenizer of another model, in training": (
        lambda: train(of=get_peft_model(bert(vocabulary=3), config()), data_collator=hfproj.TextViews(tokenizer()),
                      train_dataset=TEXTS), "3", "tokenizer"),
    "texts: a tokenizer larger than the vocabulary": (
        lambda: trainer(of=get_peft_model(bert(vocabulary=3), config()),
                        data_collator=hfproj.TextViews(tokenizer(), columns=["text", "text"]),
                        train_dataset=[{"text": "b"}] * 8, args={"neftune_noise_alpha": 1.0}),
        "4 tokens", "knows 3", "resize_token_embeddings"),
    "texts: equal views without dropout": (
        lambda: train(of=get_peft_model(bert(dropout=0.0), config()), data_collator=hfproj.TextViews(tokenizer()),
                      train_dataset=TEXTS), "dropout"),
}  # fmt: skip
DATA_SETS = {
    "data: a path that is not there": (lambda: hfproj.load_image_dataset("/no/such"), "/no/such"),
    "data: split by position": (lambda: hfproj.load_image_dataset("digits", "test"), "split=…"),
    "data: a split that is not there": (lambda: hfproj.load_image_dataset("digits", split="validation"), "test, train"),
    "data: a column that is not there": (
        lambda: hfproj.load_image_dataset("digits", image_column="img"), "img", "image"),
    "data: a list of names": (lambda: hfproj.load_image_dataset(["digits"]), "one at a time"),
    "data: a folder without images": (lambda: hfproj.load_image_dataset(str(files(a_txt=b"a"))), "image"),
    "data: an empty folder": (lambda: hfproj.load_image_dataset(str(files())), "image"),
    "data: a table of text": (lambda: hfproj.load_image_dataset(str(files(a_csv=b"a,b") / "a.csv")), "parquet"),
    "data: one image": (lambda: hfproj.load_image_dataset(str(files(a_png=b"a") / "a.png")), "folder"),
    "data: a fraction as limit": (lambda: hfproj.load_image_dataset("digits", limit=0.1), "limit", "0.1"),
    "data: no rows": (lambda: hfproj.load_image_dataset("digits", limit=0), "limit"),
    "data: misspelt": (lambda: hfproj.load_image_dataset("digit"), "Did you mean 'digits'?"),
    "data: datasets' keyword": (lambda: hfproj.load_image_dataset("digits", streaming=True), "streaming", "It takes"),
    "data: a fraction to hold out": (lambda: split_off(data(), 0.2), "0.2", "rows"),
    "data: more than there is to hold out": (lambda: split_off(data(), 8), "8"),
    "data: all splits": (lambda: hfproj.IndexedDataset(splits()), "['train']"),
    "data: an iterator": (lambda: hfproj.IndexedDataset(iter(images(8))), "StreamDataset"),
    "data: a number as stream": (lambda: StreamDataset(5), "iterate"),
    "data: a set instead of its length": (lambda: hfproj.EpochSampler(data()), "len(dataset)"),
    "data: views of nothing": (lambda: hfproj.cache_features(model(), images(8)), "views=…"),
    "data: features first": (
        lambda: hfproj.cache_features(model(), views(), images(8)), "data set"),
    "data: a corruption that is none": (
        lambda: hfproj.corrupt(x(2, 3, 16, 16), "noise", 3, index=[0, 1]), "gaussian_noise"),
    "data: severity 10": (lambda: hfproj.corrupt(x(2, 3, 16, 16), "gaussian_noise", 10, index=[0, 1]), "severity", "5"),
}  # fmt: skip


def _long():
    return [{"text": "a b " * 10, "label": i % 2} for i in range(8)]


MISTAKES = {**IMAGES, **TEXT, **DATA_SETS}
