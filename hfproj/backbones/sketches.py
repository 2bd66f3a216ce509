"""Sums of a tensor's entries that a fingerprint keeps, see `hfproj.backbones.fingerprint`."""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 512  # entries of a tensor
LEVELS = ("float32", "bfloat16", "float16")


def _hashed(numbers: np.ndarray) -> np.ndarray:
    """Return a fixed pseudo-random number in [0, 1) for each whole number (the finalizer of MurmurHash3)."""
    h = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = (h ^ (h >> np.uint64(33))) * np.uint64(factor)
    return ((h ^ (h >> np.uint64(33))) >> np.uint64(11)).astype(np.float64) / 2.0**53


def positions(size: int) -> np.ndarray:
    """Return which entries of a tensor with `size` entries are read: one from each of 512 equal parts."""
    if size <= SAMPLES:
        return np.arange(size)
    places = np.arange(SAMPLES)
    return np.minimum(((places + _hashed(places + SAMPLES)) * (size / SAMPLES)).astype(np.int64), size - 1)


def samples_of(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the entries at `positions` of each tensor in float64, read with one transfer per device and dtype."""
    found: dict[str, np.ndarray] = {}
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        alike.setdefault((tensor.device, tensor.dtype), []).append(name)
    for (device, dtype), names in alike.items():
        places = {n: torch.from_numpy(positions(n)).to(device) for n in {tensors[name].numel() for name in names}}
        read = [tensors[name].detach().reshape(-1)[places[tensors[name].numel()]] for name in names]
        wide = torch.float32 if dtype != torch.float64 else dtype
        values = torch.cat(read).to("cpu", wide).nan_to_num().double().numpy()
        cuts = np.cumsum([len(part) for part in read])[:-1]
        found |= dict(zip(names, np.split(values, cuts), strict=True))
    return found


def rounded(values: np.ndarray, level: str) -> np.ndarray:
    """Return values as they are in a narrower type; what overflows it is 0."""
    return torch.from_numpy(values).to(getattr(torch, level)).double().nan_to_num(posinf=0.0, neginf=0.0).numpy()


def _factor(text: str) -> float:
    """Return a fixed number in ±[0.5, 1.5) for a text."""
    value = float(_hashed(np.array([zlib.crc32(text.encode())]))[0])
    return (2 * value + 0.5) if value < 0.5 else -(2 * value - 0.5)


def _numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part.isdigit())


def _crc(texts: Iterable[str]) -> int:
    return zlib.crc32("\n".join(sorted(texts)).encode())


def totals_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, int]]:
    """Return dtype and the sum of the bits of all entries, as whole numbers, for tensors of common types."""
    found: dict[str, tuple[str, int]] = {}
    later: list[tuple[str, Tensor]] = []
    for name, tensor in tensors.items():
        width = tensor.element_size()
        if type(tensor) not in (Tensor, nn.Parameter) or width < 2 or tensor.device.type not in ("cpu", "cuda"):
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        bits = tensor.detach().reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[width])
        if tensor.device.type == "cpu":  # four times as fast as torch's own sum of whole numbers
            found[name] = kind, int(np.add.reduce(bits.numpy(), dtype=np.int64))
        else:
            found[name] = kind, 0
            later.append((name, bits.sum(dtype=torch.int64)))
    if later:
        sums = torch.stack([total for _, total in later]).tolist()
        found |= {name: (found[name][0], total) for (name, _), total in zip(later, sums, strict=True)}
    return found


def sketch(samples: Mapping[str, np.ndarray], totals: Mapping[str, tuple[str, int]]) -> list[Any]:
    """Return what is kept of tensors of one shape.

    That is: count, digests of their names, scale, sums for each level, and their dtype with the sum of their bits, or
    None and 0 where they have several or this can't be told.
    """
    names = sorted(samples)
    values = np.stack([samples[name] for name in names])
    hashed = _hashed(np.arange(values.shape[1]))
    weights = np.where(hashed < 0.5, 2 * hashed + 0.5, 0.5 - 2 * hashed)  # ± up to 1.5
    factors = [[_factor(n) for n in names], [_factor(_numbers(n)) for n in names], [1.0] * len(names)]
    sums = [[float(np.dot(f, rounded(values, level) @ weights)) for f in factors] for level in LEVELS]
    scale = float(np.sqrt(np.square(values * weights).sum()))
    kinds = {totals[name][0] if name in totals else None for name in names}
    whole = (
        [kinds.pop(), sum(totals[name][1] for name in names)] if len(kinds) == 1 and None not in kinds else [None, 0]
    )
    return [len(names), _crc(names), _crc(map(_numbers, names)), scale, *sums, *whole]
