"""Images, labels, positions and texts that are broken, odd or too large, and one call of a collator on each.

Memory is what the tries add to the largest resident size of the process, which only grows: bombs are tried first.
"""

import contextlib
import decimal
import fractions
import io
import itertools
import math
import pathlib
import reprlib
import resource
import struct
import sys
import tempfile
import time
import warnings
import zlib

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hfproj

SECONDS, MEGABYTES = 2.0, 200
MODES = {"PNG": ("RGB", "L", "P", "RGBA", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "GIF": ("P",), "BMP": ("RGB", "1"),
         "TIFF": ("RGB", "F", "I;16"), "WEBP": ("RGB", "RGBA"), "PPM": ("RGB",), "TGA": ("RGBA",)}  # fmt: skip
PIXELS = {"size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def encoded(kind, mode, seed=0):
    rng = np.random.default_rng(seed)
    if mode in ("F", "I;16"):
        array = rng.random((24, 20), dtype=np.float32)
        image = Image.fromarray(array if mode == "F" else (array * 65535).astype(np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def png(width, height, rows=b""):
    """A PNG of one bit a pixel whose header announces any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def bombs():
    """Yield files of some kilobytes that announce more than the memory has."""
    yield "PNG of 144 megapixels", png(12_000, 12_000, bytes((12_000 // 8 + 1) * 12_000))
    yield "PNG of 100 megapixels, no data", png(10_000, 10_000)
    yield "PNG of 4 × 10⁹ rows", png(4, 2**31 - 1)
    yield "PPM of 144 megapixels", b"P6 12000 12000 255 "
    for kind, mode, place, size in (("GIF", "P", 6, "<HH"), ("BMP", "RGB", 18, "<ii"), ("TGA", "RGBA", 12, "<HH")):
        data = bytearray(encoded(kind, mode))
        struct.pack_into(size, data, place, 60_000, 60_000)
        yield f"{kind} of 3,600 megapixels", bytes(data)


def damaged(rng, data):
    """Return a file that is cut, has wrong bytes, zeros, or another file's end."""
    kind, place = rng.integers(5), int(rng.integers(1, len(data)))
    changed = bytearray(data)
    if kind == 0:
        return data[:place]
    if kind == 1:
        for at in rng.integers(0, len(data), 1 + int(rng.integers(8))):
            changed[at] = rng.integers(256)
    elif kind == 2:
        changed[place:] = bytes(len(data) - place)
    elif kind == 3:
        del changed[place : place + int(rng.integers(1, 16))]
    else:
        changed[int(rng.integers(min(64, len(data)))) :][:4] = b"\xff\xff\xff\x7f"
    return bytes(changed)


class Array:
    """What another library's array shows of itself."""

    def __init__(self, values):
        self.values = values

    def __array__(self, *args, **kwargs):
        if isinstance(self.values, Exception):
            raise self.values
        return np.asarray(self.values)


def large_arrays(side=200_000):
    """Yield (name, value) of arrays and tensors that are one number, or nothing but a file's length, and show more."""
    yield "one byte, expanded", np.broadcast_to(np.uint8(1), (side, side, 3))
    yield "one byte, expanded, grey", np.broadcast_to(np.uint8(1), (side, side))
    yield "one bool, expanded", np.broadcast_to(np.bool_(True), (3, side, side))
    yield "one float, expanded", np.broadcast_to(np.float64(1), (4, side, side))
    yield "one float16, expanded", np.broadcast_to(np.float16(1), (side, side, 1))
    yield "13 bands, expanded", np.broadcast_to(np.uint16(1), (side, side, 13))
    yield "13 bands first, expanded", np.broadcast_to(np.float32(1), (13, side, side))
    yield "five channels, expanded", np.broadcast_to(np.uint8(1), (side, side, 5))
    yield "four dimensions, expanded", np.broadcast_to(np.uint8(1), (2, side, side, 3))
    yield "a line, expanded", np.broadcast_to(np.uint8(1), (1, side * side, 3))
    yield "strided", np.lib.stride_tricks.as_strided(np.zeros(4, np.uint8), (side, side, 3), (0, 0, 1))
    yield "of other library, expanded", Array(np.broadcast_to(np.uint8(1), (side, side, 3)))
    yield "masked, expanded", np.broadcast_to(np.ma.masked_all(1), (side, side, 3), subok=True)
    for dtype in (torch.uint8, torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn):
        yield f"tensor of {dtype}, expanded", torch.ones(1, 1, 1).to(dtype).expand(3, side, side)
    yield "tensor of bands, expanded", torch.ones(1, dtype=torch.bfloat16).expand(13, side, side)
    yield "meta, large", torch.empty(3, side, side, device="meta")
    with tempfile.TemporaryFile() as file:
        file.truncate(3 * 10_000 * 10_000)
        yield "memory map", np.memmap(file, np.uint8, "r", shape=(10_000, 10_000, 3))


def odd_values():
    """Yield (name, value) of everything else that an item may hold for an image."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.bool, torch.int64, torch.uint8,
                  torch.float8_e4m3fn, torch.uint16):  # fmt: skip
        yield f"tensor of {dtype}", torch.zeros(3, 8, 8).to(dtype)
    for dtype in ("float16", "longdouble", "complex128", "uint64", "int8", ">u2", "object", "U3", "datetime64[s]"):
        yield f"array of {dtype}", np.zeros((8, 8, 3)).astype(dtype)
    for value in (math.nan, math.inf, -1.0, 1e30, 2.0):
        yield f"array of {value}", np.full((8, 8), value)
        yield f"bfloat16 of {value}", torch.full((3, 8, 8), value, dtype=torch.bfloat16)
    for shape in ((), (0,), (5,), (0, 8, 3), (8, 0), (1, 1), (2, 8, 8, 3), (8, 8, 2), (8, 8, 5), (1, 8, 8), (4, 8, 8)):
        yield f"array of shape {shape}", np.zeros(shape, dtype=np.uint8)
        yield f"tensor of shape {shape}", torch.zeros(shape)
    yield from {
        "sparse": torch.zeros(3, 8, 8).to_sparse(),
        "meta": torch.zeros(3, 8, 8, device="meta"), "with a gradient": torch.zeros(3, 8, 8, requires_grad=True),
        "view": torch.zeros(8, 8, 3).permute(2, 0, 1), "masked": np.ma.masked_all((8, 8)),
        "record": np.zeros((8, 8), dtype=[("r", "u1")]), "of other library": Array(np.zeros((8, 8, 3), np.uint8)),
        "of other library, floats": Array(np.ones((8, 8))), "of other library, lost": Array(RuntimeError("lost")),
        "of other library, objects": Array([None]), "None": None, "number": 3, "list": [[0, 1]], "bytes": b"\x89PNG",
        "text": "a.png", "path": pathlib.Path("a.png"), "set": {1}, "object": object(), "class": Image.Image,
        "no bytes": {"bytes": None, "path": None}, "empty bytes": {"bytes": b"", "path": None}, "dict": {"array": 1},
        "text as bytes": {"bytes": "abc"}, "number as bytes": {"bytes": 3}, "list as bytes": {"bytes": [1, 2]},
        "lost file": {"path": "/nowhere/a.png"}, "folder": {"path": "/"}, "device": {"path": "/dev/zero"},
        "number as path": {"path": 3}, "NUL in the path": {"path": "a\0b"}, "long path": {"path": "a" * 10_000},
        "no pixels": Image.new("RGB", (0, 4)), "one pixel": Image.new("RGB", (1, 1)),
        "thin": Image.new("RGB", (20_000, 1)), "premultiplied": Image.new("La", (8, 8)),
    }.items()  # fmt: skip
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa",
                 "I;16", "I;16B"):  # fmt: skip
        yield f"PIL image of mode {mode}", Image.new(mode, (9, 8))
    yield "PIL image of NaN", Image.fromarray(np.full((8, 8), math.nan, dtype=np.float32))


def lazy(data):
    """Return an image that is opened and not read, or None where its header is broken already."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data))


def images(damages=6, seed=0):
    """Yield (name, value): first bombs, then odd values, then whole and damaged files, stored and lazy."""
    for name, data in bombs():
        yield name, {"bytes": data, "path": None}
        yield f"{name}, lazy", lazy(data)
    yield from large_arrays()
    yield from odd_values()
    rng = np.random.default_rng(seed)
    for kind, modes in MODES.items():
        for mode, number in itertools.product(modes, range(damages + 1)):
            data = encoded(kind, mode)
            data = damaged(rng, data) if number else data
            name = f"{kind} {mode}, {f'damage {number}' if number else 'whole'}"
            yield name, {"bytes": data, "path": None}
            yield f"{name}, lazy", lazy(data)


class Odd:
    """Fails whatever it is asked."""

    def fail(self, *args):
        raise RuntimeError("first line\nsecond line")

    __index__ = __eq__ = __ne__ = __bool__ = __len__ = __str__ = __repr__ = __iter__ = __float__ = __int__ = fail
    __hash__ = object.__hash__


NUMBERS = [10**20, -(10**20), 2**63, 2**63 - 1, 10**5000, math.nan, math.inf, 1.5, "cat", b"cat", None,
           True, [1], torch.tensor([1, 2]), torch.tensor(3), torch.tensor(3.0), np.uint64(2**64 - 1),
           np.int8(3), object(), {}, complex(1), np.array([1, 2]), torch.tensor(2**63,
           dtype=torch.uint64), -(2**63), -(2**63) - 1, -(10**5000), -1, 0, False, "", "\ud800", "a\nb",
           "7", "a" * 10**7, b"a" * 10**7, decimal.Decimal(3), fractions.Fraction(3),
           decimal.Decimal("NaN"), np.nan, np.float32(3), np.array(3), np.array([3]), np.array("cat"),
           np.datetime64("NaT"), np.datetime64("2020-01-01"), np.ma.masked, np.broadcast_to(np.int64(1),
           (200_000, 200_000)), range(10**9), torch.tensor(True), torch.tensor(math.nan), torch.zeros(0),
           torch.ones(1).expand(200_000, 200_000), torch.empty((), device="meta"),
           torch.tensor(3).to_sparse(), {"label": 3}, {3}, (3,), len, int, Exception("a\nb"),
           pathlib.Path("3"), itertools.count(), Odd()]  # fmt: skip
TEXTS = ["", "a", "\ud800", "a\udcff", "a" * 10**7, "a b " * 10**6, " " * 10**7, "\0", "e\u0301" * 10**6, "😀" * 10**6,
         None, b"a", 3, ["a"], math.nan, np.str_("a"), pathlib.Path("a"), "\n" * 10**7, "\r\n\t\v", "\u202e" * 10**6,
         "\u200b" * 10**6, "\ufeffa", "\U0010ffff", "\ue000", "a" + "\u0301" * 10**6, "a\ud800" + "b" * 10**6,
         "b" * 10**6 + "\ud800", "\ud83d\ude00", bytearray(b"a"), ("a", "b"), {"text": "a"}, True, np.array("a"),
         np.array(["a"] * 3), 10**5000, 1e308, object(), Odd(), str, iter("a"), range(10**9),
         torch.tensor(3)]  # fmt: skip


def tokenizer():
    words = ["[PAD]", "[UNK]", "a", "b"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")


def all_tries(damages=6, seed=0):
    """Yield (what, function, arguments) of every try."""
    grey = {"size": 8, "mean": (0.5,), "std": (0.5,)}
    bands = {"size": 8, "mean": (0.5,) * 13, "std": (0.5,) * 13}
    collators = [hfproj.ImageViews(**PIXELS), hfproj.EvalImages(**PIXELS), hfproj.EvalImages(**grey)]
    collators += [hfproj.EvalImages(**bands, resizer="pil")]
    for name, value in images(damages, seed):
        for number, collator in enumerate(collators):
            yield f"image: {name}, collator {number}", bounded, (collator, {"image": value, "index": 0})
    image = np.zeros((8, 8), dtype=np.uint8)
    for value in NUMBERS:
        # reprlib would fail on a number of more digits than Python prints
        name = type(value).__name__ if isinstance(value, int | Odd) else reprlib.repr(value)
        yield f"label {name}", bounded, (collators[0], {"image": image, "index": 0, "label": value})
        yield f"index {name}", bounded, (collators[0], {"image": image, "index": value})
        yield f"epoch {name}", bounded, (collators[0], {"image": image, "index": 0, "epoch": value})
    texts = [hfproj.TextViews(tokenizer()), hfproj.EvalText(tokenizer())]
    for value, collator in itertools.product(TEXTS, texts):
        name = type(value).__name__ if isinstance(value, int | Odd) else reprlib.repr(value)
        yield f"text {name}, {type(collator).__name__}", bounded, (collator, {"text": value, "index": 0})


def bounded(collator, item):
    """Return what is wrong with a call, or None: a batch of finite numbers or one line, in bounded time and memory."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = collator([item])
    except hfproj.UsageError as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            return f"no one line: {error!s:.60}"
    else:
        values = [batch.get("pixel_values"), *batch.get("views", ())]
        if not all(v.isfinite().all() for v in values if isinstance(v, torch.Tensor)):
            return "values that are not finite"
    seconds = time.perf_counter() - start
    scale = 1024 if sys.platform != "darwin" else 2**20
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / scale
    if seconds > SECONDS:
        return f"{seconds:.1f} s"
    return f"{grown:.0f} MB" if grown > MEGABYTES else None
