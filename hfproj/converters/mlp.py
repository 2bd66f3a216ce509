"""Reading the layers of an official head, predictor or bottleneck as one of our heads.

Official heads are chains

    (Linear, [BatchNorm], activation) × (depth − 1),  Linear, [BatchNorm],

whose modules are counted from 0 (``nn.Sequential``) or have names of their own. Which biases and norms there are is the
family's structure, an :class:`MLP`; depth and widths are read from the file. So every tensor that has to be there is
known by name, and a missing one can be told.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Problems:
    """What is not as it should be, in the words of the file."""

    missing: list[str] = field(default_factory=list)  # keys that have to be there
    unexpected: list[str] = field(default_factory=list)  # keys that have no place
    shapes: list[str] = field(default_factory=list)  # sentences on tensors of a wrong shape

    @property
    def problems(self) -> int:
        """How many keys and shapes are wrong."""
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def add(self, other: "Problems") -> None:
        """Add what is wrong about a part."""
        self.missing += other.missing
        self.unexpected += other.unexpected
        self.shapes += other.shapes


@dataclass
class Found(Problems):
    """What was read of a head."""

    head: str = ""  # name of our head; empty where nothing could be read
    options: dict[str, Any] = field(default_factory=dict)  # with out_dim
    state: dict[str, Tensor] = field(default_factory=dict)
    in_dim: int = 0


@dataclass(frozen=True)
class MLP:
    """The structure of an official head: biases and BatchNorm of its hidden layers and of its last one."""

    bias: bool = True
    norm: bool = False
    last_bias: bool = True
    last_norm: bool = False
    last_affine: bool = True  # whether that BatchNorm has scale and shift
    last_shift: bool = True  # False: its shift is 0 by construction (TensorFlow's ``center=False``) and left out
    activation: str = "relu"
    batch_statistics: str = "per_view"  # "joint" where the official code runs the head once on all views
    init: str = "default"  # of a head made anew with these options
    names: tuple[str, ...] = ()  # of the modules, activations as "", where they are no numbers; ("",): one linear layer
    min_depth: int = 2  # linear layers
    max_depth: int = 99

    def read(self, tensors: Mapping[str, Tensor], prefix: str) -> Found:
        """Read the tensors below `prefix`, given under their names there."""
        by_position, unexpected = self._positions(tensors)
        depth = self._depth(by_position)
        # what has to be there → where it goes
        expected = {(at, leaf): ours + leaf for at, ours, leaves in self._modules(depth) for leaf in leaves}
        found = Found(unexpected=[prefix + key for key in unexpected])
        found.unexpected += [prefix + key for at, key in by_position.items() if at not in expected]
        found.missing = [prefix + self._key(*at) for at in expected if at not in by_position]
        if found.missing:
            return found
        found.state = {ours: tensors[by_position[at]] for at, ours in expected.items()}
        read = {at: by_position[at] for at in expected}
        found.shapes = [prefix + said for said in self._wrong_shapes(depth, read, tensors)]
        if not found.shapes:
            self._describe(found, depth)
        return found

    def _key(self, position: int, leaf: str) -> str:
        name = self.names[position] if self.names else str(position)
        return f"{name}.{leaf}" if name else leaf

    def _positions(self, tensors: Mapping[str, Tensor]) -> tuple[dict[tuple[int, str], str], list[str]]:
        known = {name: i for i, name in enumerate(self.names) if name or len(self.names) == 1}
        by_position, unexpected = {}, []
        for key in tensors:
            name, _, leaf = key.rpartition(".")
            numbered = not self.names and re.fullmatch(r"[0-9]{1,3}", name)
            position = int(name) if numbered else known.get(name)
            if position is None:
                unexpected.append(key)
            else:
                by_position[position, leaf] = key
        return by_position, unexpected

    def _depth(self, by_position: Mapping[tuple[int, str], str]) -> int:
        if self.names:
            return 1 if self.names == ("",) else 1 + self.names.count("")  # an activation after each hidden layer
        length = 1 + max((position for position, _ in by_position), default=-1)
        hidden = -(-(length - 1 - self.last_norm) // (2 + self.norm))  # rounded up: the last module may be missing
        return min(max(hidden + 1, self.min_depth), self.max_depth)

    def _modules(self, depth: int) -> list[tuple[int, str, tuple[str, ...]]]:
        """Return (position, prefix of ours, tensors) of every module with tensors."""
        modules: list[tuple[int, str, tuple[str, ...]]] = []
        for layer in range(depth):
            last = layer == depth - 1
            ours = "last." if last else f"hidden.{layer}."
            position, bias = layer * (2 + self.norm), self.last_bias if last else self.bias
            modules.append((position, f"{ours}linear.", ("weight", "bias") if bias else ("weight",)))
            if self.last_norm if last else self.norm:
                affine = ("weight", "bias") if self.last_affine or not last else ()
                modules.append((position + 1, f"{ours}norm.", (*affine, *_NORM_BUFFERS)))
        if depth > 1:
            return modules
        return [(position, ours.removeprefix("last."), leaves) for position, ours, leaves in modules]  # our "linear"

    def _wrong_shapes(
        self, depth: int, by_position: Mapping[tuple[int, str], str], tensors: Mapping[str, Tensor]
    ) -> list[str]:
        weights = [tensors[by_position[layer * (2 + self.norm), "weight"]] for layer in range(depth)]
        if flat := [self._key(i * (2 + self.norm), "weight") for i, w in enumerate(weights) if w.ndim != 2]:
            return [f"{key}: expected the matrix of a linear layer" for key in flat]
        said = []
        for layer, (before, weight) in enumerate(pairwise(weights), start=1):
            if weight.shape[1] != before.shape[0]:
                key = self._key(layer * (2 + self.norm), "weight")
                said.append(f"{key} has shape {list(weight.shape)}, expected [{weight.shape[0]}, {before.shape[0]}]")
        for (position, leaf), key in by_position.items():
            width = weights[min(position // (2 + self.norm), depth - 1)].shape[0]
            expected = [] if leaf == "num_batches_tracked" else [width]
            is_weight = leaf == "weight" and position % (2 + self.norm) == 0
            if not is_weight and list(tensors[key].shape) != expected:
                said.append(f"{key} has shape {list(tensors[key].shape)}, expected {expected}")
        return said

    def _describe(self, found: Found, depth: int) -> None:
        """Fill in the name and the options of our head."""
        weights = [w for name, w in found.state.items() if name.endswith("linear.weight")]
        *hidden, out_dim = [weight.shape[0] for weight in weights]
        found.in_dim = weights[0].shape[1]
        if depth == 1:
            norm = {"norm": "batch"} if self.last_norm else {}
            found.head, found.options = "linear", {"out_dim": out_dim, "bias": self.last_bias, **norm}
            return
        widths = {"hidden_dim": hidden[0] if len(set(hidden)) == 1 else hidden, "out_dim": out_dim}
        layers = {"norm": "batch" if self.norm else None, "bias": self.bias, "last_bias": self.last_bias}
        options: dict[str, Any] = {"depth": depth, **widths, **layers}
        if self.activation != "relu":
            options["activation"] = self.activation
        if self.last_norm:
            options |= {"last_norm": "batch", "last_affine": self.last_affine}
            if self.last_affine and not self.last_shift and not found.state["last.norm.bias"].any():
                options["last_affine"] = "scale"
                del found.state["last.norm.bias"]
        if self.batch_statistics != "per_view" and (self.norm or self.last_norm):
            options["batch_statistics"] = self.batch_statistics
        if self.init != "default":
            options["init"] = self.init
        found.head, found.options = "mlp", options


def best(structures: tuple[MLP, ...], tensors: Mapping[str, Tensor], prefix: str) -> Found:
    """Return what the structure reads that fits best, the first of those that fit alike.

    Example:
        >>> import torch
        >>> tensors = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).state_dict()
        >>> found = best((MLP(norm=True), MLP()), tensors, "fc.")
        >>> found.head, found.options["hidden_dim"], found.missing
        ('mlp', 4, [])
    """
    return min((structure.read(tensors, prefix) for structure in structures), key=lambda found: found.problems)
