"""Collators of sentences: the same sentence read several times under dropout (SimCSE), or a sentence with its pair.

References:
    Gao, Yao, Chen 2021, "SimCSE", arXiv 2104.08821, sections 3 and 4; princeton-nlp/SimCSE ``train.py``.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch

from hfproj.backbones import source_of
from hfproj.errors import UsageError


class TextViews:
    """Collator: a list of items → ``{"views", "index", "labels"?}``, each view a dict of the tokenizer's tensors.

    One column makes `num_views` equal views of each sentence, which dropout tells apart: the model must be in training
    mode, as a trainer has it. Several columns make one view each: a sentence and its paraphrase, and as a third
    a hard negative.

    Args:
        tokenizer: A tokenizer of `transformers`.
        columns: Entry of an item that holds the sentence, or several of them.
        num_views: Views of each sentence, for one column.
        max_length: Tokens at most; what is longer is cut.
        label_column: Entry that holds the class number; None for no labels.

    Raises:
        UsageError: options that contradict each other; on call, items without a column, or with something else than
            text there.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        columns: str | Sequence[str] = "text",
        num_views: int = 2,
        max_length: int = 32,
        label_column: str | None = "label",
    ):
        self.columns = [columns] * num_views if isinstance(columns, str) else list(columns)
        if not self.columns or max_length < 1:
            raise UsageError(
                f"TextViews needs at least one view and one token, got columns={columns!r}, num_views={num_views}, "
                f"max_length={max_length}."
            )
        self.tokenizer, self.max_length, self.label_column = tokenizer, max_length, label_column

    @classmethod
    def for_model(cls, model: Any, **options: Any) -> "TextViews":
        """Return a collator with the tokenizer of the model's backbone; `options` go to the class.

        Raises:
            UsageError: the backbone's files have no tokenizer, or it is not known where they are.
        """
        return cls(tokenizer_of(model), **options)

    def __call__(self, items: Sequence[dict]) -> dict[str, Any]:
        """Return the batch of `items`, dicts of an `hfproj.IndexedDataset`."""
        texts = [text for column in self.columns for text in _texts(items, column)]
        # All views together, so that they have one length and share a forward pass.
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        views = [
            {name: rows[i * len(items) : (i + 1) * len(items)] for name, rows in tokens.items()}
            for i in range(len(self.columns))
        ]
        batch: dict[str, Any] = {"views": views}
        if all("index" in item for item in items):
            batch["index"] = torch.tensor([operator.index(item["index"]) for item in items], dtype=torch.int64)
        return {**batch, **_labels(items, self.label_column)}


class EvalText:
    """Collator of sentences for evaluation: a list of items → ``{"inputs", "index", "labels"}``.

    Args:
        tokenizer: A tokenizer of `transformers`.
        column: Entry of an item that holds the sentence.
        max_length: Tokens at most.
        label_column: Entry that holds the class number; None for no labels.

    Raises:
        UsageError: on call, items without the column, or with something else than text there.
    """

    def __init__(
        self, tokenizer: Any, *, column: str = "text", max_length: int = 128, label_column: str | None = "label"
    ):
        self.tokenizer, self.column = tokenizer, column
        self.max_length, self.label_column = max_length, label_column

    @classmethod
    def for_model(cls, model: Any, **options: Any) -> "EvalText":
        """Return a collator with the tokenizer of the model's backbone; `options` go to the class.

        Raises:
            UsageError: the backbone's files have no tokenizer, or it is not known where they are.
        """
        return cls(tokenizer_of(model), **options)

    def __call__(self, items: Sequence[dict]) -> dict[str, Any]:
        """Return the batch of `items`."""
        tokens = self.tokenizer(
            _texts(items, self.column), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        batch: dict[str, Any] = {"inputs": dict(tokens)}
        if all("index" in item for item in items):
            batch["index"] = torch.tensor([operator.index(item["index"]) for item in items], dtype=torch.int64)
        return {**batch, **_labels(items, self.label_column)}


def tokenizer_of(model: Any) -> Any:
    """Return the tokenizer that lies beside the files of the model's backbone.

    Raises:
        UsageError: there is none, or it is not known where they are.
    """
    from transformers import AutoTokenizer

    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    source = source_of(backbone)
    cure = "pass one: hfproj.TextViews(tokenizer, …)"
    if source is None:
        raise UsageError(f"It is not known where {type(backbone).__name__} came from, hence not its tokenizer; {cure}.")
    try:
        return AutoTokenizer.from_pretrained(source["id"])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{source['id']} has no tokenizer that transformers can load ({error}); {cure}.") from error


def _texts(items: Sequence[dict], column: str) -> list[str]:
    for item in items:
        if column not in item:
            raise UsageError(
                f"An item has no {column!r}, only {', '.join(map(repr, item))}; name the column of the text."
            )
        if not isinstance(item[column], str):
            raise UsageError(f"{column!r} holds a {type(item[column]).__name__}, expected a string.")
    return [item[column] for item in items]


def _labels(items: Sequence[dict], column: str | None) -> dict[str, Any]:
    if column is None or not all(column in item for item in items):
        return {}
    return {"labels": torch.tensor([int(item[column]) for item in items], dtype=torch.int64)}
