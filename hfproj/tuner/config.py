"""The configuration of a projection head as a PEFT method."""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from hfproj.errors import UsageError, unknown
from hfproj.objectives import OBJECTIVES, create_objective

WIDEST = 1 << 20  # of a representation, a layer, a projection; 65,536 prototypes are the most that a paper has
DEEPEST = 256  # linear layers of a head
# Initialisations that rewrite the backbone's own weights: the bare backbone would no longer be bit-equal.
_REWRITES_BACKBONE = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga", "mica")
_NEEDS_MORE = (PeftType.ADALORA, PeftType.XLORA, PeftType.POLY, PeftType.TRAINABLE_TOKENS)
_CHANGES_BACKBONE = {
    "modules_to_save": "trainable=n for the last n blocks",
    "bias": "bias='none'",
    "trainable_token_indices": "trainable='full'",
    "layer_replication": "the backbone as it is",
    "target_parameters": "target_modules",
}


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


@dataclass
class ProjectionHeadConfig(PeftConfig):
    """A projection head on a backbone, with what else is trained beside it.

    Args:
        head: Name of the head, see `hfproj.list_heads`.
        head_options: Keyword arguments of that head, without `in_dim` and `out_dim`.
        out_dim: Width of the projection z; None takes the head's own default.
        predictor: None, or ``{"head": name, **options}``: a second head from z to the prediction p (BYOL, SimSiam).
        prototypes: None, or the number of prototypes that z is scored against by cosine (SwAV, DINO); a dict
            ``{"count": n, "learn_norm": True}`` multiplies each score by a learned length.
        scales: None, or name → initial value of learnable scalars that the objective asks for (SigLIP).
        backbone_adapter: None, or the config of any other PEFT method for the backbone (``LoraConfig(r=8)``). Without
            `target_modules` it reaches every linear layer (for a CNN: every ungrouped convolution; for LN tuning: every
            norm) that the representation depends on.
        trainable: ``"adapter"`` (head and `backbone_adapter`), ``"head"``, ``"full"`` (head and the whole backbone) or
            a number n (head and the last n blocks). Backbone tensors that are trained are saved with the adapter.
        pooling: ``"cls"``, ``"mean"``, ``"cls_mean"``, ``"max"`` or ``"pooler"``; None takes ``"cls"`` where there is a
            class token, else ``"mean"``.
        layer: -1 for the backbone's final output, or the index of the block whose raw output is the representation.
        objective: ``{"name", **options}`` of the objective that it was trained on; the trainer fills it in.
        regularizers: name → ``{"weight", **options}`` of the regularizers; the trainer fills it in.
        in_dim: Width of the representation; inferred unless the backbone is an unknown module.
        backbone: Where the backbone came from, ``{"library", "id", "kwargs"}``; filled in when known.
        keep_original: Keep the original of every trained backbone tensor on the CPU, so that disabling and unloading
            restore the backbone bit for bit.

    Raises:
        UsageError: an option is unknown or contradicts another.
    """

    head: str = field(default="mlp", metadata={"help": "Name of the head."})
    head_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of the head."})
    out_dim: int | None = field(default=None, metadata={"help": "Width of the projection."})
    predictor: str | dict[str, Any] | None = field(default=None, metadata={"help": "Head from z to the prediction."})
    prototypes: int | dict[str, Any] | None = field(default=None, metadata={"help": "Number of prototypes."})
    scales: dict[str, float] | None = field(default=None, metadata={"help": "Learnable scalars of the objective."})
    objective: dict[str, Any] | None = field(default=None, metadata={"help": "What it was trained on."})
    regularizers: dict[str, Any] | None = field(default=None, metadata={"help": "What was added to the objective."})
    backbone_adapter: PeftConfig | dict[str, Any] | None = field(
        default=None, metadata={"help": "PEFT config for the backbone."}
    )
    trainable: str | int = field(default="adapter", metadata={"help": "head, adapter, full or a number of blocks."})
    pooling: str | None = field(default=None, metadata={"help": "How tokens become one vector."})
    layer: int = field(default=-1, metadata={"help": "Block that is read; -1 is the final output."})
    in_dim: int | None = field(default=None, metadata={"help": "Width of the representation."})
    backbone: dict[str, Any] | None = field(default=None, metadata={"help": "Where the backbone came from."})
    keep_original: bool = field(default=True, metadata={"help": "Keep originals of trained backbone tensors."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.PROJECTION_HEAD
        if self.task_type is not None:
            raise UsageError(
                "task_type must stay None: it makes PeftModel expect input_ids first, which images have not."
            )
        if isinstance(self.predictor, str):
            self.predictor = {"head": self.predictor}
        if self.predictor is not None and "head" not in self.predictor:
            raise UsageError(
                "predictor: expected {'head': name, **options}, for example {'head': 'mlp', 'hidden_dim': 512}."
            )
        self._check_prototypes()
        self._check_sizes()
        if isinstance(self.backbone_adapter, PeftConfig):
            self.backbone_adapter = plain(self.backbone_adapter.to_dict())
        if self.backbone_adapter is not None:
            self._check_backbone_adapter()
        number = isinstance(self.trainable, int) and not isinstance(self.trainable, bool)
        if not number and self.trainable not in ("head", "adapter", "full"):
            raise unknown("value of trainable", self.trainable, ("head", "adapter", "full", "a number of blocks"))
        if self.trains_backbone and self.backbone_adapter is not None:
            raise UsageError(
                f"trainable={self.trainable!r} trains the backbone's own weights, so backbone_adapter has nothing to "
                "add; drop one of the two."
            )

    @classmethod
    def for_objective(cls, objective: Any, **config: Any) -> "ProjectionHeadConfig":
        """Return a config with the predictor, the prototypes and the scales that an objective needs.

        Args:
            objective: An objective, its name, or ``{"name": name, **options}``.
            config: Values of the config. Without a `predictor` or `prototypes`, where the objective needs such: an MLP
                with 512 hidden units, 300 prototypes.

        Raises:
            UsageError: no objective has this name, or a value of the config can't work.

        Example:
            >>> ProjectionHeadConfig.for_objective("byol").predictor
            {'head': 'mlp', 'hidden_dim': 512}
        """
        if isinstance(objective, str):
            objective = {"name": objective}
        if isinstance(objective, dict):
            options = {**objective}
            name = options.pop("name")
            # Without the number of images, which the trainer knows, there is the class alone: it says what it needs.
            unknown_size = "num_images" in OBJECTIVES.options(name) and "num_images" not in options
            objective = OBJECTIVES.get(name) if unknown_size else create_objective(name, **options)
        needs = getattr(objective, "needs", frozenset())
        if "prediction" in needs and config.get("predictor") is None:
            config["predictor"] = {"head": "mlp", "hidden_dim": 512}
        if "scores" in needs and config.get("prototypes") is None:
            config["prototypes"] = 300
        if "scales" in needs and config.get("scales") is None:
            config["scales"] = dict(objective.scales)
        return cls(**config)

    def _check_sizes(self) -> None:
        """Refuse what no memory holds, before anything is made of it: a config may be somebody else's file."""
        sized = {name: getattr(self, name) for name in ("in_dim", "out_dim", "head_options", "predictor", "prototypes")}
        for name, value in entries(sized):
            numbers = value if isinstance(value, list | tuple) else [value]
            if len(numbers) > DEEPEST or any(isinstance(n, int) and abs(n) > WIDEST for n in numbers):
                raise UsageError(f"{name}={reprlib.repr(value)}: expected sizes of at most {WIDEST:,}.")
            if name == "depth" and isinstance(value, int) and value > DEEPEST:
                raise UsageError(f"depth={value}: expected at most {DEEPEST} layers.")

    def _check_prototypes(self) -> None:
        if self.prototypes is None:
            return
        options = self.prototypes if isinstance(self.prototypes, dict) else {"count": self.prototypes}
        count = options.get("count")
        if not isinstance(count, int) or count < 2 or set(options) - {"count", "learn_norm"}:
            raise UsageError(
                f"prototypes={self.prototypes!r}: expected None, a number of at least 2, or "
                "{'count': number, 'learn_norm': bool}."
            )

    @property
    def trains_backbone(self) -> bool:
        """Whether tensors of the backbone itself are trained and saved with the adapter."""
        return self.trainable == "full" or isinstance(self.trainable, int)

    def inner_config(self) -> PeftConfig | None:
        """Return `backbone_adapter` as a PEFT config, or None."""
        if self.backbone_adapter is None:
            return None
        return PeftConfig.from_peft_type(**self.backbone_adapter)

    def _check_backbone_adapter(self) -> None:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners.tuners_utils import BaseTuner

        kind = self.backbone_adapter.get("peft_type")
        kind = getattr(kind, "value", kind)
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
        own_keys = BaseTuner._remove_adapter_name_from_key.__func__
        if (
            not (isinstance(tuner, type) and issubclass(tuner, BaseTuner))
            or kind in (PeftType.PROJECTION_HEAD, *_NEEDS_MORE)
            or tuner.uses_shared_state
            or tuner._remove_adapter_name_from_key.__func__ is not own_keys
        ):
            raise UsageError(
                f"backbone_adapter of type {kind!r} can't live beside a head: it shares state between layers, learns "
                "prompts, needs calls of its own while training, or is a head itself; use LoRA, DoRA, IA3, LN tuning, "
                "LoHa, OFT or BOFT."
            )
        for option, cure in _CHANGES_BACKBONE.items():
            if self.backbone_adapter.get(option) not in (None, "none", []):
                raise UsageError(
                    f"backbone_adapter with {option}={self.backbone_adapter[option]!r} would change the backbone's "
                    f"own tensors, so the bare backbone could not be restored; use {cure}."
                )
        if self.backbone_adapter.get("megatron_config") is not None:  # makes PEFT import the module megatron_core
            raise UsageError("backbone_adapter with megatron_config is not supported: an adapter names no code to run.")
        init = self.backbone_adapter.get("init_lora_weights")
        if isinstance(init, str) and init.split("_niter")[0] in _REWRITES_BACKBONE:
            raise UsageError(
                f"init_lora_weights={init!r} rewrites the backbone's weights, so that it could not be restored; "
                "use init_lora_weights=True, 'gaussian' or 'orthogonal'."
            )
