"""`hfproj embed`: what it writes is what extract_features gives, and an interrupted one goes on."""

import json
import os
import sys

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import hfproj
from hfproj.commands import program


@pytest.fixture
def embed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def call(*words):
        monkeypatch.setattr("sys.argv", ["hfproj", "embed", *map(str, words)])
        program.main()

    return call


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed") / "adapter"
    torch.manual_seed(0)
    model = get_peft_model(hfproj.load_backbone("vit_nano"), hfproj.ProjectionHeadConfig(head="linear", out_dim=5))
    model.save_pretrained(folder)
    return folder, model


def test_h_and_z_as_files(embed, adapter, tmp_path, capsys):
    folder, model = adapter
    digits = hfproj.load_image_dataset("digits", split="test", limit=20)
    expected = hfproj.extract_features(model, digits)
    embed(folder, "digits", "--split", "test", "--limit", 20, "--what", "z", "--out", "z.npy")
    assert capsys.readouterr().out.startswith("Wrote z, 20 × 5 float32, to z.npy (")
    np.testing.assert_allclose(np.load("z.npy"), expected.z, atol=1e-5)
    embed(folder, "digits", "--split", "test", "--limit", 20, "--dtype", "float16", "--out", "new/h.parquet")
    table = pq.read_table("new/h.parquet")
    assert table.column_names == ["label", "h"]
    assert table["label"].to_pylist() == digits["label"]
    np.testing.assert_allclose(np.stack(table["h"].to_numpy()), expected.h, atol=2e-3)
    about = json.loads(table.schema.metadata[b"hfproj"])
    assert (about["data"], about["split"], about["versions"]["hfproj"]) == ("digits", "test", hfproj.__version__)
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"z.npy", "new"}
    assert os.listdir("new") == ["h.parquet"]


def test_images_that_cannot_be_read_are_named_or_left_out(embed, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        embed("vit_nano", "images")
    assert "error: Item 1 of the data set cannot be read (UnidentifiedImageError" in capsys.readouterr().err
    embed("vit_nano", "images", "--on_bad_image", "skip")
    assert "1 image can't be read and is left out: Item 1 of the data set" in capsys.readouterr().out
    assert pq.read_table("embeddings.parquet")["file"].to_pylist() == ["0.png", "2.png"]


def test_images_of_a_folder_keep_their_names(embed, tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), name if name == "blue" else "red").save(tmp_path / "images" / name / f"{name}.png")
    embed("vit_nano", "images")
    rows = pq.read_table("embeddings.parquet").to_pylist()
    assert [(row["file"], row["label"]) for row in rows] == [(f"{n}/{n}.png", i) for i, n in enumerate("abc")]


def test_texts(embed, tmp_path, capsys):
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "cat", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained("bert")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=6, pad_token_id=0, **small)
    BertModel(config, add_pooling_layer=False).save_pretrained("bert")
    (tmp_path / "notes.txt").write_text("a cat\na dog\n" + "a cat " * 20 + "\n")  # the last is longer than 6 positions
    embed("bert", "notes.txt", "--out", "notes.npy")
    texts = datasets.Dataset.from_dict({"text": (tmp_path / "notes.txt").read_text().splitlines()})
    model = hfproj.load_backbone("bert")
    expected = hfproj.extract_features(model, texts, collator=hfproj.EvalText.for_model(model, max_length=6)).h
    np.testing.assert_allclose(np.load("notes.npy"), expected, atol=1e-6)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        embed("bert", "notes.txt", "--out", "other.npy", "--on_bad_image", "skip")
    assert "--on_bad_image skip has no effect on texts; leave it out." in capsys.readouterr().err
    (tmp_path / "pairs.csv").write_text("words,label\na cat,1\na dog,0\n")
    embed("bert", "pairs.csv", "--text_column", "words")
    table = pq.read_table("embeddings.parquet")
    assert table["label"].to_pylist() == [1, 0]
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    for words, said in (
        (["bert", "pairs.csv", "--out", "x.npy"], "'pairs.csv' has no column 'text' (--text_column)"),
        (["bert", "digits", "--out", "x.npy"], "to be texts, which 'bert' reads, got 'digits', images"),
        (
            ["bert", "pictures", "--out", "x.npy"],
            "to be texts, which 'bert' reads, got 'pictures', images",
        ),
        (["bert", "bert/model.safetensors", "--out", "x.npy"], "Expected texts in one of .txt, .csv"),
    ):
        with pytest.raises(SystemExit):
            embed(*words)
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupted_one_goes_on(embed, tmp_path, monkeypatch, capsys):
    """600 items are three shards; the second start computes the last one only."""
    taken = []
    call = hfproj.EvalImages.__call__

    def counted(self, items):
        taken.append(len(items))
        if sum(taken) > 540 and len(taken) < 10:
            taken.extend([0] * 10)
            raise KeyboardInterrupt
        return call(self, items)

    monkeypatch.setattr(hfproj.EvalImages, "__call__", counted)
    words = ("vit_nano", "digits", "--limit", 600, "--batch_size", 128, "--out", "h.npy")
    with pytest.raises(SystemExit) as end:
        embed(*words)
    assert end.value.code == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("interrupted: the same command goes on after the last part that was whole (a part has 256")
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {".h.npy.partial"}
    taken[:] = [0] * 10
    embed(*words)
    assert sum(taken) == 600 - 512
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"h.npy"}
    digits = hfproj.load_image_dataset("digits", limit=600).select(range(500, 600))
    features = hfproj.extract_features(hfproj.load_backbone("vit_nano"), digits)
    np.testing.assert_allclose(np.load("h.npy")[500:], features.h, atol=1e-5)


def test_mistakes(embed, adapter, tmp_path, capsys):
    (tmp_path / "there.npy").write_bytes(b"mine")
    for words, said in (
        (["vit_nano", "digits", "--out", "there.npy"], "got 'there.npy', which exists; add --overwrite"),
        (["vit_nano", "digits", "--what", "z"], "Expected an adapter for --what z, got the backbone 'vit_nano'"),
        (["vit_nano", "digits", "--device", "tpu9"], "Expected --device to be a device of torch's, got 'tpu9'"),
        (
            ["vit_nano", "digits", "--device", "cuda:99"],
            "--device to be a device of this machine, got 'cuda:99'",
        ),
        (["vit_nano", "nowhere/at/all"], "There is no file or folder 'nowhere/at/all'"),
        ([adapter[0], "digits", "--pooling", "mean"], "--pooling is of bare backbones"),
    ):
        with pytest.raises(SystemExit) as end:
            embed(*words)
        assert end.value.code == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "there.npy").read_bytes() == b"mine"
    embed("vit_nano", "digits", "--limit", 3, "--out", "there.npy", "--overwrite")
    assert np.load("there.npy").shape == (3, 128)
    assert "torch" in sys.modules
