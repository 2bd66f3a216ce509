"""The configuration of a projection head as a PEFT method."""

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils import PeftType, TaskType
from torch import nn

from hfproj import limits
from hfproj.backbones.structure import READING
from hfproj.checking import explained
from hfproj.errors import UsageError, check_choice, check_type
from hfproj.heads import HEADS
from hfproj.objectives import OBJECTIVES, create_objective
from hfproj.typing import OneOf, Pooling

# Initialisations that rewrite the backbone's own weights: the bare backbone could not be restored bit for bit.
_REWRITES_BACKBONE = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga", "mica")
_NEEDS_MORE = (PeftType.ADALORA, PeftType.XLORA, PeftType.POLY, PeftType.TRAINABLE_TOKENS)
_CHANGES_BACKBONE = {
    "modules_to_save": "trainable=n for the last n blocks",
    "bias": "bias='none'", "trainable_token_indices": "trainable='full'",
    "layer_replication": "the backbone as it is", "target_parameters": "target_modules",
}  # fmt: skip


def plain(value: Any) -> Any:
    """Return `value` with sets as sorted lists, tuples as lists and enums as strings, so that JSON can hold it."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(getattr(value, "value", value)) if isinstance(value, str) else value


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every name with its value, at every depth."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield name, part
            yield from entries(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from entries(part)


@explained
@dataclass
class ProjectionHeadConfig(PeftConfig):
    """A projection head on a backbone, with what else is trained beside it.

    Args:
        head: Name of the head, see `hfproj.list_heads`.
        head_options: Keyword arguments of that head, without `in_dim` and `out_dim`.
        out_dim: Width of the projection z; None takes the head's own default.
        predictor: A second head from z to the prediction p (BYOL, SimSiam): its name, or ``{"head": name, **options}``.
        prototypes: Number of prototypes that z is compared with by cosine (SwAV, DINO); a dict ``{"count": n,
            "learn_norm": True}`` multiplies each cosine by a learned length.
        scales: Name → initial value of the learnable scalars that the objective needs (SigLIP).
        objective: ``{"name", **options}`` of the objective that the adapter was trained on; the trainer fills it in.
        regularizers: Name → ``{"weight", **options}`` of the regularizers; the trainer fills it in.
        backbone_adapter: The config of any other PEFT method for the backbone (``LoraConfig(r=8)``). Without
            `target_modules` it reaches every linear layer (for a CNN: every ungrouped convolution; for LN tuning: every
            norm) that the representation depends on.
        trainable: ``"adapter"`` (head and `backbone_adapter`), ``"head"``, ``"full"`` (head and the whole backbone) or
            a number n (head and the last n blocks). Backbone tensors that are trained are saved with the adapter.
        pooling: ``"cls"``, ``"mean"``, ``"cls_mean"``, ``"max"``, ``"last"`` (token of a text) or ``"pooler"`` (the
            backbone's own pooled output); None takes what the backbone's author reads (docs/backbones.md).
        layer: -1 for the backbone's final output, or the index of the block whose raw output is the representation.
        in_dim: Width of the representation; inferred unless the backbone is an unknown module.
        backbone: Source of the backbone, ``{"library", "id", "kwargs"}``; filled in when known.
        reading: Version of the rules by which h is read, that of today unless given; 1 in adapters of hfproj 0.1.0.
        keep_original: Keep the original of every trained backbone tensor on the CPU, so that disabling and unloading
            restore the backbone bit for bit.
        fingerprint: What the backbone was, filled in when the head is attached, and compared from then on.
        backbone_check: ``"error"`` refuses a backbone with other weights than the adapter was made on; ``"warn"`` says
            that they are meant, and the card says so. Another structure is always refused. It holds for this use and is
            not saved: who loads the adapter says so again.

    Raises:
        UsageError: If an option is unknown, out of its range, or contradicts another.
    """

    head: str = "mlp"
    head_options: dict[str, Any] = field(default_factory=dict)
    out_dim: int | None = None
    predictor: str | dict[str, Any] | None = None
    prototypes: int | dict[str, Any] | None = None
    scales: dict[str, float] | None = None
    objective: dict[str, Any] | None = None
    regularizers: dict[str, Any] | None = None
    backbone_adapter: PeftConfig | dict[str, Any] | None = None
    trainable: OneOf["adapter", "head", "full"] | int = "adapter"
    pooling: Pooling | None = None
    layer: int = -1
    in_dim: int | None = None
    backbone: dict[str, Any] | None = None
    keep_original: bool = True
    fingerprint: dict[str, Any] | None = None
    backbone_check: OneOf["error", "warn"] = "error"
    reading: int | None = None

    def __post_init__(self) -> None:
        # PEFT saves its version, which `dataclasses.replace` hands on too, and a model's config for inference.
        self.of_file = self.peft_version is not None and (self.inference_mode or self.reading is None)
        if self.reading is None:  # which files from before the rules don't have
            self.reading = 1 if self.of_file else READING
        if self.task_type is not None and self.task_type not in list(TaskType):  # the first field: an option's value
            width = f", out_dim={self.peft_type}" * isinstance(self.peft_type, int)
            name = f"head={self.task_type!r}{width}" if isinstance(self.task_type, str) else "head='mlp', out_dim=128"
            raise UsageError(
                f"Expected the options of ProjectionHeadConfig by name, got {reprlib.repr(self.task_type)} for "
                f"task_type, which is None; write ProjectionHeadConfig({name})."
            )
        super().__post_init__()
        self.peft_type = PeftType("PROJECTION_HEAD")  # in the enum since hfproj.tuner was imported
        if self.task_type is not None:
            why = "with a task type PeftModel expects input_ids first, which images do not have"
            raise UsageError(f"Expected task_type to be None, got {self.task_type!r}: {why}.")
        check_type(
            "head", self.head, str, "give a name of hfproj.list_heads(), your own by hfproj.register_head(name, cls)"
        )
        check_type("head_options", self.head_options, Mapping, "give the keywords of the head")
        check_type("layer", self.layer, int, "give the index of a block, or -1 for the final output")
        of_peft = (PeftConfig, Mapping, type(None))
        check_type("backbone_adapter", self.backbone_adapter, of_peft, "give a config of PEFT, such as LoraConfig(r=8)")
        if isinstance(self.predictor, str):
            self.predictor = {"head": self.predictor}
        if self.predictor is not None and not (isinstance(self.predictor, Mapping) and "head" in self.predictor):
            expected = "{'head': name, **options}, for example {'head': 'mlp', 'hidden_dim': 512}"
            raise UsageError(f"Expected predictor to be {expected}, got {self.predictor!r}.")
        if "in_dim" in self.head_options:
            given = reprlib.repr(self.head_options)
            raise UsageError(
                f"Expected head_options without in_dim, got {given}; leave it out: the backbone decides it."
            )
        check_type(
            "scales", self.scales, (Mapping, type(None)), "give a dict, name → initial value: {'logit_scale': 2.3}"
        )
        self._check_prototypes()
        self._check_sizes()
        if isinstance(self.backbone_adapter, PeftConfig):
            self.backbone_adapter = cast(dict[str, Any], plain(self.backbone_adapter.to_dict()))
        if self.backbone_adapter is not None:
            self._check_backbone_adapter(self.backbone_adapter)
        check_choice("backbone_check", self.backbone_check, ("error", "warn"))
        for name, kind in (("reading", int), ("in_dim", int), ("backbone", Mapping), ("fingerprint", Mapping)):
            check_type(name, getattr(self, name), (kind, type(None)), "leave it out")
        number = isinstance(self.trainable, int) and not isinstance(self.trainable, bool)
        if not number:
            check_choice("value of trainable", self.trainable, ("head", "adapter", "full", "a number of blocks"))
        if self.trains_backbone and self.backbone_adapter is not None:
            raise UsageError(
                f"trainable={self.trainable!r} trains the backbone itself, and backbone_adapter needs it frozen; drop "
                "one of the two."
            )

    @staticmethod
    def _belongs(name: str, value: Any) -> str | None:
        """Return how an option is written that belongs to the head, the objective or the backbone's adapter."""
        if any(name in HEADS.options(head) for head in HEADS.list()):
            return f"head_options={{{name!r}: {reprlib.repr(value)}}}"
        if name in LoraConfig.__dataclass_fields__:
            return f"backbone_adapter=LoraConfig({name}={reprlib.repr(value)})"
        return None

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Return what a file says without its `backbone_check`: its user says whether other weights are meant."""
        return {name: value for name, value in super().check_kwargs(**kwargs).items() if name != "backbone_check"}

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write the config into a folder, see ``PeftConfig.save_pretrained``."""
        meant, self.backbone_check = self.backbone_check, "error"
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.backbone_check = meant

    @classmethod
    def for_objective(cls, objective: nn.Module | str | Mapping[str, Any], **config: Any) -> "ProjectionHeadConfig":
        """Return a config with the predictor, the prototypes and the scales that an objective needs.

        Args:
            objective: An objective, its name, or ``{"name": name, **options}``.
            config: Values of the config. Where the objective needs a `predictor` or `prototypes` and none are given: an
                MLP with 512 hidden units, 300 prototypes.

        Raises:
            UsageError: If no objective has this name, or a value of the config is refused.

        Example:
            >>> ProjectionHeadConfig.for_objective("byol").predictor
            {'head': 'mlp', 'hidden_dim': 512}
        """
        made: Any = objective
        if not isinstance(objective, nn.Module):
            if not isinstance(objective, str) and not (isinstance(objective, Mapping) and "name" in objective):
                wanted = "an objective, its name such as 'nt_xent', or {'name': name, **options}"
                raise UsageError(f"Expected {wanted}, got {objective!r:.80}; see hfproj.list_objectives().")
            options = {"name": objective} if isinstance(objective, str) else dict(objective)
            name = options.pop("name")
            # Without the number of images, which the trainer knows, the class alone says what it needs.
            unknown_size = "num_images" in OBJECTIVES.options(name) and "num_images" not in options
            made = OBJECTIVES.get(name) if unknown_size else create_objective(name, **options)
        needs = getattr(made, "needs", ())
        if "prediction" in needs and config.get("predictor") is None:
            config["predictor"] = {"head": "mlp", "hidden_dim": 512}
        if "scores" in needs and config.get("prototypes") is None:
            config["prototypes"] = 300
        if "scales" in needs and config.get("scales") is None:
            config["scales"] = dict(made.scales)
        return cls(**config)

    def _check_sizes(self) -> None:
        """Refuse sizes that no memory holds before anything is allocated: a config may be an untrusted file."""
        sized = {name: getattr(self, name) for name in ("in_dim", "out_dim", "head_options", "predictor", "prototypes")}
        for name, value in entries(sized):
            numbers = value if isinstance(value, list | tuple) else [value]
            if len(numbers) > limits.LAYERS or any(isinstance(n, int) and abs(n) > limits.WIDTH for n in numbers):
                raise UsageError(f"Expected sizes of at most {limits.WIDTH:,} as {name}, got {reprlib.repr(value)}.")
            if name == "depth" and isinstance(value, int) and value > limits.LAYERS:
                raise UsageError(f"Expected depth to be at most {limits.LAYERS} layers, got {value}.")

    def _check_prototypes(self) -> None:
        if self.prototypes is None:
            return
        options = self.prototypes if isinstance(self.prototypes, dict) else {"count": self.prototypes}
        count = options.get("count")
        if not isinstance(count, int) or count < 2 or set(options) - {"count", "learn_norm"}:
            expected = "None, a number of at least 2, or {'count': number, 'learn_norm': bool}"
            raise UsageError(f"Expected prototypes to be {expected}, got {self.prototypes!r}.")

    @property
    def trains_backbone(self) -> bool:
        """Whether tensors of the backbone itself are trained and saved with the adapter."""
        return self.trainable == "full" or isinstance(self.trainable, int)

    @property
    def backbone_options(self) -> dict[str, Any]:
        """`backbone_adapter` as plain values, which is how it is kept; an empty dict for None."""
        return cast(dict[str, Any], self.backbone_adapter or {})

    def inner_config(self) -> PeftConfig | None:
        """Return `backbone_adapter` as a PEFT config, or None."""
        return PeftConfig.from_peft_type(**self.backbone_options) if self.backbone_adapter is not None else None

    @staticmethod
    def _check_backbone_adapter(adapter: dict[str, Any]) -> None:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners.tuners_utils import BaseTuner

        kind = getattr(adapter.get("peft_type"), "value", adapter.get("peft_type"))
        if kind is None:
            given = f"backbone_adapter={reprlib.repr(adapter)}"
            why = "can't live beside a head: it has no peft_type; give a config of PEFT, LoraConfig(r=8)"
            raise UsageError(f"{given} {why}.")
        tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
        known = isinstance(tuner, type) and issubclass(tuner, BaseTuner)
        if (
            not known
            or kind in ("PROJECTION_HEAD", *_NEEDS_MORE)
            or tuner.uses_shared_state
            # A method with keys of its own would be saved under names that a head's adapter can't translate back.
            or tuner._remove_adapter_name_from_key.__func__ is not BaseTuner._remove_adapter_name_from_key.__func__
        ):
            raise UsageError(
                f"backbone_adapter of type {kind!r} can't live beside a head: it shares state between layers, learns "
                "prompts, needs calls of its own while training, or is a head itself; use LoRA, DoRA, IA3, LN tuning, "
                "LoHa, OFT or BOFT."
            )
        for option, hint in _CHANGES_BACKBONE.items():
            if adapter.get(option) not in (None, "none", []):
                raise UsageError(
                    f"backbone_adapter with {option}={adapter[option]!r} would change the backbone's own tensors, so "
                    f"the bare backbone could not be restored; use {hint}."
                )
        if adapter.get("megatron_config") is not None:  # makes PEFT import the module megatron_core
            raise UsageError("backbone_adapter with megatron_config is not supported: it would import a module.")
        init = adapter.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_REWRITES_BACKBONE):  # PEFT takes any capitals
            raise UsageError(
                f"init_lora_weights={init!r} rewrites the backbone's weights, so that it could not be restored; "
                "use init_lora_weights=True, 'gaussian' or 'orthogonal'."
            )
        for name, value in entries(adapter):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and "seed" not in name and "key" not in name and not abs(value) <= limits.NUMBER:
                raise UsageError(f"backbone_adapter: {name}={value!r}: expected at most {limits.NUMBER:,.0f}.")
