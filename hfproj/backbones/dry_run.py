"""A backbone is run once without data, to find what its representation depends on and which of its modules run.

The run is one of a copy whose tensors have shapes and no values (on torch's meta device): a tenth of a second for a
ViT-B, no memory. Code that asks for a value (``mask.all()``, ``.tolist()``) can't run so; the copy then shares its
tensors with the backbone and is run on two blank inputs. A tensor feeds h if the gradient of h reaches it; a buffer
if its module ran and the gradient reaches the module's output. Runs are kept by structure: names, shapes, simple
attributes and configuration of all modules.
"""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hfproj.backbones.inputs import blank_inputs
from hfproj.backbones.quantized import REPACKS, LinearOnMeta, SharedLinear, is_quantized_linear
from hfproj.errors import one_line

BATCH = 2
_OURS = "hfproj"  # where `ProjectionLayer` sits
_KEPT: "OrderedDict[str, DryRun]" = OrderedDict()
_MOST_KEPT = 8
_SIMPLE = (int, float, str, bool, type(None), torch.dtype)
_MODES = (
    "training", "gradient_checkpointing", "grad_checkpointing", "_is_hf_initialized", REPACKS, "compute_type_is_set",
    "compute_dtype",
)  # fmt: skip


class DryRun:
    """What one run without data showed.

    Attributes:
        copy: The copy that was run; its tensors have the names of `hfproj.backbones.bare_tensors`.
        output: What the backbone returned.
        seen: Name of each module that ran → its first argument and its output, at its last run.
        inputs: The keyword (or positional, as ``0``) inputs that it was given.
        random: Whether random numbers were drawn, though the copy was in eval mode.
    """

    def __init__(self, bare: nn.Module, output: Any, inputs: dict[str | int, Any]):
        self.copy, self.output, self.inputs = bare, output, inputs
        self.seen: dict[str, tuple[Any, Any]] = {}
        self.random = False
        self.markers: dict[str, Tensor] = {}
        self.alike: dict[str, str] = {}  # a module that no row reached → one beside it of the same structure that ran
        self._found: dict[str, frozenset[str]] = {}

    def feeding(self, h: Tensor, key: str | None = None) -> frozenset[str]:
        """Return the names of the parameters and buffers that `h`, a tensor of this run, depends on.

        What was found is kept under `key`, if there is one.
        """
        if key is None or key not in self._found:
            found = self._feeding(h)
            if key is None:
                return found
            self._found[key] = found
        return self._found[key]

    def _feeding(self, h: Tensor) -> frozenset[str]:
        named = dict(self.copy.named_parameters(remove_duplicate=False))
        wanted = {id(p): p for p in named.values() if p.requires_grad}
        markers = list(self.markers.items())
        leaves = [*wanted.values(), *[m for _, m in markers]]
        if not h.requires_grad or not leaves:
            return frozenset()
        with with_gradients():
            grads = torch.autograd.grad(h.sum(), leaves, retain_graph=True, allow_unused=True)
        reached = {id(leaf) for leaf, grad in zip(leaves, grads, strict=True) if grad is not None}
        names = {name for name, p in named.items() if id(p) in reached}
        owners = {name for name, marker in markers if id(marker) in reached}
        for name, module in self.copy.named_modules():
            if name not in owners and name in self.markers:
                continue  # its output was marked, and h does not depend on it
            prefix = f"{name}." if name else ""
            if name in owners or any(n.startswith(prefix) for n in names):
                names |= {prefix + n for n, b in module.named_buffers(recurse=False) if n not in transient(module)}
            if not isinstance(getattr(module, "weight", None), Tensor):
                continue
            if name in self.markers and name in owners:  # a quantized or frozen-type weight, which has no gradient
                names |= {prefix + n for n, p in module.named_parameters(recurse=False) if not p.requires_grad}
        for idle, ran in self.alike.items():
            own = dict(self.copy.get_submodule(idle).named_parameters(recurse=False))
            names |= {f"{idle}.{n}" for n in own if f"{ran}.{n}" in names}
        return frozenset(names)

    def acting(self, feeding: frozenset[str]) -> frozenset[str]:
        """Return the names of the modules that ran with a tensor of their own among `feeding`."""
        return frozenset({n.rpartition(".")[0] for n in feeding} & (self.seen.keys() | self.alike.keys()))


def transient(module: nn.Module) -> set[str]:
    """Return the names of the buffers of `module` that no state dict holds."""
    return module._non_persistent_buffers_set


class _RandomNumbers(TorchDispatchMode):
    """Notes whether an operation draws random numbers."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not {"attention", "dropout"} & set(
            str(func).replace(".", "_").split("_")
        ):
            self.seen = True
        return func(*args, **(kwargs or {}))


def dry_run(backbone: nn.Module, why: list[str] | None = None, *, values: bool = False) -> DryRun | None:
    """Return what a run of `backbone` without data shows, or None where it can't be run: its input can't be guessed.

    What it raised with values, for each input tried, is added to `why`. It runs without values first, unless `values`.
    """
    key = structure(backbone)
    if key in _KEPT and not values:
        _KEPT.move_to_end(key)
        return _KEPT[key]
    with with_gradients():
        found = None if values else _run(backbone, "meta", [])
        found = found or _run(backbone, "real", [] if why is None else why)
    if found is not None and next(found.copy.parameters(), torch.empty(0, device="meta")).is_meta:
        _KEPT[key] = found  # a run with values would keep them all in memory
        while len(_KEPT) > _MOST_KEPT:
            _KEPT.popitem(last=False)
    return found


def structure(backbone: nn.Module) -> str:
    """Return a digest of what `backbone` computes but for its values; adapters on it change nothing."""
    digest = hashlib.sha256()
    config: Any = getattr(backbone, "config", None)
    if hasattr(config, "to_dict"):
        digest.update(repr(sorted(config.to_dict().items(), key=lambda item: str(item[0]))).encode())
    for name, module in bare_modules(backbone):
        simple = [(k, v) for k, v in vars(module).items() if _is_simple(v) and k not in _MODES]
        tensors = [(n, t.shape, t.dtype) for n, t in (module._parameters | module._buffers).items() if t is not None]
        digest.update(repr((name, type(module).__qualname__, simple, tensors)).encode())
    return digest.hexdigest()


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) < 64 and all(isinstance(v, _SIMPLE) for v in value)
    return isinstance(value, _SIMPLE)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what PEFT's layers wrap: the backbone's own module."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    return module


def bare_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the backbone's own modules by name, as if no adapter had been attached."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is None or (not prefix and name == _OURS and isinstance(child, BaseTunerLayer)):
            continue
        yield from bare_modules(unwrapped(child), f"{prefix}.{name}" if prefix else name)


def _run(backbone: nn.Module, mode: str, why: list[str]) -> DryRun | None:
    """Run a copy of `backbone` on the first blank input that it takes; what it raised on others goes to `why`."""
    try:
        bare = _bare_copy(backbone, mode)
    except Exception:  # whatever a module's own way of being copied raises
        return None
    device = next((p.device for p in bare.parameters()), torch.device("cpu"))
    if mode == "real" and device.type == "meta":
        return None
    for inputs in blank_inputs(bare, BATCH, device):
        found = DryRun(bare, None, inputs)
        args, kwargs = [v for k, v in inputs.items() if k == 0], {str(k): v for k, v in inputs.items() if k != 0}
        try:
            with quiet(device, mode), noting(found), _RandomNumbers() as drawn:
                found.output = bare(*args, **kwargs)
        except Exception as error:  # a wrong guess raises anything
            why.append(one_line(error))
            continue
        found.random = drawn.seen
        found.alike = _alike(found) if mode == "real" else {}
        return found
    return None


def _alike(found: DryRun) -> dict[str, str]:
    """Return experts that two blank rows did not reach, by name → one beside it that they reached."""
    alike: dict[str, str] = {}
    for name, group in found.copy.named_modules():
        if not isinstance(group, nn.ModuleList):
            continue
        ran = {structure(child): f"{name}.{n}" for n, child in group.named_children() if f"{name}.{n}" in found.seen}
        for n, child in group.named_children():
            if f"{name}.{n}" not in found.seen and structure(child) in ran:
                beside = ran[structure(child)]
                for inner, _ in child.named_modules():
                    end = f".{inner}" if inner else ""
                    if beside + end in found.seen:
                        alike[f"{name}.{n}{end}"] = beside + end
    return alike


@contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients on, whatever the caller has set."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def quiet(device: torch.device, mode: str) -> Iterator[None]:
    """No autocast, and the state of random number generators as before."""
    devices = [device] if device.type == "cuda" and mode == "real" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type if mode == "real" else "cpu", enabled=False):
        yield


def _bare_copy(backbone: nn.Module, mode: str) -> Any:
    """Return a copy in eval mode, without adapters, hooks of ours or checkpointing, that shares or lacks values."""
    memo: dict[int, Any] = {}
    for _, module in backbone.named_modules():
        if is_quantized_linear(module):
            memo[id(module)] = LinearOnMeta(module) if mode == "meta" else SharedLinear(module)
            continue
        for p in module._parameters.values():
            if p is not None and id(p) not in memo:
                learns = p.is_floating_point() or p.is_complex()
                memo[id(p)] = nn.Parameter(_like(p, mode), requires_grad=learns)
        for b in module._buffers.values():
            if b is not None and id(b) not in memo:
                memo[id(b)] = _like(b, mode) if mode == "meta" else b.detach().clone()
    bare: Any = copy.deepcopy(backbone, memo)
    bare._modules.pop(_OURS, None) if isinstance(bare._modules.get(_OURS), BaseTunerLayer) else None
    for module in bare.modules():
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = unwrapped(child)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for handle, hook in list(hooks.items()):
                if getattr(hook, "__module__", "").startswith("hfproj."):
                    del hooks[handle]
        for attribute in ("gradient_checkpointing", "grad_checkpointing"):
            if attribute in vars(module):
                vars(module)[attribute] = False
        if hasattr(module, "_hf_hook"):  # accelerate's, which move inputs to other devices
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(module)
    config: Any = getattr(bare, "config", None)
    if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
        config._attn_implementation = "eager"
    return bare.eval()


def _like(tensor: Tensor, mode: str) -> Tensor:
    if mode == "real":
        return tensor.detach()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@contextmanager
def noting(found: DryRun) -> Iterator[None]:
    """Note what each module of the copy takes and returns, and mark the outputs of those that have buffers."""
    handles = []

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        first = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        if name in found.markers or (marked(module) and first_tensor(output) is not None):
            output = _marked(output, found.markers.setdefault(name, _marker(output)))
        found.seen[name] = (first, output)
        return output

    for name, module in found.copy.named_modules():
        handles.append(module.register_forward_hook(_Note(note, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Note:
    def __init__(self, note: Any, name: str):
        self.note, self.name = note, name

    def __call__(self, *args: Any) -> Any:
        return self.note(self.name, *args)


def marked(module: nn.Module) -> bool:
    """Return whether gradients alone do not tell that h depends on a tensor of `module`: it has such buffers."""
    buffers = any(n not in transient(module) for n, b in module._buffers.items() if b is not None)
    return buffers or any(p is not None and not p.requires_grad for p in module._parameters.values())


def first_tensor(output: Any) -> Tensor | None:
    """Return the first floating point tensor of a module's output, or None."""
    values = output if isinstance(output, tuple | list) else (output,)
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)


def _marker(output: Any) -> Tensor:
    first = first_tensor(output)
    assert first is not None  # the caller looked
    return torch.zeros((), dtype=first.dtype, device=first.device, requires_grad=True)


def _marked(output: Any, marker: Tensor) -> Any:
    if isinstance(output, Tensor):
        return output + marker if output.is_floating_point() else output
    if type(output) in (tuple, list):
        return type(output)(_marked(v, marker) for v in output)
    return output
