"""Files made to take memory, time or secrets: generators of cases, each a name, a door and what lies behind it.

A case writes its file into an empty folder and returns the call that opens it. `whole` is a sound adapter to damage.
"""

import io
import itertools
import json
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path

import torch
from cases import make_backbone
from hostile import changed, config_of, write_config
from parquet_files import histories
from safetensors.torch import load_file, save_file

import hfproj
from hfproj import filenames
from hfproj.converters.checkpoint import read_file
from hfproj.hub.pull import open_adapter
from hfproj.reporting import write_card
from hfproj.results import Results

BAD = [
    None, True, 0, -1, 10**12, 2**70, 0.5, 1e308, "", "../x", "a\n" * 3000, [], ["x", None], {}, {"a": [1]},
    {"head": {"head": {}}}, "(a+)+$", [2**20] * 300, "\x1b[2J", "NUL", [[[[[[]]]]]], {"": ""},
]  # fmt: skip

SOUND = {"format": 1, "config": {}, "seeds": [], "versions": {}, "command": "", "measurements": [], "spectra": {},
         "log": [], "notes": []}  # fmt: skip
KNN = {"name": "knn", "layer": "h", "when": "after", "value": 0.5, "unit": "accuracy"}


def _paths(value, before=()):
    for name, part in value.items():
        yield (*before, name)
        if isinstance(part, dict):
            yield from _paths(part, (*before, name))


def fields(folder, whole):
    """Each entry of a config with each bad value; options of the PEFT method that a config may have besides."""
    values = config_of(whole)
    more = ["r", "lora_alpha", "alpha_pattern", "rank_pattern", "target_modules", "layers_to_transform", "lora_dropout"]
    paths = dict.fromkeys([*_paths(values), *(("backbone_adapter", name) for name in more)])
    for path, (number, bad) in itertools.product(paths, enumerate(BAD)):
        write_config(folder, changed(values, path, bad))
        yield f"{'.'.join(path)[:60]} {number}", lambda: open_adapter(folder)


def bytes_of_files(folder, whole):
    """Damaged bytes: bits that flip, parts that are missing, doubled or moved, in config and tensors."""
    draw = random.Random(0)
    for name, number in itertools.product((filenames.ADAPTER_CONFIG, filenames.ADAPTER_WEIGHTS), range(150)):
        data = bytearray((whole / name).read_bytes())
        end = len(data) if name == filenames.ADAPTER_CONFIG or number % 2 else 600
        start, length = draw.randrange(end), draw.randrange(1, 40)
        if number % 5 == 0:
            data[start] ^= 1 << draw.randrange(8)
        elif number % 5 == 1:
            del data[start : start + length]
        elif number % 5 == 2:
            data[start:start] = data[start : start + length]
        elif number % 5 == 3:
            data[start : start + length] = bytes(draw.randrange(256) for _ in range(length))
        else:
            data = data[:start]
        for file in (filenames.ADAPTER_CONFIG, filenames.ADAPTER_WEIGHTS):
            shutil.copyfile(whole / file, folder / file)
        (folder / name).write_bytes(data)
        yield f"{name} {number}", lambda: hfproj.load_head(folder)
    shutil.copyfile(whole / filenames.ADAPTER_WEIGHTS, folder / filenames.ADAPTER_WEIGHTS)


def _safetensors(entries, data=b""):
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return struct.pack("<Q", len(text)) + text + data


def large_adapters(folder, whole):
    """Few bytes that ask for much: memory, loops, names."""
    values, backbone = config_of(whole), make_backbone("vit")
    timm = {"library": "timm", "id": "vit_tiny_patch16_224"}
    huge = {"embed_dim": 2048, "depth": 64, "num_heads": 2, "mlp_ratio": 8}
    nano = {"library": "transformers", "id": "vit_nano"}
    asked = {
        "timm of 21 GB": {"backbone": {**timm, "kwargs": {"pretrained": False, **huge}}},
        "timm's positions": {"backbone": {**timm, "kwargs": {"pretrained": False, "img_size": 10_000,
                                                            "patch_size": 1}}},
        "timm's channels": {"backbone": {**timm, "id": "resnet50", "kwargs": {"pretrained": False, "in_chans": 1024,
                                                                             "num_classes": 2**20}}},
        "timm's largest": {"backbone": {**timm, "id": "eva02_enormous_patch14_clip_224",
                                        "kwargs": {"pretrained": False}}},
        "timm of 7B": {"backbone": {**timm, "id": "vit_7b_patch16_dinov3.lvd1689m", "kwargs": {}}},
        "timm's windows": {"backbone": {**timm, "id": "swinv2_base_window12_192",
                                        "kwargs": {"pretrained": False, "img_size": 10_000}}},
        "1000 blocks": {"backbone": {**nano, "kwargs": {"num_hidden_layers": 1000}}},
        "large images": {"backbone": {**nano, "kwargs": {"image_size": 10_000}}},
        "queue": {"objective": {"name": "moco", "out_dim": 6, "queue_size": 10**9}},
        "memory": {"objective": {"name": "deepcluster_v2", "out_dim": 128, "num_images": 10**9}},
        "wide head": {"head_options": {"hidden_dim": 2**20}}, "deep head": {"head_options": {"depth": 256}},
        "wide layers": {"head_options": {"hidden_dim": [2**20] * 255, "depth": 256}},
        "prototypes": {"prototypes": {"count": 2**20}}, "wide z": {"out_dim": 2**20}, "wide h": {"in_dim": 2**20},
        "names of 1 MB": {f"k{i}": 1 for i in range(60_000)},
        "scales": {"scales": {f"s{i}": 1.0 for i in range(10_000)}},
    }  # fmt: skip
    for name, entry in asked.items():
        write_config(folder, {**values, **entry})
        yield name, lambda: hfproj.from_pretrained(folder)
    for kind in ("VERA", "LOHA", "LOKR", "OFT", "BOFT", "FOURIERFT", "VBLORA", "HRA", "RANDLORA", "C3A", "SHIRA"):
        for option, number in itertools.product(("r", "n_frequency", "num_vectors", "oft_block_size"), (256, 65_536)):
            write_config(folder, {**values, "backbone_adapter": {"peft_type": kind, option: number}})
            yield f"{kind} {option} {number}", lambda: hfproj.from_pretrained(folder, backbone=backbone)
    write_config(folder, values)
    own = load_file(whole / filenames.ADAPTER_WEIGHTS)
    for count in (19_000, 60_000):
        save_file(own | {f"base_model.model.x.{i}.w": torch.zeros(1) for i in range(count)},
                  folder / filenames.ADAPTER_WEIGHTS)  # fmt: skip
        yield f"{count} more tensors", lambda: hfproj.from_pretrained(folder, backbone=backbone)
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    headers = {
        "a name 40,000 times": b"{" + b",".join([f'"a{i}":1'.encode() for i in range(40_000)] * 2) + b"}",
        "1,000 dimensions": _safetensors({"base_model.model.x": {**entry, "shape": [1] * 1000}}, b"1234"),
        "a long name": _safetensors({"base_model.model." + "x" * 2**22: entry}, b"1234"),
        "lists": _safetensors(b'{"a":[' + b"[]," * 2**21 + b"[]]}"),
        "metadata": _safetensors({"__metadata__": {f"k{i}": "v" for i in range(300_000)}, "a": entry}, b"1234"),
    }
    for name, data in headers.items():
        data = data if data[:1] != b"{" else _safetensors(data)
        (folder / filenames.ADAPTER_WEIGHTS).write_bytes(data)
        yield name, lambda: hfproj.load_head(folder)
    shutil.copyfile(whole / filenames.ADAPTER_WEIGHTS, folder / filenames.ADAPTER_WEIGHTS)


class _Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _zipped(content=None, data=None, compress=zipfile.ZIP_STORED, **records):
    """A file of torch.save with its pickle, or records of it, replaced."""
    file, buffer = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": {"x": torch.zeros(4)}} if content is None else content, file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(buffer, "w", compress) as target:
        for entry in source.infolist():
            name = entry.filename.split("/", 1)[1]
            found = records.get(name, source.read(entry))
            target.writestr(entry.filename, data if name == "data.pkl" and data is not None else found)
    return buffer.getvalue()


def _replaced(old, new, zipped=True):
    """A file of torch.save of 4 zeros with an integer in its pickle replaced."""
    file = io.BytesIO()
    torch.save({"state_dict": {"x": torch.zeros(4)}}, file, _use_new_zipfile_serialization=zipped)
    if not zipped:
        return file.getvalue().replace(old, new, 1)
    with zipfile.ZipFile(file) as archive:
        pickled = next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
    return _zipped(data=pickled.replace(old, new))


def _laughs():
    found = {"x": torch.zeros(1)}
    for _ in range(60):
        found = {"a": found, "b": found}
    return found


def checkpoints(folder, whole):
    """Pickles and archives that grow when they are read, and damaged ones."""
    path, four, many = folder / "a.pth", b"K\x04", b"J\x00\x00\x00\x40"
    itself = {"x": torch.zeros(1)}
    itself["itself"] = itself
    stride = {f"blocks.{i}.w": torch.zeros(1).expand(30_000, 30_000) for i in range(3)}
    one = torch.zeros(1 << 20)
    named = {
        "bomb": _zipped({"x": torch.zeros(1 << 27)}, compress=zipfile.ZIP_DEFLATED),
        "pickle bomb": _zipped(data=pickle.dumps("x" * 2**28, 2), compress=zipfile.ZIP_DEFLATED),
        "storage": _replaced(four, many), "old storage": _replaced(four, many, zipped=False),
        "stride 0": stride, "views of one storage": {f"w{i}": one[i:] for i in range(5000)},
        "laughs": _laughs(), "itself": itself, "bytearray": _Call(bytearray, 10**11),
        "many": {f"layer{i}": torch.zeros(1) for i in range(30_000)}, "long names": {"x" * 10**6: torch.zeros(1)},
        "sparse": {"x": torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (10**10,))},
        "meta": {"x": torch.empty(10**10, device="meta")},
        "range": _Call(list, range(10)), "dtype": _Call(bytes, 10**10),
        "quadratic": _Call(int, "9" * 10**6), "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "frame": b"\x80\x04\x95" + b"\xff" * 8,
        "long text": b"\x80\x02X\xff\xff\xff\xff", "long bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00",
        "array": b"\x80\x05\x96" + struct.pack("<Q", 2**36),
        "deep": {"state_dict": torch.nn.Linear(2, 2).state_dict(), "blocks.99.x": torch.zeros(1),
                 **{f"norm{i}": torch.zeros(100_000) for i in range(3)}},
        "wide": {"cls_token": torch.zeros(1, 1, 200_000), "blocks.0.norm1.weight": torch.zeros(200_000),
                 "blocks.99.norm1.weight": torch.zeros(1), "norm.weight": torch.zeros(200_000)},
    }  # fmt: skip
    for name, content in named.items():
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        yield name, lambda: hfproj.convert(path, "dino", num_heads=8)
    draw = random.Random(0)
    for zipped, number in itertools.product((True, False), range(100)):
        file = io.BytesIO()
        torch.save({"state_dict": {"x": torch.zeros(50)}, "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
        data = bytearray(file.getvalue())
        for _ in range(1 + number % 3):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        yield f"{'zip' if zipped else 'old'} {number}", lambda: read_file(path)


def _answers(measure, data_sets, rows, seeds):
    for dataset, when, seed in itertools.product(range(data_sets), ("before", "after"), range(seeds)):
        own = {"when": when, "dataset": f"d{dataset}", "protocol": {"seed": seed}}
        yield {**measure, **own, "outcomes": f"{rows}:" + f"{(7 * dataset + seed) % 256:02x}" * (rows // 8)}


def _shown(measure):
    """What takes time when it is redacted, drawn or compared, and not when it is read."""
    text, many = (1 << 16) - 8, range(15)
    url = "https://a:" + "b:/" * (text // 4)
    return {
        "one text": {"notes": ["a=" * 2_000_000]},
        "names and values": {"notes": [f"{i}" + "a=" * (text // 2) for i in many]},
        "urls": {"command": url, "notes": [f"{i} {url}" for i in many]},
        "paths": {"notes": [f"/{i}" + " /a" * (text // 3) for i in many]},
        "words": {"notes": ["-a", "b c"] * 200_000}, "answers": {"measurements": list(_answers(measure, 2500, 80, 1))},
        "seeds": {"measurements": list(_answers(measure, 1200, 4000, 2))},
        "many rows": {"measurements": list(_answers(measure, 20, 100_000, 2))},
        "many seeds": {"measurements": list(_answers(measure, 6, 80_000, 12))},
        "more rows than allowed": {"measurements": list(_answers(measure, 1, 80_000_000, 1))},
        "a long history": {"history": [{"step": i, "loss": 0.5 * i, "rankme_h": 1.0} for i in range(200_000)]},
        "spectra": {"spectra": {f"h{i} after": [1.0, 0.5] for i in range(50_000)}},
        "lists": {"config": {"a": [[]] * 900_000}}, "numbers": {"seeds": list(range(900_000))},
    }  # fmt: skip


def read_results(folder, whole):
    """`results.json` that is nested, huge, or takes a table quadratic time."""
    path, sound, knn, count = folder / "results.json", SOUND, KNN, 5000
    named = {
        "deep": b'{"a":' * 10**6,
        "deep list": b"[" * 10**7,
        "integer": b'{"format":' + b"9" * 10**7 + b"}",
        "lists": b'{"a":[' + b"[]," * 2**24 + b"[]]}",
        "digits": b'{"a":0.' + b"1" * 10**7 + b"}",
        "a name twice": b"{" + b",".join(b'"a%d":1' % i for i in range(200_000)) + b',"a1":1}',
        "names": {**sound, "measurements": [{**knn, "name": f"m{i}"} for i in range(count)]},
        "layers": {**sound, "measurements": [{**knn, "layer": f"l{i}"} for i in range(count)]},
        "data sets": {**sound, "measurements": [{**knn, "dataset": f"d{i}"} for i in range(count)]},
        "settings": {**sound, "measurements": [{**knn, "protocol": {f"k{i}": i}} for i in range(count)]},
        "too many": {**sound, "measurements": [knn] * 20_000},
        "history": {**sound, "history": [{"step": [1]}]},
        "rows": {**sound, "measurements": [{**knn, "outcomes": "999999999999:ff"}, {**knn, "when": "before"}]},
        "spectra": {**sound, "spectra": {"h after": [1e308] * 1000}},
        "config": {**sound, "config": {"adapter": [1]}},
    }
    for name, content in named.items():
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        yield name, lambda: hfproj.report(folder)
    draw = random.Random(0)
    text = json.dumps({**sound, "measurements": [knn, {**knn, "when": "before"}]}).encode()
    for number in range(100):
        data = bytearray(text)
        data[draw.randrange(len(data))] = draw.randrange(32, 127)
        path.write_bytes(data)
        yield f"byte {number}", lambda: Results.load(path)


def shown_results(folder, whole):
    """`results.json` that is small, and takes time where it is redacted, compared or drawn: page, card and table."""
    path = folder / "results.json"
    doors = {
        "report": lambda: hfproj.report(folder),
        "card": lambda: write_card(Results.load(path), folder, keep_results=False),
        "table": lambda: Results.load(path).table(),
    }  # fmt: skip
    for name, more in _shown(KNN).items():
        path.write_text(json.dumps(SOUND | more))
        yield from ((f"{name}, {door}", call) for door, call in doors.items())


CATEGORIES = {
    "hostile adapters": (fields, bytes_of_files, large_adapters), ".pth": (checkpoints,), "history": (histories,),
    "results": (read_results, shown_results),
}  # fmt: skip


def cases(category: str, folder: Path, whole: Path):
    """Yield the cases of a category, or of one of its generators: a name and the call that opens the file."""
    for make in CATEGORIES.get(category) or [globals()[category]]:
        yield from ((f"{make.__name__}: {name}", call) for name, call in make(folder, whole))
