"""The tuner: how PEFT attaches, switches, disables, saves, loads and removes projection heads.

Three things differ from PEFT's other methods. The head sits behind the backbone instead of inside one of its layers
(`hfproj.tuner.layer`). One adapter may carry a second PEFT method for the backbone, under the same name and in the same
file. And with ``trainable="full"`` or a number of blocks the backbone's own tensors belong to the adapter
(`hfproj.tuner.backbone_tensors`).

A PEFT method is made by overriding methods of ``BaseTuner`` that are private by their names. Those used here are listed
with their signatures in tests/test_upstream.py, which fails when PEFT moves one.
"""

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from hfproj.backbones import READING, acting_modules, bare_tensors, feeds_representation, skips_after
from hfproj.backbones.quantized import Held
from hfproj.backbones.wrong_inputs import raise_explained
from hfproj.errors import AdapterFileError, HfprojError, UsageError, one_line
from hfproj.tuner import belonging, fitting
from hfproj.tuner.backbone_tensors import BackboneTensors
from hfproj.tuner.config import ProjectionHeadConfig, plain
from hfproj.tuner.description import starts_random
from hfproj.tuner.layer import CHILD, ProjectionLayer, install_hooks, remove_hooks
from hfproj.tuner.soundness import Kept, check_head, check_sound

PREFIX = "projection_head_"
_MODULES = f".{CHILD}.projection_head_modules."
_BACKBONE = f".{CHILD}.backbone."  # keys of trained backbone tensors in a saved adapter
_MODEL = "base_model.model"  # how PeftModel's state dict names the backbone


class ProjectionHeadModel(BaseTuner):
    """PEFT's tuner for `ProjectionHeadConfig`; made by ``get_peft_model`` and ``PeftModel.from_pretrained``."""

    prefix = PREFIX
    tuner_layer_cls = BaseTunerLayer  # set, enable and delete reach the head and the backbone's PEFT layers alike
    target_module_mapping: dict[str, list[str]] = {}
    # Without a PeftModel the head would be loaded and its LoRA left random: this flag makes PEFT refuse.
    uses_shared_state = True

    # The only place between the module's own __init__ and the first injection, both of which BaseTuner.__init__ runs.
    def _pre_injection_hook(self, model: nn.Module, config: ProjectionHeadConfig, adapter_name: str) -> None:
        self.backbone_tensors = BackboneTensors()
        self._given: dict[str, ProjectionHeadConfig] = {}  # the callers' own configs, until tensors are loaded
        self._frozen = False  # whether the active adapter was asked for without gradients
        self._held: Held | None = None

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False, state_dict: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Attach the head of adapter `adapter_name`, and its PEFT method for the backbone, to `model`."""
        # What the backbone decides is filled into a copy: the caller's config may serve for another backbone too.
        given: Any = self.peft_config[adapter_name]
        config: ProjectionHeadConfig = copy.deepcopy(given)
        fitting.refuse_foreign(model, adapter_name, config)
        point = fitting.resolve(model, config)
        names = fitting.trained_names(model, config, point)
        current = belonging.current_fingerprint(model, config, point, self.backbone_tensors, names)
        belonging.check_backbone(config, current, model, stacklevel=4)
        inner = fitting.resolved_inner(model, config, point)
        first = not hasattr(model, CHILD)
        layer = ProjectionLayer() if first else getattr(model, CHILD)
        disabled = layer.disable_adapters
        trainability = {p: p.requires_grad for p in model.parameters()}
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            layer.add(adapter_name, config, point, like)
        layer.skips |= {adapter_name} if skips_after(model, point) else set()
        modules: Any = layer.projection_head_modules[adapter_name]
        config.out_dim = modules.head.out_dim
        if inner is not None:
            try:
                self._inject_inner(model, inner, adapter_name, low_cpu_mem_usage)
                fitting.check_inner(model, adapter_name, config, point)
            except Exception as error:
                self._undo_injection(model, layer, adapter_name, trainability)
                if isinstance(error, StopIteration | ValueError | NotImplementedError):
                    raise UsageError(
                        f"backbone_adapter does not fit {type(model).__name__}: {one_line(error)}; name "
                        "other target_modules, or leave them out to reach every linear layer."
                    ) from error
                raise
            written = plain(inner.to_dict()) | {"inference_mode": False}  # the head's own field is the one that counts
            targets = config.backbone_options.get("target_modules")
            if isinstance(targets, list):  # PEFT shortens long lists to suffixes, which may match more elsewhere
                written["target_modules"] = targets
            config.backbone_adapter = written
        if first:
            self._held = Held(model)
        model.add_module(CHILD, layer)
        self.peft_config[adapter_name] = config
        self._given[adapter_name] = given
        install_hooks(model, layer)
        self.backbone_tensors.add(model, adapter_name, names, keep_original=config.keep_original)
        if names and not config.keep_original and not starts_random(config.backbone):
            said = "keep_original=False: disabling or unloading this adapter leaves the trained backbone in place."
            warnings.warn(said, stacklevel=4)
        self._mark_only_adapters_as_trainable(model)
        if disabled:  # the new PEFT layers start enabled
            super()._enable_adapter_layers(False)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode if first else self._frozen)
        if not first:
            _restore_trainability(trainability)

    def _inject_inner(self, model: nn.Module, inner: Any, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        others = [c for n, c in self.peft_config.items() if n != adapter_name and c.backbone_adapter]
        kinds = {c.backbone_adapter["peft_type"] for c in others} - {inner.peft_type.value}
        if kinds:
            kind = inner.peft_type.value
            raise ValueError(f"its {kind} would wrap the layers that another head's {kinds.pop()} wraps already")
        # Out of sight meanwhile: the other heads, whose layers a target name such as 'linear' would match; the capture
        # hooks, which LN tuning would copy with the norm; and peft_config, into which the inner tuner would write.
        layer: Any = model._modules.pop(CHILD, None)
        if layer is not None:
            remove_hooks(layer)
        outer = model.__dict__.pop("peft_config", None)
        kept = Kept(bare_tensors(model))
        try:
            inject_adapter_in_model(inner, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
            rewritten, restored = kept.restore(bare_tensors(model))
            if rewritten:
                lost = "" if restored else ", which has to be loaded again"
                raise ValueError(f"it rewrites {rewritten[0]} of the backbone when it is attached{lost}")
        finally:
            model.__dict__.pop("peft_config", None)
            if outer is not None:
                model.peft_config = outer
            if layer is not None:
                model.add_module(CHILD, layer)

    def _undo_injection(
        self, model: nn.Module, layer: ProjectionLayer, adapter_name: str, trainability: dict[nn.Parameter, bool]
    ) -> None:
        layer.delete_adapter(adapter_name)
        for module in model.modules():
            # Private to PEFT: there is no public list of a layer's adapters.
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
        _restore_trainability(trainability)

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
        if self._frozen or tensors.in_use is None:
            return set()
        names, point = set(tensors.names[tensors.in_use]), getattr(self.model, CHILD).points[tensors.in_use]
        if names and point.reading == 1:  # whose rules took tensors in, and saved them, that h does not depend on
            names &= set(feeds_representation(self.model, dataclasses.replace(point, reading=READING)))
        return names

    def _freeze_parts_of(self, active: str, layer: ProjectionLayer) -> None:
        """Freeze what PEFT unfroze against the config: all (inference), the backbone's layers, or those h ignores."""
        config: Any = self.peft_config[active]
        head_only = config.trainable == "head" or config.inner_config() is None
        reached = set() if head_only else acting_modules(self.model, layer.points[active])
        for name, module in self.model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            wrapped = name.partition(".base_layer.")[0]  # PEFT's layer for MultiheadAttention has layers inside
            if self._frozen or (module is not layer and (head_only or wrapped not in reached)):
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
        """Use the head (and the backbone tensors, and the backbone's PEFT layers) of one adapter, no more."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise UsageError(f"Only one head can be active at a time, got {names}; call the model once per head.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._frozen = inference_mode
        self._update()

    # Private to PEFT: enable_adapter_layers and disable_adapter_layers, and so disable_adapter(), both end here.
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
                said = f"Adapter {adapter_name} was active and is deleted; {others[0]} is active now."
                warnings.warn(said, stacklevel=3)
            self.set_adapter(others[:1], inference_mode=self._frozen)
        super().delete_adapter(adapter_name)
        self.backbone_tensors.forget(adapter_name)
        self._given.pop(adapter_name, None)
        install_hooks(self.model, getattr(self.model, CHILD))

    def unload(self) -> nn.Module:
        """Return the bare backbone, bit for bit as it was before any head was attached."""
        self.backbone_tensors.use(self.model, None)
        backbone = super().unload()
        remove_hooks(getattr(backbone, CHILD))
        delattr(backbone, CHILD)
        if self._held is not None:
            self._held.release()
        return backbone.train(backbone.training)  # BatchNorm that was held in eval mode is free again

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Raise UsageError, see `merge_adapter`."""
        return getattr(self.model, CHILD).merge()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise UsageError before the backbone's PEFT layers are merged: a head has no weights to be merged into."""
        getattr(self.model, CHILD).merge()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise UsageError: a head is no sum of heads."""
        raise UsageError(
            "Projection heads can't be combined by weights: they are no linear maps. Call the model "
            "once per head (model.set_adapter(name)), and combine the projections."
        )

    def train(self, mode: bool = True) -> "ProjectionHeadModel":
        """Set training mode, except for the BatchNorm of a frozen backbone."""
        super().train(mode)
        self._set_batch_norm_modes()
        return self

    # Private to PEFT: PeftModel's forward enters it around the backbone's.
    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if torch.compiler.is_compiling():
            yield
            return
        try:
            yield
        except HfprojError:
            raise
        except Exception as error:
            raise_explained(error, self.model, args, kwargs)
            raise

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:  # abstract in PEFT
        raise AssertionError("inject_adapter is overridden; no layer is replaced")

    # --- saved form: private to PEFT, whose get_peft_model_state_dict and set_peft_model_state_dict call these ---

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: ProjectionHeadConfig, adapter_name: str, state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        inner, tuner = config.inner_config(), model.base_model
        kept, layer = tuner.backbone_tensors, getattr(tuner.model, CHILD)
        belonging.refresh(tuner.model, config, layer.points[adapter_name], kept, kept.names.get(adapter_name, ()))
        # PEFT drops tensors with another adapter's name in their path: with an adapter "mlp", those of all MLPs.
        own = {f"{_MODEL}.{n}": t.detach() for n, t in tuner._own_tensors(adapter_name).items()}
        selector: Any = super() if inner is None else PEFT_TYPE_TO_TUNER_MAPPING[inner.peft_type]
        chosen = selector._get_adapter_state_dict(
            model, config if inner is None else inner, adapter_name, own | state_dict, unwanted_adapter_names
        )
        values = tuner.backbone_tensors.values(tuner.model, adapter_name)
        if tuner.backbone_tensors.in_use == adapter_name:  # a state dict that was passed in may hold gathered shards
            given = {k.removeprefix(f"{_MODEL}.").replace(".base_layer.", "."): v for k, v in state_dict.items()}
            values = {name: given.get(name, value) for name, value in values.items()}
        return chosen | {f"{_MODEL}{_BACKBONE}{name}": value.detach() for name, value in values.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if _BACKBONE in key:
            return key
        if _MODULES in key:  # the default leaves the name inside nested keys: another name would load random weights
            before, _, after = key.partition(_MODULES)
            return f"{before}{_MODULES}{after.removeprefix(adapter_name + '.')}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: ProjectionHeadConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tuner, inner = model.base_model, config.inner_config()
        saved_backbone = {k.partition(_BACKBONE)[2]: v for k, v in state_dict.items() if _BACKBONE in k}
        saved_head = {k: v for k, v in state_dict.items() if _MODULES in k}
        rest = {k: v for k, v in state_dict.items() if _BACKBONE not in k and k not in saved_head}
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, saved_head)
        if inner is not None:
            inner_class: Any = PEFT_TYPE_TO_TUNER_MAPPING[inner.peft_type]
            rest = inner_class._remap_adapter_state_dict_for_load(model, inner, adapter_name, rest)
        mapped |= rest
        tuner._check_saved(adapter_name, config, mapped, saved_backbone)
        own = {f"{_MODEL}.{n}": t for n, t in tuner._own_tensors(adapter_name).items()}
        check_sound(mapped, own)
        check_sound(saved_backbone, bare_tensors(tuner.model))
        modules = getattr(tuner.model, CHILD).projection_head_modules[adapter_name]
        head = {k.partition(f"{_MODULES}{adapter_name}.")[2]: v for k, v in mapped.items() if _MODULES in k}
        check_head(modules, head, config.in_dim)
        tuner.backbone_tensors.load(tuner.model, adapter_name, saved_backbone)
        tuner._return_config(adapter_name)
        return mapped

    def _return_config(self, adapter: str) -> None:
        """Make the object that was given for a saved adapter the adapter's config, as PEFT's other methods do.

        That of a new head stays as it was given: it may serve for another backbone. PEFT marks those that it loads for
        inference, and a config from a file has its width.
        """
        given = self._given.pop(adapter, None)
        if given is not None and (given.inference_mode or given.in_dim is not None):
            given.__dict__.update(self.peft_config[adapter].__dict__)
            self.peft_config[adapter] = given

    def _check_saved(
        self, adapter: str, config: ProjectionHeadConfig, mapped: dict[str, Tensor], backbone: dict[str, Tensor]
    ) -> None:
        """Refuse a file whose tensors are not exactly those of this adapter; PEFT would only warn."""
        trained, place = self.backbone_tensors.values(self.model, adapter), f"{_MODEL}{_BACKBONE}"
        own = {f"{_MODEL}.{n}": t for n, t in self._own_tensors(adapter).items()}
        expected = {n: tuple(t.shape) for n, t in (own | {place + n: t for n, t in trained.items()}).items()}
        found = {n: tuple(t.shape) for n, t in (mapped | {place + n: t for n, t in backbone.items()}).items()}
        problems = [f"missing {n}" for n in expected if n not in found]
        problems += [f"unexpected {n}" for n in found if n not in expected]
        different = [n for n in expected if n in found and found[n] != expected[n]]
        problems += [f"{n} has shape {found[n]}, expected {expected[n]}" for n in different]
        if problems:
            head = f"{_MODEL}{_MODULES}{adapter}."
            listed = "; ".join(p.replace(head, "head: ").replace(f"{_MODEL}.", "") for p in problems[:3])
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise AdapterFileError(
                f"The saved tensors do not fit this adapter (head {config.head!r}, {config.in_dim} → {config.out_dim}):"
                f" {listed}{more}. The file belongs to another config or backbone, or is damaged; download or save it "
                "again."
            )

    def _own_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return the tensors of one adapter's head and PEFT layers, under their names in the model."""
        return {
            f"{module_name}.{name}": tensor
            for module_name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer)
            for name, tensor in module.state_dict(keep_vars=True).items()
            if not name.startswith("base_layer.") and name.split(".")[1:2] == [adapter]  # container.adapter.…
        }


def _restore_trainability(trainability: dict[nn.Parameter, bool]) -> None:
    for parameter, requires_grad in trainability.items():
        parameter.requires_grad_(requires_grad)
