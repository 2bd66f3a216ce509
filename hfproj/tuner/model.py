"""The tuner: how PEFT attaches, switches, disables, saves, loads and removes projection heads.

Three things differ from PEFT's other methods. The head sits behind the backbone instead of inside one of its layers
(`hfproj.tuner.layer`). One adapter may carry a second PEFT method for the backbone, under the same name and in the same
file. And with ``trainable="full"`` or a number of blocks the backbone's own tensors belong to the adapter: the ones in
use are always the module's own parameters, those of inactive adapters and the originals wait on the CPU, and switching,
disabling and unloading copy values in place.
"""

import copy
import re
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from hfproj.backbones import (
    ReadPoint,
    bare_tensors,
    feeds_representation,
    last_blocks,
    resolve_read_point,
    source_of,
)
from hfproj.errors import AdapterFileError, UsageError
from hfproj.tuner.backbone_tensors import BackboneTensors
from hfproj.tuner.config import ProjectionHeadConfig, plain
from hfproj.tuner.description import starts_random
from hfproj.tuner.layer import CHILD, ProjectionLayer, install_hooks, remove_hooks

PREFIX = "projection_head_"
_MODULES = f".{CHILD}.projection_head_modules."
_BACKBONE = f".{CHILD}.backbone."  # keys of trained backbone tensors in a saved adapter


class ProjectionHeadModel(BaseTuner):
    """PEFT's tuner for `ProjectionHeadConfig`; made by ``get_peft_model`` and ``PeftModel.from_pretrained``."""

    prefix = PREFIX
    tuner_layer_cls = BaseTunerLayer  # set, enable and delete reach the head and the backbone's PEFT layers alike
    target_module_mapping: dict[str, list[str]] = {}
    # Doors that inject without a PeftModel would load the head and leave its LoRA random: this flag closes them.
    uses_shared_state = True

    def _pre_injection_hook(self, model: nn.Module, config: ProjectionHeadConfig, adapter_name: str) -> None:
        self.backbone_tensors = BackboneTensors()
        self._frozen = False  # whether the active adapter was asked for without gradients

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Attach the head of adapter `adapter_name`, and its PEFT method for the backbone, to `model`.

        Raises:
            UsageError: the config does not fit the backbone.
            AdapterFileError: the config is that of a head for a representation of another width.
        """
        # What the backbone decides is filled into a copy: the caller's config may serve for another backbone too.
        config: ProjectionHeadConfig = copy.deepcopy(self.peft_config[adapter_name])
        self._refuse_foreign(model)
        point = self._resolve(model, config)
        names = self._backbone_names(model, config, point)
        inner = self._inner_config(model, config, point)
        first = not hasattr(model, CHILD)
        layer = ProjectionLayer() if first else getattr(model, CHILD)
        disabled = layer.disable_adapters
        trainability = {p: p.requires_grad for p in model.parameters()}

        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            layer.add(adapter_name, config, point, like)
        config.out_dim = layer.projection_head_modules[adapter_name].head.out_dim
        try:
            if inner is not None:
                self._inject_inner(model, inner, adapter_name, low_cpu_mem_usage)
                targets = config.backbone_adapter.get("target_modules")
                config.backbone_adapter = plain(inner.to_dict()) | {
                    "inference_mode": False
                }  # the head's own field rules
                if isinstance(targets, list):  # PEFT shortens long lists to suffixes, which may match more elsewhere
                    config.backbone_adapter["target_modules"] = targets
        except Exception as error:
            self._undo_injection(model, layer, adapter_name, trainability)
            if isinstance(error, StopIteration | ValueError):
                raise UsageError(
                    f"backbone_adapter does not fit {type(model).__name__}: {error or type(error).__name__}; name "
                    "other target_modules, or leave them out to reach every linear layer."
                ) from error
            raise
        model.add_module(CHILD, layer)
        self.peft_config[adapter_name] = config
        install_hooks(model, layer)
        self.backbone_tensors.add(model, adapter_name, names, keep_original=config.keep_original)
        if names and not config.keep_original and not starts_random(config.backbone):
            warnings.warn(
                "keep_original=False: the originals of the trained backbone tensors are given up, so that disabling or "
                "unloading this adapter leaves the trained backbone in place.",
                stacklevel=4,
            )
        self._mark_only_adapters_as_trainable(model)
        if disabled:  # the PEFT layers that are new don't know it yet
            super()._enable_adapter_layers(False)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode if first else self._frozen)
        if not first:
            for parameter, requires_grad in trainability.items():
                parameter.requires_grad_(requires_grad)

    def _inject_inner(self, model: nn.Module, inner: PeftConfig, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        others = self.peft_config.items()
        kinds = {c.backbone_adapter["peft_type"] for n, c in others if n != adapter_name and c.backbone_adapter}
        if kinds - {inner.peft_type.value}:
            raise ValueError(
                f"its {inner.peft_type.value} would wrap the layers that another head's {kinds.pop()} wraps already"
            )
        # Out of sight meanwhile: the other heads, whose layers a target name such as 'linear' would match; the capture
        # hooks, which LN tuning would copy with the norm; and peft_config, into which the inner tuner would write.
        layer = model._modules.pop(CHILD, None)
        if layer is not None:
            remove_hooks(layer)
        outer = model.__dict__.pop("peft_config", None)
        try:
            inject_adapter_in_model(inner, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        finally:
            model.__dict__.pop("peft_config", None)
            if outer is not None:
                model.peft_config = outer
            if layer is not None:
                model.add_module(CHILD, layer)

    def _undo_injection(
        self, model: nn.Module, layer: ProjectionLayer, adapter_name: str, trainability: dict[Tensor, bool]
    ) -> None:
        layer.delete_adapter(adapter_name)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and adapter_name in module._all_available_adapter_names():
                module.delete_adapter(adapter_name)
        if hasattr(model, CHILD):
            install_hooks(model, layer)
            super().set_adapter(self.active_adapters)
        else:
            outer = model.__dict__.get("peft_config")
            super().unload()  # unwraps the layers that were reached before the error
            if outer is not None:
                model.peft_config = outer
        for parameter, requires_grad in trainability.items():
            parameter.requires_grad_(requires_grad)

    # --- what a config means for this backbone ---

    def _refuse_foreign(self, model: nn.Module) -> None:
        if hasattr(model, CHILD) and not isinstance(getattr(model, CHILD), ProjectionLayer):
            raise UsageError(
                f"{type(model).__name__} has a submodule named {CHILD!r}, where the head would go; rename it."
            )
        if hasattr(model, CHILD):
            return
        if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
            raise UsageError(
                "This backbone carries another PEFT adapter already. Attach the head to the bare backbone and pass "
                "that method as ProjectionHeadConfig(backbone_adapter=LoraConfig(…)), or merge it first."
            )

    def _resolve(self, model: nn.Module, config: ProjectionHeadConfig) -> ReadPoint:
        saved_width = config.in_dim
        try:
            point = resolve_read_point(model, pooling=config.pooling, layer=config.layer)
        except UsageError:
            if saved_width is None:
                raise
            point = resolve_read_point(model, pooling=config.pooling, layer=config.layer, in_dim=saved_width)
        if saved_width is not None and saved_width != point.in_dim:
            raise AdapterFileError(
                f"This head takes a representation of {saved_width} dimensions, but {type(model).__name__} gives "
                f"{point.in_dim} (pooling={point.pooling!r}, layer={config.layer}); use the backbone it was made for"
                + (f" ({config.backbone['id']})." if config.backbone else ".")
            )
        config.in_dim, config.pooling = point.in_dim, point.pooling
        if config.backbone is None:
            config.backbone = source_of(model)
        return point

    def _backbone_names(self, model: nn.Module, config: ProjectionHeadConfig, point: ReadPoint) -> list[str]:
        if not config.trains_backbone:
            return []
        if config.trainable == "full":
            return feeds_representation(model, point)
        return last_blocks(model, point, config.trainable)

    def _inner_config(self, model: nn.Module, config: ProjectionHeadConfig, point: ReadPoint) -> Any:
        """Return the backbone's PEFT config with its targets resolved from the model itself, or None."""
        inner = config.inner_config()
        if inner is None:
            return None
        if getattr(inner, "target_modules", None) in (None, "all-linear"):
            reached = {n.rpartition(".")[0] for n in feeds_representation(model, point)}
            bare = {
                n.replace(".base_layer", ""): m for n, m in model.named_modules() if not isinstance(m, BaseTunerLayer)
            }
            modules = {n: m for n, m in bare.items() if n in reached}
            # Exact types: a subclass has a forward of its own (padding, weight norm), which PEFT does not imitate.
            if inner.peft_type == PeftType.LN_TUNING:
                targets = [n for n, m in modules.items() if "Norm" in type(m).__name__]
            else:
                targets = [n for n, m in modules.items() if type(m) is nn.Linear]
                targets = targets or [n for n, m in modules.items() if type(m) is nn.Conv2d and m.groups == 1]
            if not targets:
                raise UsageError(
                    f"{type(model).__name__} has no layer that {inner.peft_type.value} can adapt; give the "
                    "backbone_adapter target_modules."
                )
            targets.sort()
            # PEFT takes a name for a suffix: 'norm' would match 'blocks.0.attn.norm', too. A pattern matches in full.
            if any(n.endswith(f".{t}") for t in targets for n in bare if n not in targets):
                targets = "|".join(re.escape(t) for t in targets)
            inner.target_modules = config.backbone_adapter["target_modules"] = targets
            if inner.peft_type == PeftType.IA3 and inner.feedforward_modules is None:
                inner.feedforward_modules = []
        inner.inference_mode = config.inference_mode
        inner.base_model_name_or_path = None
        return inner

    # --- what follows from the active adapter ---

    def _update(self) -> None:
        """Bring the backbone's values, trainability and BatchNorm modes in line with the adapter that is active now."""
        layer: ProjectionLayer = getattr(self.model, CHILD)
        active = layer.active_name  # None while disabled
        self.backbone_tensors.use(self.model, active)
        trained = self._trained_now()
        for name, tensor in bare_tensors(self.model).items():
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.requires_grad_(name in trained)
        if active is not None:
            self._freeze_parts_of(active, layer)
        self._set_batch_norm_modes()

    def _trained_now(self) -> set[str]:
        """Return the names of the backbone's own tensors that training changes now."""
        tensors = self.backbone_tensors
        return set() if self._frozen or tensors.in_use is None else set(tensors.names[tensors.in_use])

    def _freeze_parts_of(self, active: str, layer: ProjectionLayer) -> None:
        """Freeze what PEFT unfroze against the config: all (inference), the backbone's layers, or those h ignores."""
        reached = {n.rpartition(".")[0] for n in feeds_representation(self.model, layer.points[active])}
        head_only = self.peft_config[active].trainable == "head"
        for name, module in self.model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            idle = module is not layer and (head_only or name not in reached)
            if self._frozen or idle:
                module.set_requires_grad(active, False)

    def _set_batch_norm_modes(self) -> None:
        """Let the backbone's BatchNorm train only where it is trained: else its running statistics must not move."""
        trained = self._trained_now()
        for name, module in self.model.named_modules():
            if name.split(".")[0] == CHILD or not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            bare = name.replace(".base_layer", "")
            learns = f"{bare}.running_mean" in trained or any(p.requires_grad for p in module.parameters(recurse=False))
            module.train(self.model.training and learns)

    # --- PEFT's verbs ---

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Use the head (and the backbone tensors, and the backbone's PEFT layers) of one adapter.

        Raises:
            UsageError: more than one adapter is named; one representation goes through one head.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise UsageError(f"Only one head can be active at a time, got {names}; call the model once per head.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._frozen = inference_mode
        self._update()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._update()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters, with the backbone tensors that are theirs."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if next(iter(self.active_adapters), None) in names:
            self._frozen = not requires_grad
            self._update()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the backbone tensors it trained return to their originals."""
        if adapter_name not in self.peft_config:
            raise UsageError(f"There is no adapter {adapter_name!r}; there are: {', '.join(self.peft_config)}.")
        if adapter_name in self.active_adapters:
            # Chosen here: PEFT's layers would each choose by themselves, and a LoRA layer does not know all adapters.
            others = sorted(set(self.peft_config) - {adapter_name})
            if others:
                warnings.warn(
                    f"Adapter {adapter_name} was active and is deleted; {others[0]} is active now.", stacklevel=3
                )
            self.set_adapter(others[:1], inference_mode=self._frozen)
        super().delete_adapter(adapter_name)
        self.backbone_tensors.forget(adapter_name)
        install_hooks(self.model, getattr(self.model, CHILD))

    def unload(self) -> nn.Module:
        """Return the bare backbone, bit for bit as it was before any head was attached."""
        self.backbone_tensors.use(self.model, None)
        backbone = super().unload()
        remove_hooks(getattr(backbone, CHILD))
        delattr(backbone, CHILD)
        return backbone.train(backbone.training)  # BatchNorm that was held in eval mode is free again

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse: a head comes after the backbone and has nothing to be merged into."""
        return getattr(self.model, CHILD).merge()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse before the backbone's PEFT layers are merged, which come first."""
        getattr(self.model, CHILD).merge()

    def train(self, mode: bool = True) -> "ProjectionHeadModel":
        """Set training mode, except for the BatchNorm of a frozen backbone."""
        super().train(mode)
        self._set_batch_norm_modes()
        return self

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("inject_adapter is overridden; no layer is replaced")

    # --- saved form ---

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        inner, tuner = config.inner_config(), model.base_model
        # PEFT drops tensors with another adapter's name in their path: with an adapter "mlp", those of all MLPs.
        own = {f"base_model.model.{n}": t.detach() for n, t in tuner._own_tensors(adapter_name).items()}
        selector = super() if inner is None else PEFT_TYPE_TO_TUNER_MAPPING[inner.peft_type]
        chosen = selector._get_adapter_state_dict(
            model, config if inner is None else inner, adapter_name, own | state_dict, unwanted_adapter_names
        )
        values = tuner.backbone_tensors.values(tuner.model, adapter_name)
        if tuner.backbone_tensors.in_use == adapter_name:  # a state dict that was passed in may hold gathered shards
            given = {k.removeprefix("base_model.model.").replace(".base_layer.", "."): v for k, v in state_dict.items()}
            values = {name: given.get(name, value) for name, value in values.items()}
        return chosen | {f"base_model.model{_BACKBONE}{name}": value.detach() for name, value in values.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if _BACKBONE in key:
            return key
        if _MODULES in key:  # the default leaves the name inside nested keys: another name would load random weights
            before, _, after = key.partition(_MODULES)
            return f"{before}{_MODULES}{after.removeprefix(adapter_name + '.')}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        tuner = model.base_model
        saved_backbone = {k.partition(_BACKBONE)[2]: v for k, v in state_dict.items() if _BACKBONE in k}
        saved_head = {k: v for k, v in state_dict.items() if _MODULES in k}
        rest = {k: v for k, v in state_dict.items() if _BACKBONE not in k and k not in saved_head}
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, saved_head)
        inner = config.inner_config()
        if inner is not None:
            inner_class = PEFT_TYPE_TO_TUNER_MAPPING[inner.peft_type]
            mapped |= inner_class._remap_adapter_state_dict_for_load(model, inner, adapter_name, rest)
        else:
            mapped |= rest
        tuner._check_saved(adapter_name, config, mapped, saved_backbone)
        tuner.backbone_tensors.load(tuner.model, adapter_name, saved_backbone)
        return mapped

    def _check_saved(self, adapter: str, config: Any, mapped: dict[str, Tensor], backbone: dict[str, Tensor]) -> None:
        """Refuse a file whose tensors are not exactly those of this adapter; PEFT would only warn."""
        head = f"base_model.model.{CHILD}.projection_head_modules.{adapter}."
        there = {n: t.shape for n, t in self._own_tensors(adapter).items()}
        expected = {f"base_model.model.{n}": s for n, s in there.items()}
        trained = self.backbone_tensors.values(self.model, adapter)
        expected |= {f"base_model.model{_BACKBONE}{n}": t.shape for n, t in trained.items()}
        came = {n: t.shape for n, t in mapped.items()}
        came |= {f"base_model.model{_BACKBONE}{n}": t.shape for n, t in backbone.items()}
        problems = [f"missing {n}" for n in expected if n not in came]
        problems += [f"unexpected {n}" for n in came if n not in expected]
        problems += [
            f"{n} has shape {tuple(came[n])}, expected {tuple(expected[n])}"
            for n in expected
            if n in came and came[n] != expected[n]
        ]
        if problems:
            listed = "; ".join(p.replace(head, "head: ").replace("base_model.model.", "") for p in problems[:3])
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise AdapterFileError(
                f"The saved tensors do not fit this adapter (head {config.head!r}, {config.in_dim} → {config.out_dim}):"
                f" {listed}{more}. The file belongs to another config or backbone, or is damaged; download or save it "
                "again."
            )

    def _own_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return the tensors of one adapter's head and PEFT layers, under their names in the model."""
        found = {}
        for module_name, module in self.model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            for name, tensor in module.state_dict(keep_vars=True).items():
                if not name.startswith("base_layer.") and name.split(".")[1:2] == [adapter]:  # container.adapter.…
                    found[f"{module_name}.{name}"] = tensor
        return found
