"""Collators of sentences: the same sentence read several times under dropout (SimCSE), or a sentence with its pair.

References:
    Gao, Yao, Chen 2021, "SimCSE", arXiv 2104.08821, sections 3 and 4; princeton-nlp/SimCSE ``train.py``.
"""

import inspect
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hfproj.backbones.loading import bare_backbone, files_of, main_input_of, timm_part_of
from hfproj.backbones.pooling import check_texts
from hfproj.backbones.wrong_inputs import positions_of
from hfproj.checking import checked
from hfproj.data.indexing import check_items, index_and_labels
from hfproj.errors import UsageError

Made = TypeVar("Made", bound="_Sentences")
# Characters that are read for each token that is kept: tokenizers read a text to its end before they cut it, and ten
# megabytes take half a minute. Tokens have about four characters; the longest of usual vocabularies have 128.
_CHARACTERS = 256
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Sentences:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, label_column: str | None):
        who = type(self).__name__
        if isinstance(tokenizer, str):
            how = f"AutoTokenizer.from_pretrained({tokenizer!r})"
            raise UsageError(f"Expected tokenizer of {who} to be a tokenizer, got {tokenizer!r}; load it: {how}.")
        if isinstance(tokenizer, nn.Module) or not callable(tokenizer):
            how = f"{who}.for_model(model) finds the model's, if its files have one"
            raise UsageError(f"Expected tokenizer of {who} to be a tokenizer, got {type(tokenizer).__name__}; {how}.")
        if max_length < 1:
            raise UsageError(f"{who} needs at least one token, got max_length={max_length}.")
        self.tokenizer, self.max_length, self.label_column = tokenizer, max_length, label_column

    @classmethod
    def for_model(cls: type[Made], model: nn.Module, **options: Any) -> Made:
        """Return a collator with the model's tokenizer, or raise as `tokenizer_of`; `options` go to the class.

        Texts are cut at the last position that the backbone knows, if that is less than the class's own `max_length`.
        """
        tokenizer, most = tokenizer_of(model), positions_of(bare_backbone(model))
        if most is not None and most < inspect.signature(cls).parameters["max_length"].default:
            options.setdefault("max_length", most)
        return cls(tokenizer, **options)

    def _tokens(self, items: Sequence[dict], columns: Sequence[str]) -> Any:
        """Return the tokens of the sentences, column after column, padded to one length."""
        if isinstance(items, list | tuple) and items and isinstance(items[0], str):
            raise UsageError("Expected items as a list of dicts, got a list of str; write [{'text': …}, …].")
        check_items(items)
        for item in items:
            for column in columns:
                if column not in item:
                    hint = f"name the column of the text: {'columns' if hasattr(self, 'columns') else 'column'}=…"
                    raise UsageError(f"An item has no {column!r}, only {', '.join(map(repr, item))}; {hint}.")
                if not isinstance(item[column], str):
                    raise UsageError(f"{column!r} holds a {type(item[column]).__name__}, expected a string.")
        longest = _CHARACTERS * self.max_length
        texts = [item[column][:longest] for column in columns for item in items]
        for place, text in enumerate(texts):
            if not text.isascii() and _SURROGATE.search(text):
                item = items[place % len(items)]
                where = f" of item {item['index']} of the data set" if "index" in item else ""
                raise UsageError(
                    f"Column {columns[place // len(items)]!r}{where} holds half a character (a surrogate), which is no "
                    "text: it was decoded wrongly. Clean it: text.encode('utf-8', 'replace').decode()."
                )
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        known = all("index" in item for item in items)
        check_texts(tokens.get("attention_mask"), [item["index"] for item in items] if known else None)
        return tokens


class TextViews(_Sentences):
    """Collator: a list of items → ``{"views", "index", "labels"?}``, each view a dict of the tokenizer's tensors.

    One column makes `num_views` equal views of each sentence, which dropout tells apart: the model must be in training
    mode, as a trainer has it. Several columns make one view each: a sentence and its paraphrase, and as a third
    a hard negative.

    Args:
        tokenizer: A tokenizer of `transformers`.
        columns: Entry of an item that holds the sentence, or several of them.
        num_views: Views of each sentence, for one column.
        max_length: Tokens at most, no more than the backbone has positions for (77 in CLIP, 512 in BERT); what is
            longer is cut, before it is read to its end: at 256 characters a token.
        label_column: Entry that holds the class number; None for no labels.

    Raises:
        UsageError: If there would be no view or no token; on call, if an item lacks a column, or has something else
            than text there.
    """

    @checked
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, columns: str | Sequence[str] = "text", num_views: int = 2,
        max_length: int = 32, label_column: str | None = "label",
    ):  # fmt: skip
        super().__init__(tokenizer, max_length, label_column)
        self.columns = [columns] * num_views if isinstance(columns, str) else list(columns)
        if not self.columns or max_length < 1:
            given = f"got columns={columns!r}, num_views={num_views}, max_length={max_length}"
            raise UsageError(f"TextViews needs at least one view and one token, {given}.")

    def __call__(self, items: Sequence[dict]) -> dict[str, Any]:
        """Return the batch of `items`, dicts of an `hfproj.IndexedDataset`."""
        tokens = self._tokens(items, self.columns)  # all views together: of one length, they share a forward pass
        rows = [slice(i * len(items), (i + 1) * len(items)) for i in range(len(self.columns))]
        views = [{name: tensor[part] for name, tensor in tokens.items()} for part in rows]
        return {"views": views, **index_and_labels(items, self.label_column)}


class EvalText(_Sentences):
    """Collator of sentences for evaluation: a list of items → ``{"inputs", "index", "labels"}``.

    Args:
        tokenizer, max_length, label_column: As in `TextViews`.
        column: Entry of an item that holds the sentence.

    Raises:
        UsageError: On call, if an item lacks the column, or has something else than text there.
    """

    @checked
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, column: str = "text", max_length: int = 128,
        label_column: str | None = "label",
    ):  # fmt: skip
        super().__init__(tokenizer, max_length, label_column)
        self.column = column

    def __call__(self, items: Sequence[dict]) -> dict[str, Any]:
        """Return the batch of `items`."""
        return {"inputs": dict(self._tokens(items, [self.column])), **index_and_labels(items, self.label_column)}


@checked
def tokenizer_of(model: nn.Module) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies beside the files of the model's backbone.

    Raises:
        UsageError: If it is not known where these files are, or they have no tokenizer.
    """
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    source = files_of(backbone)
    if main_input_of(backbone) == "pixel_values" or timm_part_of(backbone) is not None:
        what = "hfproj.ImageViews.for_model(model) to train, hfproj.EvalImages.for_model(model) to measure"
        raise UsageError(f"{type(backbone).__name__} reads images and has no tokenizer; take {what}.")
    hint = "pass one: hfproj.TextViews(tokenizer, …)"
    if source is None:
        raise UsageError(f"The origin of {type(backbone).__name__} is unknown, and with it its tokenizer; {hint}.")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"{source} has no tokenizer that transformers can load ({error}); {hint}.") from error
