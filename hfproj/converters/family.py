"""What a family of official checkpoints looks like, and sorting a file's tensors by that.

A :class:`Layout` says below which names backbone, head, predictor and prototypes lie and which tensors are left out and
why; the longest name that fits decides. A :class:`Family` has one layout or several, for each of its networks (student
and teacher, query and key); `hfproj.converters.families` lists them all.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hfproj import limits
from hfproj.converters.mlp import MLP, Found, Problems, best
from hfproj.errors import AdapterFileError, UsageError, unknown

_WRAPPERS = re.compile(r"^(module\.)+|\b(_orig_mod|_fsdp_wrapped_module)\.")  # of DDP, torch.compile and FSDP
_LISTED = 200  # keys in a message
_LONGEST = 500  # characters of a key
# what training scripts save beside networks
_NO_NETWORKS = {
    "amp", "args", "config", "dino_loss", "epoch", "fp16_scaler", "optimizer", "scaler", "scheduler", "steps",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where the parts lie in a checkpoint; ``{network}``, ``{own}`` and options of the family are filled in by `fill`.

    The parts are given by what their keys begin with. A part may have one of several structures.
    """

    backbone: str
    head: str | None = None  # None where it has no tensors
    structures: tuple[MLP, ...] = ()
    fixed: str = ""  # name of a head without tensors, whose options are the family's
    inside: str = ""  # key of the file below which the state dict lies; "" where the file itself is one
    own: str = ""  # what the keys of a network begin with, where a state dict holds several
    predictor: str | None = None  # of the first network alone
    predictor_structures: tuple[MLP, ...] = ()
    prototypes: str | None = None
    rows: str = "weight"  # of the prototypes; "weight_v" has lengths "weight_g" beside it: weight normalisation
    ignored: Mapping[str, str] = field(default_factory=dict)  # beginning of further keys → why they are left out
    rename: tuple[tuple[str, str], ...] = ()  # patterns of the backbone's names, the first that fits, and replacements


@dataclass(frozen=True)
class Family:
    """A family of official checkpoints."""

    name: str
    line: str  # what it is, for lists
    source: str  # the official repositories
    layouts: tuple[Layout, ...]  # ports of one method, files of training and of release
    networks: tuple[str, ...] = ("online",)  # in a file, the one that the authors evaluate first
    num_heads: Callable[[int], int | None] = lambda width: None  # width of a ViT → attention heads; no shape shows them
    timm_ids: Mapping[tuple[int, int, int], str] = field(default_factory=dict)  # (width, depth, patch) → name in timm
    options: Mapping[str, Any] = field(default_factory=dict)  # with defaults; a tuple lists choices, the default first
    full_file: str = "the checkpoint that training saved"  # what to look for where a file holds a backbone alone


def fill(layout: Layout, family: Family, choices: Mapping[str, Any]) -> Layout:
    """Return the layout of the network and options that were chosen; what belongs to others is left out."""
    network, main = choices["network"], family.networks[0]
    words = {**choices, "own": layout.own.format(**choices)}
    for name, values in family.options.items():
        if isinstance(values, tuple):
            words[f"other_{name}"] = next(value for value in values if value != choices[name])
    ignored = {prefix.format(**words): why.format(**words) for prefix, why in layout.ignored.items()}
    others = [name for name in family.networks if name != network] if layout.own else []
    ignored |= {layout.own.format(network=name): f"of network={name!r}" for name in others}
    names = {name: getattr(layout, name) for name in ("inside", "backbone", "head", "predictor", "prototypes")}
    names = {name: value.format(**words) if value is not None else None for name, value in names.items()}
    if network != main and layout.predictor is not None:
        ignored[layout.predictor], names["predictor"] = f"of network={main!r}", None
    return replace(layout, ignored=ignored, **names)


@dataclass
class Parts(Problems):
    """A file's tensors, sorted."""

    backbone: dict[str, tuple[str, Tensor]] = field(default_factory=dict)  # name in the architecture → (key, tensor)
    head: Found = field(default_factory=Found)
    predictor: Found | None = None
    prototypes: Tensor | None = None  # rows [count, dim]
    lengths: Tensor | None = None  # of the rows [count], where they were learned
    ignored: dict[str, str] = field(default_factory=dict)  # key → why it was left out

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the adapter's own modules."""
        parts = {"head": self.head.state, "predictor": self.predictor.state if self.predictor else {}}
        state = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        rows = {"prototypes.weight": self.prototypes, "prototypes.length": self.lengths}
        return state | {name: tensor for name, tensor in rows.items() if tensor is not None}

    def config(self) -> dict[str, Any]:
        """Return head, predictor and prototypes as an adapter's config has them."""
        options = dict(self.head.options)
        config = {"head": self.head.head, "out_dim": options.pop("out_dim", None), "head_options": options}
        if self.predictor is not None:
            config["predictor"] = {"head": self.predictor.head, **self.predictor.options}
        if self.prototypes is not None:
            count = len(self.prototypes)
            config["prototypes"] = count if self.lengths is None else {"count": count, "learn_norm": True}
        return config


def settle(family: Family, network: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the network and the options of the family: the caller's choices, and the defaults of the others.

    Raises:
        UsageError: If the family has no such network, option or value.
    """
    of = f"of {family.name!r}:"
    for name in options:
        if not family.options:
            raise UsageError(f"{family.name!r} has no option {name!r}; it takes network, num_heads and backbone.")
        if name not in family.options:
            raise unknown(f"option {of}", name, family.options)
    found: dict[str, Any] = {}
    for name, values in {"network": family.networks, **family.options}.items():
        choices = values if isinstance(values, tuple) else (values,)
        value = network if name == "network" else options.get(name)
        found[name] = choices[0] if value is None else value
        if isinstance(values, tuple) and found[name] not in choices:
            raise unknown(f"{name} {of}", value, choices)
    return found


class Content:
    """What a file holds, by the name of the dictionary in it that is a state dict."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = content
        self._read: dict[str, dict[str, Tensor]] = {}

    def below(self, inside: str) -> dict[str, Tensor]:
        """Return the tensors below `inside`, or, without it, of the whole file; names inside names follow a dot."""
        inside = inside if isinstance(self.content.get(inside), Mapping) else ""
        if inside not in self._read:
            found = self.content[inside] if inside else self.content
            if not inside:  # a state dict, or dictionaries of networks beside what training keeps
                tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
                found = tensors or {key: value for key, value in found.items() if key not in _NO_NETWORKS}
            self._read[inside] = _flat(found)
        return self._read[inside]


def sort(content: Content, family: Family, choices: Mapping[str, Any]) -> Parts:
    """Return the parts by the layout that fits best, with what is wrong about them."""
    layouts = [fill(layout, family, choices) for layout in family.layouts]
    given = {name: value for name, value in choices.items() if name in family.options}
    return min((_sorted(content.below(of.inside), of, given) for of in layouts), key=lambda parts: parts.problems)


def _flat(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors in dictionaries of dictionaries, without what wrappers put before their names.

    Raises:
        AdapterFileError: If there are too many, or the dictionaries are nested too deep or in themselves.
    """
    found: dict[str, Tensor] = {}
    inner = [("", content)]
    for _ in range(limits.NESTED):
        deeper = []
        for before, part in inner:
            for key, value in part.items():
                if isinstance(value, Tensor):
                    found[f"{before}{str(key)[:_LONGEST]}"] = value
                elif isinstance(value, Mapping):
                    deeper.append((f"{before}{str(key)[:_LONGEST]}.", value))
            if len(found) + len(deeper) > limits.TENSORS:
                raise AdapterFileError(
                    f"This checkpoint holds more than {limits.TENSORS:,} tensors; it is no network's."
                )
        inner = deeper
    if inner:
        raise AdapterFileError(f"The dictionaries of this checkpoint are nested deeper than {limits.NESTED}.")
    stripped = {_WRAPPERS.sub("", key): tensor for key, tensor in found.items()}
    for key in [key for key in stripped if key.endswith("running_mean")]:
        count = f"{key.removesuffix('running_mean')}num_batches_tracked"
        stripped.setdefault(count, torch.tensor(0))  # files of torch before 0.4.1 have none
    return stripped


def _sorted(state: Mapping[str, Tensor], layout: Layout, options: Mapping[str, Any]) -> Parts:
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
    if layout.fixed:
        parts.head = Found(head=layout.fixed, options=dict(options))
    if layout.head is not None:
        parts.head = best(layout.structures, sorted_["head"], layout.head)
    if layout.predictor is not None:
        parts.predictor = best(layout.predictor_structures, sorted_["predictor"], layout.predictor)
    if layout.prototypes is not None:
        _read_prototypes(parts, sorted_["prototypes"], layout)
    for found in filter(None, (parts.head, parts.predictor)):
        parts.add(found)
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
    before = layout.prototypes or ""
    normed = {"weight_v": "weight_g", "parametrizations.weight.original1": "parametrizations.weight.original0"}
    blocks = [key for key in tensors if re.fullmatch(r"prototypes[0-9]{1,3}\.weight", key)]
    blocks.sort(key=lambda key: int(key[10:-7]))
    rows = next((key for key in (*normed, "weight") if key in tensors), None)
    used: set[str] = set(blocks) if rows is None else {rows, normed.get(rows, rows)}
    if rows is not None:
        parts.prototypes = tensors[rows]
        key = normed.get(rows, rows)
        lengths = tensors.get(key)
        if lengths is None:
            parts.missing.append(before + key)
        elif rows in normed and lengths.numel() != len(tensors[rows]):
            shape = f"has shape {list(lengths.shape)}, expected [{len(tensors[rows])}, 1]"
            parts.shapes.append(f"{before}{key} {shape}")
        elif rows in normed and (lengths != 1).any():
            parts.lengths = lengths.flatten()
    elif blocks:
        gaps = {f"prototypes{i}.weight" for i in range(int(blocks[-1][10:-7]))} - used
        parts.missing += [before + key for key in gaps]
        if len({tensors[key].shape[1:] for key in blocks}) == 1:
            parts.prototypes = torch.cat([tensors[key] for key in blocks])
        else:
            parts.shapes += [f"{before}{key} has shape {list(tensors[key].shape)}" for key in blocks]
    else:
        parts.missing.append(before + layout.rows)
    parts.unexpected += [before + key for key in tensors if key not in used]


def _check_widths(parts: Parts, layout: Layout) -> None:
    """Refuse parts that can't follow one another."""
    out_dim = parts.head.options.get("out_dim")
    if out_dim is None:
        return
    if parts.predictor is not None and parts.predictor.head:
        widths = parts.predictor.in_dim, parts.predictor.options["out_dim"]
        if widths != (out_dim, out_dim):
            leads = f"{layout.predictor}* leads from {widths[0]} to {widths[1]} features"
            parts.shapes.append(f"{leads}, but the head {layout.head}* gives {out_dim}")
    if parts.prototypes is not None and list(parts.prototypes.shape[1:]) != [out_dim]:
        rows = f"{layout.prototypes}* are rows of shape {list(parts.prototypes.shape)}"
        parts.shapes.append(f"{rows}, but the head {layout.head}* gives {out_dim} features")


def refusal(parts: Parts, family: Family, hint: str) -> AdapterFileError:
    """Return the error that lists all that is wrong about `parts`, after what the file may be instead."""
    said = [
        f"{what} {len(keys)}: {', '.join(sorted(keys)[:_LISTED])}{', …' * (len(keys) > _LISTED)}"
        for what, keys in (("missing", parts.missing), ("unexpected", parts.unexpected), ("wrong shape", parts.shapes))
        if keys
    ]
    for key in sorted(parts.missing) if len(parts.missing) * len(parts.unexpected) <= _LISTED**2 else ():
        close = difflib.get_close_matches(key, parts.unexpected, n=1, cutoff=0.8)
        if close:
            said.append(f"{close[0]} resembles {key}")
    return AdapterFileError(f"This is no {family.name} checkpoint of {family.source}.{hint} {'; '.join(said)}.")
