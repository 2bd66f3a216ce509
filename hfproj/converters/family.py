"""What a family of official checkpoints looks like, and sorting a file's tensors by that.

A :class:`Layout` says below which names backbone, head, predictor and prototypes lie and which tensors are left out and
why; the longest name that fits decides. A :class:`Family` has one layout or several (ports of one method, files of
training and of release), for each of its networks (student and teacher, query and key).
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfproj.converters.mlp import MLP, Found, Problems, best
from hfproj.errors import AdapterFileError, UsageError, unknown

_WRAPPERS = re.compile(r"^(module\.)+|\b(_orig_mod|_fsdp_wrapped_module)\.")  # of DDP, torch.compile and FSDP
# what training scripts save beside networks
_NO_NETWORKS = {
    "amp", "args", "config", "dino_loss", "epoch", "fp16_scaler", "optimizer", "scaler", "scheduler", "steps",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where the parts lie in a checkpoint.

    Args:
        backbone: What the backbone's keys begin with.
        head: What the head's keys begin with; None where it has no tensors.
        structures: What the head may look like.
        fixed: Name and options of a head without tensors.
        inside: Key of the file below which the state dict lies; "" where the file itself is one.
        predictor: What the predictor's keys begin with.
        predictor_structures: What the predictor may look like.
        prototypes: What the prototypes' keys begin with.
        ignored: What further keys begin with, and why they are left out.
        rename: Patterns of the backbone's names and what replaces them, tried in their order until one fits.
        rows: Name of the prototypes' rows; "weight_v" has lengths "weight_g" beside it, as weight normalisation has it.
    """

    backbone: str
    head: str | None
    structures: tuple[MLP, ...] = ()
    fixed: tuple[str, dict[str, Any]] | None = None
    inside: str = ""
    predictor: str | None = None
    predictor_structures: tuple[MLP, ...] = ()
    prototypes: str | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)
    rename: tuple[tuple[str, str], ...] = ()
    rows: str = "weight"


@dataclass(frozen=True)
class Family:
    """A family of official checkpoints.

    Args:
        name: How it is called.
        line: What it is, for lists.
        source: The official repositories.
        networks: Names of the networks in a file, the one that the authors evaluate first.
        layouts: Network → layouts of a file that holds it.
        num_heads: Width of a ViT → number of its attention heads, which no shape shows; None where unknown.
        timm_ids: (width, depth, patch) of a ViT → timm's name of it, where it has one of this family.
        options: Further options of `layouts` with their defaults; a tuple lists what can be chosen, the default first.
        full_file: What to look for where a file holds a backbone alone.
    """

    name: str
    line: str
    source: str
    layouts: Callable[..., tuple[Layout, ...]]
    networks: tuple[str, ...] = ("online",)
    num_heads: Callable[[int], int | None] = lambda width: None
    timm_ids: Mapping[tuple[int, int, int], str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    full_file: str = "the checkpoint that training saved"


@dataclass
class Parts(Problems):
    """A file's tensors, sorted.

    Attributes:
        backbone: Name in the architecture → (key in the file, tensor).
        head: The head.
        predictor: The predictor, if the layout has one.
        prototypes: Rows `[count, dim]`, if there are any.
        lengths: Of the rows `[count]`, where they were learned.
        ignored: Key → why it was left out.
    """

    backbone: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    head: Found = field(default_factory=Found)
    predictor: Found | None = None
    prototypes: Tensor | None = None
    lengths: Tensor | None = None
    ignored: dict[str, str] = field(default_factory=dict)


def settle(family: Family, network: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `family.layouts` is called with: the choices of the caller, and the defaults of the others.

    Raises:
        UsageError: the family has no such network, option or value.
    """
    what = f"{{}} of {family.name!r}:"
    for name in options:
        if name not in family.options:
            if not family.options:
                raise UsageError(f"{family.name!r} has no option {name!r}; it takes network, num_heads and backbone.")
            raise unknown(what.format("option"), name, family.options)
    found: dict[str, Any] = {"network": network or family.networks[0]}
    if found["network"] not in family.networks:
        raise unknown(what.format("network"), network, family.networks)
    for name, default in family.options.items():
        choices = default if isinstance(default, tuple) else None
        value = options.get(name)
        found[name] = (choices[0] if choices else default) if value is None else value
        if choices and found[name] not in choices:
            raise unknown(what.format(name), value, choices)
    return found


class Content:
    """What a file holds, by the name of the dictionary in it that is a state dict.

    Args:
        content: The file's dictionary.
    """

    def __init__(self, content: Mapping[str, Any]):
        self.content = content
        self._read: dict[str, dict[str, Tensor]] = {}

    def below(self, inside: str) -> dict[str, Tensor]:
        """Return the tensors below `inside`, or, without it, of the whole file; names inside names follow a dot."""
        inside = inside if isinstance(self.content.get(inside), Mapping) else ""
        if inside not in self._read:
            found = self.content[inside] if inside else self.content
            tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
            if not inside and tensors:
                self._read[inside] = _strip(tensors)
            else:
                self._read[inside] = _flat({k: v for k, v in found.items() if inside or k not in _NO_NETWORKS})
        return self._read[inside]


def sort(content: Content, family: Family, choices: Mapping[str, Any]) -> Parts:
    """Return the parts by the layout that fits best, with what is wrong about them."""
    layouts = family.layouts(**choices)
    return min((_sorted(content.below(of.inside), of) for of in layouts), key=lambda parts: parts.problems)


def _flat(content: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            found[str(key)] = value
        elif isinstance(value, Mapping):
            found |= {f"{key}.{name}": tensor for name, tensor in _flat(value).items()}
    return _strip(found)


def _strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stripped = {_WRAPPERS.sub("", key): tensor for key, tensor in tensors.items()}
    for key in [key for key in stripped if key.endswith("running_mean")]:
        count = f"{key.removesuffix('running_mean')}num_batches_tracked"
        stripped.setdefault(count, torch.tensor(0))  # files of torch before 0.4.1 have none
    return stripped


def _sorted(state: Mapping[str, Tensor], layout: Layout) -> Parts:
    rules = {layout.backbone: "backbone", **dict.fromkeys(layout.ignored, "ignored")}
    named = {"head": layout.head, "predictor": layout.predictor, "prototypes": layout.prototypes}
    rules |= {prefix: part for part, prefix in named.items() if prefix is not None}
    parts = Parts()
    sorted_: dict[str, dict[str, Tensor]] = {part: {} for part in named}
    for key, tensor in state.items():
        prefix = max((rule for rule in rules if key.startswith(rule)), key=len, default=None)
        if prefix is None:
            parts.unexpected.append(key)
        elif rules[prefix] == "ignored":
            parts.ignored[key] = layout.ignored[prefix]
        elif rules[prefix] == "backbone":
            parts.backbone[_renamed(key.removeprefix(prefix), layout.rename)] = (key, tensor)
        else:
            sorted_[rules[prefix]][key.removeprefix(prefix)] = tensor
    if not parts.backbone:
        parts.missing.append(f"{layout.backbone}*")
    if layout.fixed is not None:
        parts.head = Found(head=layout.fixed[0], options=dict(layout.fixed[1]))
    if layout.head is not None:
        parts.head = best(layout.structures, sorted_["head"], layout.head)
    if layout.predictor is not None:
        parts.predictor = best(layout.predictor_structures, sorted_["predictor"], layout.predictor)
    if layout.prototypes is not None:
        _read_prototypes(parts, sorted_["prototypes"], layout)
    for found in filter(None, (parts.head, parts.predictor)):
        parts.missing += found.missing
        parts.unexpected += found.unexpected
        parts.shapes += found.shapes
    _check_widths(parts, layout)
    return parts


def _renamed(name: str, rename: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rename:
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def _read_prototypes(parts: Parts, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Read rows, weight-normalised rows (``weight_v`` and their lengths ``weight_g``), or several blocks of rows."""
    assert layout.prototypes is not None
    normed = {"weight_v": "weight_g", "parametrizations.weight.original1": "parametrizations.weight.original0"}
    blocks = sorted(
        (key for key in tensors if re.fullmatch(r"prototypes[0-9]{1,3}\.weight", key)), key=lambda k: int(k[10:-7])
    )
    rows = next((key for key in (*normed, "weight") if key in tensors), None)
    used: set[str] = set(blocks)
    if rows is not None:
        used = {rows}
        parts.prototypes = tensors[rows]
        if rows in normed:
            lengths = normed[rows]
            used.add(lengths)
            if lengths not in tensors:
                parts.missing.append(layout.prototypes + lengths)
            elif tensors[lengths].numel() != len(tensors[rows]):
                parts.shapes.append(
                    f"{layout.prototypes}{lengths} has shape {list(tensors[lengths].shape)}, expected "
                    f"[{len(tensors[rows])}, 1]"
                )
            elif (tensors[lengths] != 1).any():
                parts.lengths = tensors[lengths].flatten()
    elif blocks:
        gaps = {f"prototypes{i}.weight" for i in range(int(blocks[-1][10:-7]))} - used
        parts.missing += [layout.prototypes + key for key in gaps]
        if len({tensors[key].shape[1:] for key in blocks}) == 1:
            parts.prototypes = torch.cat([tensors[key] for key in blocks])
        else:
            parts.shapes += [f"{layout.prototypes}{key} has shape {list(tensors[key].shape)}" for key in blocks]
    else:
        parts.missing.append(layout.prototypes + layout.rows)
    parts.unexpected += [layout.prototypes + key for key in tensors if key not in used]


def _check_widths(parts: Parts, layout: Layout) -> None:
    """Refuse parts that can't follow one another."""
    out_dim = parts.head.options.get("out_dim")
    if out_dim is None:
        return
    if parts.predictor is not None and parts.predictor.head:
        widths = parts.predictor.in_dim, parts.predictor.options["out_dim"]
        if widths != (out_dim, out_dim):
            parts.shapes.append(
                f"{layout.predictor}* leads from {widths[0]} to {widths[1]} features, but the head {layout.head}* "
                f"gives {out_dim}"
            )
    if parts.prototypes is not None and list(parts.prototypes.shape[1:]) != [out_dim]:
        parts.shapes.append(
            f"{layout.prototypes}* are rows of shape {list(parts.prototypes.shape)}, but the head {layout.head}* gives "
            f"{out_dim} features"
        )


def refusal(parts: Parts, family: Family, hint: str) -> AdapterFileError:
    """Return the error that lists all that is wrong about `parts`, after what the file may be instead."""
    said = [
        f"{what} {len(keys)}: {', '.join(sorted(keys))}"
        for what, keys in (("missing", parts.missing), ("unexpected", parts.unexpected), ("wrong shape", parts.shapes))
        if keys
    ]
    for key in sorted(parts.missing):
        close = difflib.get_close_matches(key, parts.unexpected, n=1, cutoff=0.8)
        if close:
            said.append(f"{close[0]} resembles {key}")
    return AdapterFileError(f"This is no {family.name} checkpoint of {family.source}.{hint} {'; '.join(said)}.")
