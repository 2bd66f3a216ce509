"""h and z of a whole data set, in its order, on the CPU, on every process: computed once, and kept on request.

With a cache the features are written to disk while they are computed (`hfproj.features.store`) and mapped into memory
instead of read, so that a data set may be larger than the memory. The key depends on the content of the weights, the
adapter, the data, the preprocessing and what is read (`hfproj.features.cache_key`). Cached views
(`hfproj.cache_features`) go the same way.
"""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hfproj.checking import checked
from hfproj.data.images import EvalImages
from hfproj.data.indexing import what_to_pass
from hfproj.data.kinds import check_collator
from hfproj.data.readable import ReadableDataset
from hfproj.distributed import gather_objects, gather_rows, rank, world_size
from hfproj.errors import UsageError, check_type
from hfproj.features import cache_key
from hfproj.features.reader import Reader, view_batches
from hfproj.features.store import FeatureStore
from hfproj.functional.labels import labels_as_given
from hfproj.heads.layers import is_layer_name
from hfproj.saving.signals import LeaveSignals
from hfproj.typing import Data, OneOf, Pooling

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SHARD_ROWS = 256  # at least: the checksum of a shard takes 40 bytes of the manifest


@dataclass(frozen=True)
class Features:
    """Features of a data set on the CPU, float32 unless asked otherwise; row i is item i.

    From a cache the tensors are mapped: reading ``features.h[a:b]`` reads these rows from the disk. Changing them in
    place changes nothing there.

    Attributes:
        h: Representations.
        z: Projections; None for a model without an active head.
        labels: What the collator gave as "labels": class numbers, −1 for none; scores as they are. Or None.
        index: What the collator gave as "index", or the position in the data set.
        layers: Name of each intermediate layer asked for → what it gave, pooled like h.
        tokens: The sequence that h is pooled from, if asked for: with class token and registers, the positions of a
            feature map row by row.

    Example:
        >>> features = Features(torch.zeros(3, 4), None, None, torch.arange(3), layers={"blocks.0": torch.ones(3, 2)})
        >>> len(features), {name: f.shape[1] for name, f in features.by_name().items()}
        (3, {'blocks.0': 2, 'h': 4})
    """

    h: Float[Tensor, "rows dim"]
    z: Float[Tensor, "rows out_dim"] | None
    labels: Int[Tensor, " rows"] | Float[Tensor, " rows"] | None
    index: Int[Tensor, " rows"]
    layers: dict[str, Float[Tensor, "rows _"]] = field(default_factory=dict)
    tokens: Float[Tensor, "rows tokens token_dim"] | None = None

    def __len__(self) -> int:
        return len(self.h)

    def by_name(self) -> dict[str, Float[Tensor, "rows _"]]:
        """Return every representation by name: layers in the order asked for, "h", those of the head, "z" if any."""
        inside = {name: f for name, f in self.layers.items() if is_layer_name(name)}
        before = {name: f for name, f in self.layers.items() if name not in inside}
        return {**before, "h": self.h, **inside, **({} if self.z is None else {"z": self.z})}


@checked
def extract_features(
    model: nn.Module, dataset: Data, *, batch_size: int = 256,
    collator: Callable[[list], Mapping[str, Any]] | None = None, device: torch.device | str | None = None,
    num_workers: int = 0, progress: bool = False, pooling: Pooling | None = None,
    layers: Sequence[int | str] | OneOf["all", "head"] = (), tokens: bool = False, dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None, cache_dir: str | os.PathLike | None = None, data_key: str | None = None,
    preprocessing_key: str | None = None,
) -> Features:  # fmt: skip
    """Return h and z of every item, with the model in eval mode; its training flags come back as they were.

    On several processes each computes a contiguous share, and all of them have all rows in the order of the data set,
    each once. The global random state is left alone, so that measuring in the middle of a training run does not change
    it.

    With `cache_dir` a second call reads what the first wrote. An extraction that was interrupted goes on after the last
    whole shard (the batches of at least 256 items) and, under the same batch size, device and versions, ends with the
    same bytes. Of two that want the same features at the same time the second waits. A file that was truncated or
    changed is noticed by its checksums and extracted again, with a warning.

    Args:
        model: Called with the batch's `pixel_values` or, where the batch holds "inputs", with that mapping. With an
            active head it returns an object with `representation` and `projection`; of any other, a backbone or a model
            whose adapter is disabled, h is the pooled output and there is no z.
        dataset: With a length and integer indices; 🤗 datasets are read a batch at a time.
        batch_size: Items a forward pass, on each process.
        collator: Makes a batch `{"pixel_values" or "inputs", "labels"?, "index"?}` of a list of items. Default:
            `hfproj.data.images.EvalImages.for_model(model)`.
        device: Where inputs go. Default: where the model's parameters are.
        num_workers: Processes that load data.
        progress: Show a bar (first process only).
        pooling: How a backbone without an adapter becomes h: "cls", "mean", "cls_mean", "max" or "pooler". Default:
            "cls" where there is a class token, else "mean".
        layers: Intermediate layers to keep: indices of blocks (their raw output; −1 is the backbone's final output,
            named "final"), names of submodules, or "all" blocks. Pooled like h; where that is "pooler", by the default.
            Of the active head "head.0", "head.1", …, or "head" for all: what each of its linear maps gives after the
            norm and activation that follow (`hfproj.heads.layers`); the last is z before unit rows.
        tokens: Keep the sequence that h is pooled from too.
        dtype: In which h, z, layers and tokens are kept: float32, float16, bfloat16 or float64.
        autocast: Run the model in mixed precision of this type.
        cache_dir: Folder of caches, shared by all processes.
        data_key: A text that changes whenever the data do. Default: the fingerprint of a 🤗 data set, else length and
            content of 256 evenly spaced items.
        preprocessing_key: A text that changes whenever the collator's work does. Default: class and public settings of
            a collator of this library; another one needs the text here or as its attribute `cache_key`.

    Raises:
        UsageError: If the model is no module, the data set is empty or a stream, a batch has no inputs or other rows
            than items, an output has no representation, a layer is unknown, values are beyond float16, or a cache has
            no key.
    """
    check_type("the model", model, nn.Module, "load it, e.g. by hfproj.load_backbone or hfproj.from_pretrained")
    check_source(dataset, num_workers)
    check_collator("collator", collator)
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise UsageError("The data set is empty: there is nothing to extract features from.")
    if batch_size < 1 or dtype not in DTYPES:
        given = f"got batch_size={batch_size} and dtype={dtype!r}"
        known = "torch.float32, torch.float16, torch.bfloat16 or torch.float64"
        raise UsageError(f"Expected batch_size ≥ 1 and dtype {known}, {given}.")
    collator = EvalImages.for_model(model) if collator is None else collator
    device = torch.device(device) if device is not None else next(model.parameters(), torch.empty(0)).device
    reader = Reader(model, device, pooling=pooling, layers=layers, tokens=tokens, dtype=dtype, autocast=autocast)
    source = Source(reader, dataset, collator, batch_size, num_workers, progress)
    whole = collect(source, cache_dir, data_key, preprocessing_key)
    return Features(
        h=whole["h"], z=whole.get("z"), labels=whole.get("labels"), index=whole["index"],
        layers={name: whole[f"layers.{name}"] for name in reader.layers}, tokens=whole.get("tokens"),
    )  # fmt: skip


def check_source(dataset: Any, num_workers: int) -> None:
    """Refuse what has no length or no indices, and a negative number of workers.

    Raises:
        UsageError: If it is so.
    """
    lengthless = isinstance(dataset, type | Mapping | str | bytes | nn.Module) or not hasattr(dataset, "__getitem__")
    try:
        lengthless = lengthless or len(dataset) < 0
    except TypeError:
        lengthless = True
    if lengthless:
        hint = what_to_pass(dataset, "test") or "of a stream, take the items that are wanted into a list first"
        raise UsageError(f"Expected a data set with a length and indices, got a {type(dataset).__name__}; {hint}.")
    if num_workers < 0:
        raise UsageError(f"Expected num_workers to be at least 0 (0: no processes of their own), got {num_workers}.")


@dataclass(frozen=True)
class Source:
    """Computes what is read of ranges of rows: h, z and others of the items, or h of the views of `passes` epochs."""

    reader: Reader
    dataset: Any
    collator: Callable[[list], Mapping[str, Any]]
    batch_size: int
    num_workers: int = 0
    progress: bool = False
    passes: int = 0

    def shards(self, parts: Sequence[range]) -> Generator[dict[str, Tensor], None, None]:
        """Yield the tensors of each part; no batch reaches over its end."""
        size, epochs = self.batch_size, range(max(self.passes, 1))
        batches = [list(part[i : i + size]) for part in parts for _ in epochs for i in range(0, len(part), size)]
        keys: Any = batches
        if self.passes:
            ends = [-(-len(part) // size) for part in parts]
            of_batch = [epoch for end in ends for epoch in epochs for _ in range(end)]
            keys = [[(epoch, row) for row in batch] for epoch, batch in zip(of_batch, batches)]
        loader: Any = DataLoader(
            self.dataset if self.passes else ReadableDataset(self.dataset), batch_sampler=keys,
            collate_fn=self.collator, num_workers=self.num_workers, worker_init_fn=LeaveSignals(),
            generator=torch.Generator(),  # a loader without its own generator advances the global one
        )  # fmt: skip
        from tqdm.auto import tqdm

        shown = self.progress and rank() == 0
        with self.reader, tqdm(total=len(batches), desc="features", unit="batch", disable=not shown) as bar:

            def values_of(batch: Any, rows: list[int]) -> dict[str, Tensor]:
                found = self._values(batch, rows)
                bar.update()
                return found

            values = map(values_of, loader, batches)
            for part in parts:
                passes = [_joined([next(values) for _ in range(0, len(part), size)]) for _ in epochs]
                with torch.inference_mode(False), torch.no_grad():
                    yield passes[0] | ({"h": torch.cat([one["h"] for one in passes], 1)} if self.passes else {})

    def _values(self, batch: Mapping[str, Any], rows: list[int]) -> dict[str, Tensor]:
        check_type("the collator's batch", batch, Mapping, "return a dict with 'pixel_values' or 'inputs'")
        if self.passes:
            found = {"h": torch.stack([self.reader(view)["h"] for view in view_batches(batch)], 1)}
        else:
            found = self.reader(batch)
        if batch.get("labels") is not None:
            found["labels"] = labels_as_given(batch["labels"])
        if batch.get("index") is not None:
            found["index"] = torch.as_tensor(batch["index"]).cpu().long()
        found.setdefault("index", torch.tensor(rows))
        for key, tensor in found.items():
            if len(tensor) != len(rows):
                raise UsageError(f"{key!r} of a batch of {len(rows)} items has {len(tensor)} rows.")
        return found


def _joined(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if any(piece.keys() != pieces[0].keys() for piece in pieces):
        raise UsageError("The collator gave 'labels' or 'index' for some batches and not for others.")
    for name in pieces[0]:
        shapes = {tuple(piece[name].shape[1:]) for piece in pieces}
        if len(shapes) > 1:
            raise UsageError(f"{name!r} has rows of different shapes, {sorted(shapes)}; pad all items to one length.")
    # Outside inference mode: a probe that trains on the features could not use inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def collect(
    source: Source, cache_dir: str | os.PathLike | None = None, data_key: str | None = None,
    preprocessing_key: str | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return what is read of all rows, on every process: from memory, or mapped from the cache."""
    if cache_dir is not None:
        return _store(source, cache_dir, data_key, preprocessing_key).get(source.shards)
    if (data_key, preprocessing_key) != (None, None):
        raise UsageError("data_key and preprocessing_key belong to a cache; give cache_dir too.")
    rows = len(source.dataset)
    start, stop = rows * rank() // world_size(), rows * (rank() + 1) // world_size()
    own = range(start, stop) or range(1)  # a process without rows still has to know the widths
    (whole,) = source.shards([own])
    whole = {key: tensor[: stop - start] for key, tensor in whole.items()}
    if world_size() > 1:
        with torch.no_grad():
            whole = {key: gather_rows(tensor.to(source.reader.device)).cpu() for key, tensor in whole.items()}
    return whole


def _store(
    source: Source, cache_dir: str | os.PathLike, data_key: str | None, preprocessing_key: str | None
) -> FeatureStore:
    reader = source.reader
    read = reader.protocol
    made_of = {
        "model": cache_key.model_identity(reader.model), "data": cache_key.data_identity(source.dataset, data_key),
        "preprocessing": cache_key.preprocessing_identity(source.collator, preprocessing_key),
        "read": {**read, "passes": source.passes} if source.passes else read, "hfproj": cache_key.library_version(),
    }  # fmt: skip
    everywhere = gather_objects(made_of)
    for other, there in enumerate(everywhere):
        if there["model"] != everywhere[0]["model"]:
            raise UsageError(f"Process {other} holds another model than process 0; load the same on all processes.")
    versions = {"torch": torch.__version__, "device": reader.device.type}
    return FeatureStore(
        cache_dir,
        cache_key.digest(everywhere[0]),  # fingerprints of data that can't be hashed differ between processes
        made_of=everywhere[0], rows=len(source.dataset), settings={"batch_size": source.batch_size, **versions},
        shard_rows=-(-_SHARD_ROWS // source.batch_size) * source.batch_size,
        names=["h", "z", "labels", "index", *(f"layers.{n}" for n in reader.layers), *["tokens"] * reader.tokens],
    )  # fmt: skip
