"""``hfproj embed``: h or z of every image or text of a data set, as a file that other programs read."""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfproj.errors import UsageError, check_choice, one_line
from hfproj.files import installed_versions, portable, sync

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 8192  # of a row group, and read at a time
_TEXTS = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".parquet": "parquet"}
_DTYPES = ("float32", "float16")


def parser() -> argparse.ArgumentParser:
    """Return the flags of ``hfproj embed``."""
    text = (
        "hfproj embed MODEL DATA: the representation h or the projection z of every image or text, as a file.\n\n"
        "    hfproj embed vit_nano digits --out digits.npy                    # a backbone: h\n"
        "    hfproj embed out/simclr_vit my/images --split train              # an adapter: h, with its LoRA\n"
        "    hfproj embed out/simclr_vit digits --what z --split test         # z = head(h)\n"
        "    hfproj embed sentence-transformers/all-MiniLM-L6-v2 notes.txt    # a text a line\n\n"
        "A .parquet file has a row an item: file (of images in a folder), label (if there is one), and h or z, a list\n"
        "of one length. A .npy file has the array alone. Rows are in the order of the data set. Interrupted, the same\n"
        "command goes on: what is done lies in a folder beside the file until it is whole."
    )
    made = argparse.ArgumentParser(description=text, add_help=False)
    made.add_argument("model", help="An adapter (folder or Hub id), or a backbone: vit_nano, a Hub id, timm/…")
    made.add_argument("data", help="digits, a Hub id, parquet, an image or IDX folder; of texts .txt, .csv, .jsonl …")
    made.add_argument("--out", default="embeddings.parquet", help="The file to write: .parquet or .npy.")
    made.add_argument("--what", default="h", choices=("h", "z"), help="The representation, or the projection.")
    made.add_argument("--split", default="train", help="Of the data set.")
    made.add_argument("--image_column", help="Column of the images.")
    made.add_argument("--label_column", help="Column of the labels.")
    made.add_argument("--text_column", default="text", help="Column of the texts.")
    made.add_argument("--max_length", type=int, help="Tokens of a text; by default 128, or what the model takes.")
    made.add_argument("--limit", type=int, help="Take this many random items.")
    made.add_argument(
        "--on_bad_image", default="raise", choices=("raise", "skip"), help="Images that can't be read: raise, or skip."
    )
    made.add_argument("--pooling", help="Of a bare backbone: cls, mean, cls_mean, max, pooler.")
    made.add_argument("--dtype", default="float32", choices=_DTYPES, help="Type of the values.")
    made.add_argument("--batch_size", type=int, default=256, help="Items a forward pass.")
    made.add_argument("--num_workers", type=int, default=0, help="Processes that load images.")
    made.add_argument("--device", help="cuda, cpu …; a GPU if there is one.")
    made.add_argument("--cache_dir", help="Keep features here, as extract_features does, instead of beside the file.")
    made.add_argument("--overwrite", action="store_true", help="Replace the file if it exists.")
    return made


def embed(options: argparse.Namespace) -> None:
    """Write the file.

    Raises:
        UsageError: If the file exists or has another ending, z is asked of a backbone, or model or data can't be read.
    """
    out = Path(options.out).expanduser()
    if out.suffix not in (".parquet", ".npy"):
        raise UsageError(f"Expected --out to end in .parquet or .npy, got {options.out!r}.")
    if out.exists() and not options.overwrite:
        raise UsageError(f"Expected --out to be a new file, got {options.out!r}, which exists; add --overwrite.")
    check_choice("--dtype", options.dtype, _DTYPES)
    import torch

    import hfproj
    from hfproj.commands.options import is_adapter

    began = time.monotonic()
    adapted = is_adapter(options.model)
    if options.what == "z" and not adapted:
        raise UsageError(f"Expected an adapter for --what z, got the backbone {options.model!r}, which has no head.")
    if adapted and options.pooling:
        raise UsageError("--pooling is of bare backbones; an adapter pools as it was trained. Leave it out.")
    model = hfproj.from_pretrained(options.model) if adapted else hfproj.load_backbone(options.model)
    model.to(_device(options.device))
    dataset, collator = _data(model, options)
    partial = out.with_name(f".{out.name}.partial")
    try:
        features = hfproj.extract_features(
            model, dataset, collator=collator, batch_size=options.batch_size, num_workers=options.num_workers,
            progress=True, pooling=options.pooling, dtype=getattr(torch, options.dtype),
            cache_dir=options.cache_dir or partial,
        )  # fmt: skip
    except KeyboardInterrupt:
        part = "the last part that was whole (a part has 256 items or one batch, whichever is more)"
        print(f"interrupted: the same command goes on after {part}", file=sys.stderr)
        sys.exit(130)
    values = features.z if options.what == "z" else features.h
    assert values is not None
    columns = {"file": _files(dataset, options.data), "label": features.labels}
    _write(out, options, values, {name: column for name, column in columns.items() if column is not None})
    shape = " × ".join(f"{size:,}" for size in values.shape)
    print(f"Wrote {options.what}, {shape} {options.dtype}, to {out} ({time.monotonic() - began:.0f} s).")
    del features, values  # mapped files can't be deleted everywhere
    shutil.rmtree(partial, ignore_errors=True)


def _device(name: str | None) -> Any:
    import torch

    from hfproj.checking import check_device

    try:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return check_device("--device", torch.device(name)) if name else found or torch.device("cpu")
    except RuntimeError as error:
        raise UsageError(f"Expected --device to be a device of torch's, got {name!r}: {one_line(error)}.") from error


# --- data ---


def _data(model: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the data set and its collator: of texts where the backbone reads tokens, else of images."""
    import hfproj
    from hfproj.backbones import main_input_of
    from hfproj.backbones.loading import bare_backbone

    backbone = bare_backbone(model)
    reads = "texts" if main_input_of(backbone) == "input_ids" else "images"
    if (holds := _kind(options.data)) and holds != reads:
        wanted = f"DATA to be {reads}, which {options.model!r} reads"
        raise UsageError(f"Expected {wanted}, got {options.data!r}, {holds}; give a model that reads {holds}.")
    if reads == "texts" and options.on_bad_image == "skip":
        raise UsageError("--on_bad_image skip has no effect on texts; leave it out.")
    if reads == "images":
        columns = {"image_column": options.image_column, "label_column": options.label_column}
        images = hfproj.load_image_dataset(options.data, split=options.split, limit=options.limit, **columns)
        if options.on_bad_image == "skip":
            images, bad = hfproj.data.without_bad_images(images)
            if bad:
                what = "1 image can't be read and is left out" if len(bad) == 1 else f"{len(bad)} images can't be read"
                print(f"{what}{', and are left out. The first' * (len(bad) > 1)}: {next(iter(bad.values()))}")
        return images, hfproj.EvalImages.for_model(model)
    positions = getattr(getattr(backbone, "config", None), "max_position_embeddings", None) or 128
    length = options.max_length or min(128, positions)
    texts = _texts(options)
    label = options.label_column or ("label" if "label" in texts.column_names else None)
    return texts, hfproj.EvalText.for_model(model, column=options.text_column, max_length=length, label_column=label)


def _kind(data: str) -> str | None:
    """Return whether DATA, by its name alone, is of images or of texts; None where it may be either."""
    path = Path(data).expanduser()
    if path.is_file() and path.suffix in _TEXTS and path.suffix != ".parquet":
        return "texts"
    files = itertools.islice(itertools.chain(path.glob("*"), path.glob("*/*")), 1000) if path.is_dir() else [path]
    found = {file.suffix.lower() for file in files}
    of_images = found & {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"} and not found & {*_TEXTS}
    return "images" if of_images or (data == "digits" and not path.exists()) else None


def _texts(options: argparse.Namespace) -> Any:
    """Return a data set of texts: a file, or one of the Hub."""
    import datasets
    import numpy as np

    name, path = options.data, Path(options.data).expanduser()
    kind = _TEXTS.get(path.suffix)
    if path.is_file() and kind is None:
        raise UsageError(f"Expected texts in one of {', '.join(_TEXTS)}, got {name!r}.")
    try:
        if path.is_file() and kind is not None:
            more: dict[str, Any] = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            found = datasets.load_dataset(kind, data_files={options.split: str(path)}, split=options.split, **more)
        else:
            found = datasets.load_dataset(name, split=options.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        hint = "a file of texts, a folder of them, or a Hub id"
        raise UsageError(f"Expected DATA to be {hint}, got {name!r}: {one_line(error)}.") from error
    if options.text_column not in found.column_names:
        columns = ", ".join(found.column_names)
        raise UsageError(f"{name!r} has no column {options.text_column!r} (--text_column). Available: {columns}.")
    if options.limit is not None and options.limit < len(found):
        found = found.select(np.sort(np.random.default_rng(0).permutation(len(found))[: options.limit]))
    return found


def _files(dataset: Any, name: str) -> list[str] | None:
    """Return the names of the images' files below their folder; None where they are not files of their own."""
    import datasets

    root = Path(name).expanduser()
    if not root.is_dir() or not isinstance(getattr(dataset, "features", {}).get("image"), datasets.Image):
        return None
    paths = [image["path"] for image in dataset.cast_column("image", datasets.Image(decode=False))["image"]]
    if not all(path and os.path.isabs(path) for path in paths):
        return None
    return [os.path.relpath(path, root.resolve()) for path in paths]


# --- the file ---


def _write(out: Path, options: argparse.Namespace, values: "Tensor", columns: dict[str, Any]) -> None:
    """Write the file: whole or not at all."""
    if out.is_dir():
        raise UsageError(f"Expected --out to be a file, got the folder {str(out)!r}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    write: Callable[..., None] = _npy if out.suffix == ".npy" else _parquet
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        temporary = Path(folder) / out.name
        write(temporary, options, values, columns)
        sync(temporary)
        os.replace(temporary, out)
    sync(out.parent)


def _npy(path: Path, options: argparse.Namespace, values: "Tensor", columns: dict[str, Any]) -> None:
    import numpy as np

    array = np.lib.format.open_memmap(path, mode="w+", dtype=options.dtype, shape=tuple(values.shape))
    for start in range(0, len(values), _ROWS):
        array[start : start + _ROWS] = values[start : start + _ROWS].numpy()
    array.flush()


def _parquet(path: Path, options: argparse.Namespace, values: "Tensor", columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    dim, plain = values.shape[1], {name: pa.array(_plain(column)) for name, column in columns.items()}
    number = pa.float16() if options.dtype == "float16" else pa.float32()
    about = {"model": options.model, "data": options.data, "split": options.split, "versions": installed_versions()}
    schema = pa.schema(
        [*((name, column.type) for name, column in plain.items()), (options.what, pa.list_(number, dim))],
        metadata={"hfproj": json.dumps(portable(about))},
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(values), _ROWS):
            part = values[start : start + _ROWS].numpy()
            rows = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1), type=number), dim)
            batch = [column.slice(start, len(part)) for column in plain.values()]
            writer.write_table(pa.Table.from_arrays([*batch, rows], schema=schema))


def _plain(column: Any) -> Any:
    return column.tolist() if hasattr(column, "tolist") else column
