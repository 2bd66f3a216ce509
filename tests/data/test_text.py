"""Sentences as views: tokens, padding, columns, SimCSE through the trainer, and what is refused."""

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import hfproj
from hfproj import UsageError

WORDS = ["[PAD]", "[UNK]", "a", "bird", "cat", "dog", "runs", "sings", "sleeps"]
SENTENCES = [f"a {animal} {verb}" for animal in ("bird", "cat", "dog") for verb in ("runs", "sings", "sleeps")]
ITEMS = [
    {"text": s, "positive": s + " a", "negative": "a", "label": i % 3, "index": i} for i, s in enumerate(SENTENCES)
]


def tokenizer():
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")


def bert(**options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return get_peft_model(BertModel(config, add_pooling_layer=False), hfproj.ProjectionHeadConfig(**options))


def test_one_column_gives_equal_views_and_several_give_one_each():
    batch = hfproj.TextViews(tokenizer())(ITEMS)
    a, b = batch["views"]
    assert a["input_ids"].tolist()[0] == [WORDS.index(word) for word in ("a", "bird", "runs")]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert batch["index"].tolist() == list(range(9))
    assert batch["labels"].tolist() == [0, 1, 2] * 3
    views = hfproj.TextViews(tokenizer(), columns=("text", "positive", "negative"))(ITEMS)["views"]
    assert [tuple(view["input_ids"].shape) for view in views] == [(9, 4)] * 3  # padded alike: one forward pass
    assert [view["attention_mask"][0].tolist() for view in views] == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert hfproj.TextViews(tokenizer(), max_length=2)(ITEMS)["views"][0]["input_ids"].shape == (9, 2)


def test_evaluation_gives_each_sentence_once():
    model = bert(trainable="head", head="simcse", pooling="mean")
    features = hfproj.extract_features(model, ITEMS, collator=hfproj.EvalText(tokenizer()), batch_size=4)
    assert features.h.shape == (9, 16)
    alone = hfproj.extract_features(model, ITEMS[:1], collator=hfproj.EvalText(tokenizer()))
    torch.testing.assert_close(features.h[:1], alone.h)  # padding does not count
    assert features.labels.tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize("columns", ["text", ("text", "positive", "negative")])
def test_simcse_trains_on_sentences(tmp_path, columns):
    model = bert(trainable="full", head="simcse")
    hard = columns != "text"
    args = hfproj.ProjectionTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=9, learning_rate=1e-2, logging_steps=1.0,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    run = hfproj.ProjectionTrainer(
        model,
        args,
        objective={"name": "simcse", "hard_negatives": hard},
        train_dataset=ITEMS,
        data_collator=hfproj.TextViews(tokenizer(), columns=columns),
    )
    run.train()
    logs = [entry for entry in run.state.log_history if "batch_positive_cosine_h" in entry]
    assert len(logs) == 3
    assert logs[0]["batch_positive_cosine_h"] < 0.9999  # dropout makes the views differ
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in logs)


def test_labels_that_are_no_class_numbers_are_refused():
    scores = [{**item, "label": 3.8} for item in ITEMS]  # of sentence similarity: they would lose their fractions
    for collate in (hfproj.TextViews(tokenizer()), hfproj.EvalText(tokenizer())):
        with pytest.raises(UsageError, match=r"must hold class numbers, got float 3\.8.*label_column=None"):
            collate(scores)
    assert "labels" not in hfproj.TextViews(tokenizer(), label_column=None)(scores)


def test_what_is_refused(tmp_path):
    views = hfproj.TextViews(tokenizer())
    with pytest.raises(UsageError, match=r"no 'text', only 'sentence'; name the column"):
        views([{"sentence": "a cat"}])
    with pytest.raises(UsageError, match="'text' holds a list, expected a string"):
        views([{"text": ["a", "cat"]}])
    with pytest.raises(UsageError, match=r"at least one view and one token, got .*num_views=0"):
        hfproj.TextViews(tokenizer(), num_views=0)
    with pytest.raises(UsageError, match="origin of BertModel is unknown"):
        hfproj.TextViews.for_model(bert())
    model = bert()
    model.get_base_model().config._name_or_path = str(tmp_path)
    model.get_base_model().name_or_path = str(tmp_path)
    with pytest.raises(UsageError, match="has no tokenizer that transformers can load"):
        hfproj.EvalText.for_model(model)


def test_texts_without_a_token_are_refused():
    items = [{**item, "text": ""} if item["index"] in (2, 7) else item for item in ITEMS]
    for collate in (hfproj.TextViews(tokenizer()), hfproj.EvalText(tokenizer())):
        with pytest.raises(UsageError, match=r"got none in row 2, 7; leave empty texts out"):
            collate(items)
    with pytest.raises(UsageError, match="got none in row 0 of a batch; leave"):
        hfproj.EvalText(tokenizer())([{"text": ""}])

    def collate(items):  # of someone else
        tokens = tokenizer()([item["text"] for item in items], padding=True, return_tensors="pt")
        return {"inputs": dict(tokens), "index": torch.tensor([item["index"] for item in items])}

    for model in (bert(), bert().get_base_model()):
        with pytest.raises(UsageError, match=r"got none in row 7; leave empty texts out"):
            hfproj.extract_features(model, items[3:], collator=collate, batch_size=3)


def test_the_tokenizer_of_the_backbone_is_taken(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    model = bert()
    model.get_base_model().save_pretrained(tmp_path)
    loaded = get_peft_model(hfproj.load_backbone(str(tmp_path)), hfproj.ProjectionHeadConfig(pooling="mean"))
    expected = hfproj.TextViews(tokenizer())(ITEMS)["views"][0]["input_ids"]
    assert torch.equal(hfproj.TextViews.for_model(loaded)(ITEMS)["views"][0]["input_ids"], expected)
