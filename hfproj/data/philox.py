"""Random numbers that are a pure function of (seed, epoch, index, view): Philox4x32-10 over a whole batch.

A counter-based generator has no state: each number is a block cipher of its counter, so a batch is drawn with a few
array operations, and neither order, rank nor worker can matter. The counter is ``(index low, index high, epoch,
view · 2¹⁶ + block)``, the key is the seed. numpy's and torch's own generators have one state for one image: 60 numbers
for each of 256 images take 3.1 and 1.1 ms of one core with a new generator per image, 0.2 ms here.

References:
    Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3 and table 2.
"""

import numpy as np
from jaxtyping import Float64, Integer, UInt64

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: UInt64[np.ndarray, "*shape 4"], key: tuple[int, int]) -> UInt64[np.ndarray, "*shape 4"]:
    """Return four 32-bit words for each counter of four 32-bit words.

    Example (a known answer of the authors' Random123 library):
        >>> [f"{word:x}" for word in philox4x32(np.zeros(4, dtype=np.uint64), (0, 0))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = (counter[..., i] for i in range(4))
    for turn in range(10):
        low, high = (np.uint64((word + turn * step) & 0xFFFFFFFF) for word, step in zip(key, _WEYL))
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> _SHIFT) ^ b ^ low, second & _LOW, (first >> _SHIFT) ^ d ^ high, first & _LOW
    return np.stack((a, b, c, d), axis=-1)


def uniforms(
    count: int, *, seed: int, epoch: Integer[np.ndarray, " batch"], index: Integer[np.ndarray, " batch"], view: int
) -> Float64[np.ndarray, "batch {count}"]:
    """Return `count` uniform numbers in the open interval (0, 1) for each sample.

    Example:
        >>> both = uniforms(5, seed=0, epoch=np.array([1, 1]), index=np.array([7, 8]), view=0)
        >>> alone = uniforms(3, seed=0, epoch=np.array([1]), index=np.array([8]), view=0)
        >>> bool((both[1, :3] == alone[0]).all())
        True
    """
    blocks = -(-count // 4)
    index, epoch = index.astype(np.int64).view(np.uint64), epoch.astype(np.int64).view(np.uint64)
    counter = np.empty((len(index), blocks, 4), dtype=np.uint64)
    counter[..., 0] = (index & _LOW)[:, None]
    counter[..., 1] = (index >> _SHIFT)[:, None]
    counter[..., 2] = (epoch & _LOW)[:, None]
    counter[..., 3] = np.arange(blocks, dtype=np.uint64) + np.uint64(view << 16)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return ((words.reshape(len(index), -1)[:, :count] + 0.5) / 2.0**32).astype(np.float64)
