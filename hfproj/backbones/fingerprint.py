r"""Which backbone an adapter belongs to: a small description that survives a cast, a copy and a renaming of modules.

Of every tensor up to 512 entries at fixed positions are summed with fixed pseudo-random weights :math:`w`; the sums of
tensors of one shape are added up, :math:`s = \sum_t a_t \sum_i w_i x_{t,i}`, in three ways: with a factor :math:`a_t`
from the tensor's name, with one from the numbers in its name (the index of its block), and with 1. Where the names are
the same the first is compared; where only the numbers are, the second; else the third. So a swap of two layers is seen,
and a renaming of modules is not.

A cast rounds to nearest on every device. The sums are therefore made three times, of the entries as they are and as
rounded to bfloat16 and float16: a model and its cast agree in the sums of the coarser type, up to the order of
summation, while one optimizer step at 1e-5 changes the sums of float32 by a factor of 1e5 more. Two casts of one model
to different types are compared within the rounding error of the coarser one.

Entries that no position falls on are seen where both have the same dtype: the bits of all entries, as whole numbers,
have an exact sum on every device. The statistics of BatchNorm are summed apart.

Of a quantized tensor the values are summed that its codes stand for. Two models quantized in one way agree up to a few
codes (another device may round the other way); quantized and not, or in two ways, up to the rounding to codes, which a
fine-tuning can hide in.
"""

import hashlib
import importlib.metadata
import math
import re
import reprlib
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hfproj.backbones.loading import library_of, quantization_of
from hfproj.backbones.quantized import is_quantized, rounding_of, sampled
from hfproj.backbones.settings import is_setting, module_settings, plain_values, settings_of
from hfproj.backbones.sketches import LEVELS, SAMPLES, positions, rounded, samples_of, sketch, totals_of
from hfproj.files import portable

VERSION = 1
SAME = 1e-9  # of the root of the summed squares: float64 sums in another order differ by 1e-15 of it
FLIPPED = 6  # roundings of one quantized entry by which sums may differ: another device rounds a code or two otherwise
_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_OBJECTS = ("kwargs", "settings", "quantization", "shapes", "quantized", "rounding", "weights", "statistics")
STATISTICS = ("running_mean", "running_var")


# Layer → state of its weight, values and rounding. Not by the weight: tensors with weak references can't be moved.
_SAMPLED: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, tuple[np.ndarray, float] | None]]"
_SAMPLED = weakref.WeakKeyDictionary()


def _sampled(tensor: Tensor, module: nn.Module | None, shape: str) -> tuple[np.ndarray, float] | None:
    """Return the values of a quantized tensor at `positions`, kept while it does not change, and their rounding."""
    state, sizes = (id(tensor), tensor._version, tensor.device, shape), list(map(int, shape.split("x")))
    if module is not None and module in _SAMPLED and _SAMPLED[module][0] == state:
        return _SAMPLED[module][1]
    values = sampled(tensor, module, positions(math.prod(sizes)))
    found = None if values is None else (values, rounding_of(tensor, module, values, sizes[-1]))
    if module is not None:
        _SAMPLED[module] = state, found
    return found


def _shape(tensor: Tensor, module: nn.Module | None, quantized: bool) -> str:
    wide, high = getattr(module, "in_features", None), getattr(module, "out_features", None)
    packed = quantized and isinstance(wide, int) and isinstance(high, int)  # else bitsandbytes' [n / 2, 1]
    return "x".join(map(str, (high, wide) if packed else tensor.shape)) or "1"


def fingerprint(
    backbone: nn.Module, tensors: Mapping[str, Tensor], *, source: Mapping[str, Any] | None = None,
    apart: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Return the fingerprint of a backbone: plain JSON values, a few kilobytes, in milliseconds.

    Args:
        backbone: The backbone, bare or with adapters.
        tensors: Its tensors on which the representation depends, by their names as in `bare_tensors`; the original
            values where an adapter trains them.
        source: Where it comes from, see `source_of`.
        apart: Names of tensors that belong to the adapter and not to the backbone: their shapes count alone.

    Returns:
        "version", "library", its version as "made_with", "id", "revision" and "kwargs" as far as they are known,
        "settings" that no shape shows, "quantization" (transformers' config of it), "dtype" (the coarsest type that
        holds the values), "shapes" ("768x768" → how many), "quantized" (how many of them are) and "rounding" (relative
        error of these), and "weights" and "statistics" (shape → sums).
    """
    modules = _modules(backbone, tensors)
    shapes: dict[str, int] = {}
    packed: dict[str, int] = {}
    read: dict[str, Tensor] = {}
    codes: dict[str, np.ndarray] = {}
    rounding: dict[str, float] = {}
    shape_of: dict[str, str] = {}
    for name, tensor in tensors.items():
        quantized, module = is_quantized(tensor), modules.get(name.rpartition(".")[0])
        shape = shape_of[name] = _shape(tensor, module, quantized)
        if not quantized and not tensor.is_floating_point():
            continue  # counters
        shapes[shape] = shapes.get(shape, 0) + 1
        if quantized:
            packed[shape] = packed.get(shape, 0) + 1
            if not tensor.is_meta and (known := _sampled(tensor, module, shape)) is not None:
                codes[name], error = known
                rounding[shape] = max(error, rounding.get(shape, 0.0))
        elif name not in apart and not tensor.is_meta and tensor.numel():
            read[name] = tensor
    samples, totals = samples_of(read), totals_of(read)
    groups: dict[str, dict[str, dict[str, np.ndarray]]] = {"weights": {}, "statistics": {}}
    for name, values in (samples | codes).items():
        kind = "statistics" if name.rpartition(".")[2] in STATISTICS else "weights"
        groups[kind].setdefault(shape_of[name], {})[name] = values
    found = {
        "version": VERSION,
        "library": library_of(backbone),
        "made_with": _version_of(library_of(backbone)),
        "revision": getattr(getattr(backbone, "config", None), "_commit_hash", None),
        **origin(source),
        "settings": _settings(backbone, modules),
        "quantization": quantization_of(backbone),
        "dtype": _dtype(read, samples),
        "shapes": shapes,
        "quantized": packed,
        "rounding": rounding,
        **{kind: {shape: sketch(part, totals) for shape, part in found.items()} for kind, found in groups.items()},
    }
    return {name: value for name, value in found.items() if value not in (None, {})}


def origin(source: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a fingerprint says of a backbone's source, without paths of this machine."""
    known = {"id": (source or {}).get("id"), "revision": (source or {}).get("revision")}
    return {n: portable(v) for n, v in known.items() if v} | {
        "kwargs": plain_values((source or {}).get("kwargs") or {})
    }


def _dtype(tensors: Mapping[str, Tensor], samples: Mapping[str, np.ndarray]) -> str | None:
    """Return the coarsest type that holds the values, which a model that was cast back and forth keeps."""
    declared = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
    for level in ("bfloat16", "float16"):
        if level in declared:
            return level
    if not samples:
        return None
    values = np.concatenate(list(samples.values()))
    exact = [level for level in ("bfloat16", "float16") if np.array_equal(rounded(values, level), values)]
    return exact[0] if exact and np.unique(values).size > 2 else "float32"


def _modules(backbone: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the backbone's own modules that hold the tensors `names`, named as if there were no adapter."""
    parts = [name.split(".") for name in names]
    holders = {".".join(part[:end]) for part in parts for end in range(len(part))}
    bare = ((re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", n), m) for n, m in backbone.named_modules())
    return {name: module for name, module in bare if name in holders}  # what a PEFT layer wraps comes after it


def _settings(backbone: nn.Module, holders: Collection[str]) -> dict[str, Any]:
    """Return settings that change what the backbone computes and that no shape shows."""
    library = library_of(backbone)
    if library == "transformers":
        return settings_of(backbone)
    return module_settings(backbone, holders, whole=library == "timm")


def _version_of(library: str) -> str:
    return importlib.metadata.version(library).partition("+")[0]


def is_fingerprint(value: Any) -> bool:
    """Return whether `value`, which a third party may have written, has the form of a fingerprint."""
    if not isinstance(value, dict) or not isinstance(value.get("version"), int):
        return False
    texts = (value.get(n) for n in ("library", "made_with", "id", "revision", "dtype", "sha256", "instead_of"))
    if not all(t is None or (isinstance(t, str) and len(t) <= 200 and t.isprintable()) for t in texts):
        return False
    if not all(isinstance(value.get(n, {}), dict) for n in _OBJECTS):
        return False
    if not all(map(is_setting, value.get("settings", {}).values())):
        return False
    counts = (n for part in ("shapes", "quantized") for n in value.get(part, {}).values())
    names = (n for part in _OBJECTS for n in value.get(part, {}))
    sizes = (shape for part in ("shapes", "weights", "statistics") for shape in value.get(part, {}))
    if not all(re.fullmatch(r"\d{1,18}(x\d{1,18})*", shape) for shape in sizes):
        return False
    errors = value.get("rounding", {}).values()
    if not all(type(n) is int for n in counts) or not all(type(n) in (int, float) and 0 <= n <= 10 for n in errors):
        return False
    if not all(len(n) <= 200 and n.isprintable() for n in names):
        return False
    sketches = (s for part in ("weights", "statistics") for s in value.get(part, {}).values())
    return value["version"] != VERSION or all(map(_is_sketch, sketches))


def _is_sketch(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 6 + len(LEVELS) or not all(type(n) is int for n in value[:3]):
        return False
    if not (value[-2] is None or isinstance(value[-2], str)) or type(value[-1]) is not int:
        return False
    sums = [n for part in value[4:-2] for n in (part if isinstance(part, list) and len(part) == 3 else [None])]
    return all(type(n) in (int, float) for n in [value[3], *sums])


@dataclass(frozen=True)
class Comparison:
    """What became of a backbone since its fingerprint was taken.

    `kind` is "same", "cast" (the same weights in another precision), "quantized" (what can be compared is the same),
    "unknown" (nothing could be compared), "statistics" (BatchNorm's alone differ), "weights" or "structure"; `words`
    say what differs.
    """

    kind: str
    words: str = ""

    @property
    def refused(self) -> bool:
        """Whether another backbone was meant."""
        return self.kind in ("statistics", "weights", "structure")


def compare(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Comparison:
    """Compare the fingerprint of the backbone that an adapter was made on with that of another one.

    Example:
        >>> compare({"shapes": {"8x8": 2}}, {"shapes": {"8x8": 3}}).words
        'it has 3 tensors of 8x8, expected 2'
    """
    if saved.get("version", VERSION) != VERSION:
        return Comparison("unknown", f"the fingerprint is of version {saved['version']}, which is not known here")
    differences = _structure(saved, current)
    if differences:
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        return Comparison("structure", "; ".join(differences[:4]) + more)
    packed = [part.get("quantized", {}) for part in (saved, current)]
    one_way = packed[0] == packed[1] and _same_quantization(saved, current)
    held = [part.get("dtype") for part in (saved, current)]
    level = max((dtype for dtype in held if dtype in LEVELS), key=lambda dtype: _ROUNDOFF[dtype], default=LEVELS[0])
    loose = None not in held and held[0] != held[1] and LEVELS[0] not in held  # two casts of a third
    wrong: dict[str, list[str]] = {}
    seen, untold = 0, list[str]()
    for kind in ("weights", "statistics"):
        before, now = saved.get(kind, {}), current.get(kind, {})
        untold += [shape for shape in now if shape not in before and one_way]
        for shape in sorted(before.keys() & now.keys()):
            if before[shape][0] == now[shape][0]:  # else some can't be read
                seen += 1
                parts = [(saved, packed[0]), (current, packed[1])]
                errors = [part.get("rounding", {}).get(shape, 0.0) if shape in codes else 0.0 for part, codes in parts]
                slack = 5 * sum(errors)  # standard deviations
                if one_way and held[0] == held[1]:
                    slack = FLIPPED * errors[0] / math.sqrt(_entries(before[shape][0], shape))
                alike = held[0] != held[1] or _same_bits(before[shape], now[shape])
                if not alike or not _agree(before[shape], now[shape], level, loose, slack):
                    wrong.setdefault(kind, []).append(shape)
    if "weights" in wrong:
        shapes = wrong["weights"]
        return Comparison("weights", f"tensors of {', '.join(shapes[:3])}{' and others' * (len(shapes) > 3)} differ")
    if wrong:
        return Comparison("statistics", "only the running statistics of its BatchNorm differ")
    if not one_way:
        counts = [sum(part.values()) for part in packed]
        said = f"{counts[1]} of its tensors are quantized, {counts[0]} were"
        return Comparison("quantized", f"{said}; up to rounding its weights agree")
    if untold:
        return Comparison("unknown", f"the fingerprint holds no sums of tensors of {', '.join(untold[:3])}")
    if not seen:
        return Comparison("same" if not saved.get("weights") else "unknown", "its weights are not in memory")
    if held[0] != held[1]:
        return Comparison("cast", f"its weights are {held[1]}, they were {held[0]}")
    return Comparison("same")


def _structure(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return in words what differs in settings and shapes."""
    found = []
    if saved.get("library") == current.get("library"):  # another library has other names for them
        before, now = saved.get("settings", {}), current.get("settings", {})
        same_version = saved.get("made_with") == current.get("made_with")
        shared = [n for n in sorted(before.keys() & now.keys()) if same_version or _lasts(n, before[n], now[n])]
        for name in (n for n in shared if before[n] != now[n]):
            there, wanted = _apart(now[name], before[name])
            found.append(f"its {name} is {there}, expected {wanted}")
    before, now = saved.get("shapes", {}), current.get("shapes", {})
    for shape in sorted(before.keys() | now.keys(), key=lambda shape: (before.get(shape, 0), shape), reverse=True):
        wanted, there = before.get(shape, 0), now.get(shape, 0)
        if wanted != there:
            count = f"{there or 'no'} tensor{'' if there == 1 else 's'}"
            found.append(f"it has {count} of {shape}, expected {wanted or 'none'}")
    return found


def _lasts(name: str, before: Any, now: Any) -> bool:
    """Whether a setting means the same in other versions of its library: a value of a config, of torch's modules."""
    if isinstance(before, list) and "." not in name:
        return name in ("num_heads", "eps")
    return before is not None and now is not None


def _apart(one: Any, other: Any) -> tuple[str, str]:
    """Return two values of a setting as text; of lists, what only one of them has."""
    if not isinstance(one, list) or not isinstance(other, list):
        return reprlib.repr(one), reprlib.repr(other)
    alone = [[v for v in a if v not in b] for a, b in ((one, other), (other, one))]
    shown = [part or whole for part, whole in zip(alone, (one, other), strict=True)]
    return ", ".join(map(str, shown[0][:4])), ", ".join(map(str, shown[1][:4]))


def _same_quantization(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Return whether two configs of quantization agree in all that both have: versions of transformers add to them."""
    before, now = saved.get("quantization"), current.get("quantization")
    if not before or not now:
        return not before and not now
    return all(before[name] == now[name] for name in before.keys() & now.keys())


def _entries(count: int, shape: str) -> int:
    return count * min(math.prod(map(int, shape.split("x"))), SAMPLES)


def _same_bits(saved: list[Any], current: list[Any]) -> bool:
    """Return whether the sums of all bits agree, as far as both have one of the same dtype."""
    return None in (saved[-2], current[-2]) or saved[-2] != current[-2] or saved[-1] == current[-1]


def _agree(saved: list[Any], current: list[Any], level: str, loose: bool, slack: float) -> bool:
    """Return whether the sums of one shape agree, up to `slack`, in the strictest way that the names allow."""
    which = 0 if saved[1] == current[1] else 1 if saved[2] == current[2] else 2
    one, other = (part[4 + LEVELS.index(level)][which] for part in (saved, current))
    scale = current[3]
    # Between two casts of a third model an entry may be off by one unit in the last place; weights and factors are at
    # most 1.5, and errors of random sign add up like their squares: six standard deviations.
    return abs(one - other) <= scale * max(6 * 1.5 * _ROUNDOFF[level] if loose else SAME, slack)


_DIGESTS: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]]" = weakref.WeakKeyDictionary()


def digest(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """Return the SHA-256 of all bytes of `tensors`, dtypes and shapes included, in the order of their names.

    It does not depend on how files hold them. It is kept with the backbone until a tensor is changed in place: reading
    a ViT-B takes 0.3 s. None where tensors are sharded, quantized or not in memory.
    """
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in tensors.values()):
        return None
    state = tuple((name, t.data_ptr(), t._version, t.dtype) for name, t in sorted(tensors.items()))
    if (kept := _DIGESTS.get(backbone)) is not None and kept[0] == state:
        return kept[1]
    found = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    _DIGESTS[backbone] = state, found.hexdigest()
    return found.hexdigest()
