"""Attentive probe: what a classifier reads from all tokens, where learned queries choose how much each of them counts.

    x̂_t = LN(x_t),    a_qt = softmax_t(⟨q_q, W_k x̂_t⟩ / √d_head),    v = mean_q Σ_t a_qt (W_v x̂_t + b_v),

and logits W v + b, with the attention in heads of width d_head = dim / heads. Class tokens often say little about
what a masked-image model knows; its patch tokens say more than their mean.

References:
    V-JEPA (Bardes et al. 2024, arXiv 2404.08471), facebookresearch/jepa ``src/models/attentive_pooler.py``: one query
    of standard deviation 0.02, AdamW, a cosine to 0. AIM (El-Nouby et al. 2024, arXiv 2401.08541), apple/ml-aim
    ``AttentionPoolingClassifier``: no query projection, the mean over several queries. Psomas et al. 2025,
    arXiv 2506.10178, compare such probes.

Deviations:
    V-JEPA's block goes on with a residual MLP; here a linear classifier follows the attention, as in AIM, so that what
    is measured is in the tokens. LN has no scale and shift (W_k, W_v and b_v absorb them; AIM: BatchNorm), W_k no bias
    (the softmax does not see it). Keys and values are never formed: ⟨q, W_k x̂⟩ = ⟨W_kᵀ q, x̂⟩ and Σ a W_v x̂ = W_v Σ a x̂
    cost `heads · queries` products a token instead of 2 · dim. Settings are the same for all data; none is chosen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hfproj.checking import check_types, explained
from hfproj.errors import UsageError
from hfproj.functional.feature_rows import describe_bad_rows
from hfproj.probes.base import Classifier, check_decay, check_numbers, cosine, descend

Tokens = Float[Tensor, "rows tokens dim"] | Float[np.ndarray, "rows tokens dim"]

_READ_ELEMENTS = 2**22  # numbers read at a time where no gradient is needed: 16 MiB of float32
_LARGE = 2.0**40  # larger numbers are scaled down before their squares overflow float32; LN gives the same of them
_QUERY_STD = 0.02  # V-JEPA's and AIM's: attention starts out almost uniform


@explained
@dataclass(kw_only=True, repr=False, eq=False)
class AttentiveProbe(Classifier):
    """Accuracy of an attentive classifier on tokens ``[rows, tokens, dim]``, as an estimator of scikit-learn.

    Tokens are read a batch at a time, so that they may lie in a memory-mapped array. The order of the tokens of a row
    does not matter, and their number may differ between training and scoring.

    Args:
        heads: Heads of the attention; they divide the width.
        queries: Learned queries, whose outputs are averaged. 1 as in V-JEPA.
        epochs: Passes over the training rows. 20 as in V-JEPA.
        min_steps: Minimum number of steps: on few rows there are more epochs, since 20 would be too few to learn much.
        batch_size: Rows per step.
        learning_rate: Learning rate of AdamW at the start; a cosine takes it to 0. 1e-3 as in V-JEPA.
        weight_decay: Of W_k, W_v and W; not of queries and biases. 0.01 as in V-JEPA.
        seed: Seed of the initial weights and of the order of the rows.
        device: Where to train; None: where the tokens are.

    Attributes:
        classes_: `[classes]` labels, sorted.
        results_: After scoring: `{"value": accuracy, "protocol": {…}}`.
        correct_: After scoring: `[rows]` bool, for `paired_interval`.

    Raises:
        UsageError: If a number is below 1, the learning rate is not positive or the weight decay is negative.

    Example (a vector and its negative among the tokens make the class, and the mean of the tokens is always 0):
        >>> generator = torch.Generator().manual_seed(0)
        >>> u, noise = torch.randn(2, 8, generator=generator), torch.randn(96, 8, generator=generator)
        >>> y = torch.arange(96) % 2
        >>> x = torch.stack([u[y], -u[y], noise, -noise], 1)
        >>> probe = AttentiveProbe(heads=2, learning_rate=1e-2, batch_size=16)
        >>> probe.fit(x[:64], y[:64]).score(x[64:], y[64:])
        1.0
    """

    name = "attentive"
    on = "tokens"
    _left_out = ("device",)

    heads: int = 8
    queries: int = 1
    epochs: int = 20
    min_steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))
        check_numbers(heads=self.heads, queries=self.queries, epochs=self.epochs, min_steps=self.min_steps)
        check_numbers(batch_size=self.batch_size, learning_rate=float(self.learning_rate))
        check_decay(self.weight_decay)

    def _fit(self, f: Any, codes: Tensor) -> None:
        _, self._tokens, dim = f.shape
        if dim % self.heads:
            raise UsageError(f"heads={self.heads} must divide the width of the tokens, got {dim}.")
        device = torch.device(self.device) if self.device is not None else _device_of(f)
        # The caller's inference mode would let the backward pass fail, its autocast would lower the precision.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            dtype = torch.promote_types(_read(f, slice(0, 1), device).dtype, torch.float32)
            generator = torch.Generator().manual_seed(self.seed)
            self._weights = _initial(len(self.classes_), self.heads, self.queries, dim, generator, dtype, device)
            self._train(f, codes.to(device), generator)

    def _check_input(self, f: Any, what: str) -> None:
        check_tokens(f)

    @torch.no_grad()
    def _codes(self, f: Any) -> Tensor:
        w, like = self._weights, self._weights["classifier"]
        with torch.autocast(like.device.type, enabled=False):
            return torch.cat([_logits(w, _normal(_read(f, p, like.device), like.dtype)).argmax(1) for p in _parts(f)])

    def _protocol(self) -> dict[str, Any]:
        return {**self._settings("seed"), "tokens": self._tokens, "dim": self._dim, "steps": self._steps}

    def _train(self, f: Any, codes: Tensor, generator: torch.Generator) -> None:
        w = {name: tensor.requires_grad_() for name, tensor in self._weights.items()}
        groups: list[dict[str, Any]] = [
            {"params": [w[n] for n in _DECAYED], "lr": self.learning_rate, "weight_decay": self.weight_decay},
            {"params": [w[n] for n in w if n not in _DECAYED], "lr": self.learning_rate, "weight_decay": 0.0},
        ]
        epoch = math.ceil(len(f) / self.batch_size)
        epochs = max(self.epochs, math.ceil(self.min_steps / epoch))
        orders = (torch.randperm(len(f), generator=generator) for _ in range(epochs))
        # In order: read from a disk, perhaps.
        batches = (rows.sort().values for order in orders for rows in order.split(self.batch_size))

        def loss_of(rows: Tensor) -> Tensor:
            x = _normal(_read(f, rows, codes.device), w["classifier"].dtype)
            return F.cross_entropy(_logits(w, x), codes[rows.to(codes.device)])

        self._steps = epochs * epoch
        descend(groups, batches, loss_of, lambda step: cosine(step, self._steps), what="the attentive probe")
        self._weights = {name: tensor.detach() for name, tensor in w.items()}


_DECAYED = ("key", "value", "classifier")


def _initial(
    classes: int, heads: int, queries: int, dim: int, generator: torch.Generator, dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the initial weights: small queries, keys and values that keep the scale, and a classifier of zeros."""
    width = dim // heads

    def normal(*shape: int, std: float) -> Tensor:  # drawn in float64 on the CPU, so that dtypes and devices agree
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(device, dtype)

    return {
        "query": normal(queries, heads, width, std=_QUERY_STD), "key": normal(heads, width, dim, std=dim**-0.5),
        "value": normal(heads, width, dim, std=dim**-0.5), "value_bias": torch.zeros(heads, width).to(device, dtype),
        "classifier": torch.zeros(classes, dim).to(device, dtype), "bias": torch.zeros(classes).to(device, dtype),
    }  # fmt: skip


def _logits(w: dict[str, Tensor], x: Float[Tensor, "rows tokens dim"]) -> Float[Tensor, "rows classes"]:
    """Return the logits of normalised tokens."""
    queries, heads, width = w["query"].shape
    look = torch.einsum("qhi,hid->qhd", w["query"], w["key"]) / width**0.5
    attention = (x @ look.flatten(0, 1).mT).softmax(1).view(*x.shape[:2], queries, heads).mean(2)  # softmax over tokens
    seen = attention.mT @ x  # [rows, heads, dim]; the mean over queries comes first, since values are linear in it
    values = torch.einsum("rhd,hid->rhi", seen, w["value"]) + w["value_bias"]
    return values.flatten(1) @ w["classifier"].mT + w["bias"]


def _normal(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    largest = x.abs().amax(-1, keepdim=True).clamp_min(_LARGE)
    return F.layer_norm(x * (_LARGE / largest), x.shape[-1:])


def check_tokens(f: Any) -> None:
    """Refuse what is no ``[rows, tokens, dim]`` array of finite floating-point numbers; it is read in parts."""
    floating = f.is_floating_point() if isinstance(f, Tensor) else np.issubdtype(f.dtype, np.floating)
    if f.ndim != 3 or not floating or 0 in f.shape:
        wanted = "Expected tokens as floating-point numbers of shape [rows, tokens, dim]"
        hint = "pooled features have no tokens: extract them with tokens=True"
        raise UsageError(f"{wanted}, got {f.dtype} of shape {list(f.shape)}; {hint}.")
    finite = torch.cat([torch.isfinite(_read(f, part, torch.device("cpu"))).flatten(1).all(1) for part in _parts(f)])
    if refusal := describe_bad_rows(torch.where(finite, 0.0, torch.nan)[:, None], what="tokens"):
        raise UsageError(refusal)


def _parts(f: Any) -> Iterator[slice]:
    rows = max(1, _READ_ELEMENTS // (f.shape[1] * f.shape[2]))
    return (slice(start, start + rows) for start in range(0, len(f), rows))


def _read(f: Any, rows: Tensor | slice, device: torch.device) -> Tensor:
    """Return rows of a tensor or of an array, which may be memory-mapped, on the device."""
    if isinstance(f, Tensor):
        return f.detach()[rows if isinstance(rows, slice) else rows.to(f.device)].to(device)
    # A copy: what is mapped from a file may not be writable, which torch wants.
    return torch.from_numpy(np.array(f[rows if isinstance(rows, slice) else rows.numpy()])).to(device)


def _device_of(f: Any) -> torch.device:
    return f.device if isinstance(f, Tensor) else torch.device("cpu")
