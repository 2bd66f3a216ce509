"""What one run is: a row on its data at a scale, with every value written out, and the model and trainer it makes."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback, set_seed

from hfproj import distributed
from hfproj.backbones import load_backbone
from hfproj.errors import UsageError, unknown
from hfproj.heads import HEADS
from hfproj.presets import Preset, get_preset
from hfproj.reproduction.sources import Source
from hfproj.reproduction.study import PARTS, Row, Scale, Study
from hfproj.reproduction.watches import watchers
from hfproj.training import ProjectionTrainer, ProjectionTrainingArguments
from hfproj.tuner.layer import CHILD

WIDTHS = ("hidden_dim", "out_dim", "width", "top_k")  # of heads, that a scale multiplies


def preset_of(row: Row, presets: Mapping[str, str] = MappingProxyType({})) -> Preset:
    """Return the preset of a row, or the one that `presets` put in its place, with the row's changes.

    Example:
        >>> row = Row(name="", preset="bottleneck_simclr_discretised", changes={"head_options": {"levels": 8}})
        >>> preset_of(row).head_options["levels"]
        8
    """
    preset = get_preset(presets.get(row.preset, row.preset))
    for name in row.changes:
        if name not in (known := [f.name for f in fields(preset) if f.name not in ("line", "source")]):
            raise unknown(f"part of a preset, changed by row {row.name!r}:", name, known)
    changes: dict[str, Any] = {}
    for name, value in row.changes.items():
        whole = name not in PARTS or value is None or getattr(preset, name) is None or "head" in row.changes
        changes[name] = value if whole else {**getattr(preset, name), **value}
    empty: dict[str, Any] = {
        name: {} for name, value in changes.items() if value is None and name not in ("predictor", "out_dim")
    }
    return preset.but(preset.line, **{**changes, **empty})


def scaled(
    head: str, options: Mapping[str, Any], factor: float | int, *, out_dim: int | None = None
) -> tuple[dict[str, Any], int | None]:
    """Return options and `out_dim` of a head whose widths are multiplied by `factor`, those of heads inside it, too.

    Example:
        >>> scaled("simclr_solo", {}, 0.25)
        ({'hidden_dim': 512}, 64)
    """
    known, options = HEADS.options(head), dict(options)

    def default(name: str) -> Any:
        return options.get(name, known[name].default if name in known else None)

    for name in ("hidden_dim", "width", "top_k"):
        if isinstance(default(name), int):
            options[name] = max(1, round(factor * default(name)))
    if isinstance(options.get("out_dim"), int):
        options["out_dim"] = max(1, round(factor * options["out_dim"]))
    own_width: Any = out_dim if out_dim is not None else default("out_dim") if "out_dim" not in options else None
    for inner in ("head", "stem"):
        within = default(inner) if inner in known else None
        if within is not None:
            options[f"{inner}_options"], width = scaled(within, default(f"{inner}_options") or {}, factor)
            if inner == "head" and own_width is None:
                own_width = None if width is None else round(width / factor)
    return options, max(1, round(factor * own_width)) if isinstance(own_width, int) else None


@dataclass(frozen=True)
class Setting:
    """One run but for its seed."""

    study: Study
    row: Row
    data: str
    scale: Scale

    @property
    def source(self) -> Source:
        """Where its images come from."""
        return self.scale.data.get(self.data, self.study.data[self.data])

    @property
    def preset(self) -> Preset:
        """The preset with the changes of row and scale."""
        preset, scale = preset_of(self.row, self.scale.presets), self.scale
        options, out_dim = scaled(preset.head, preset.head_options, scale.heads, out_dim=preset.out_dim)
        predictor = copy.deepcopy(preset.predictor)
        if predictor:
            name, classes = predictor.pop("head"), predictor.pop("out_dim", None)
            predictor = {"head": name, **scaled(name, predictor, scale.heads)[0]}
            predictor |= {} if classes is None else {"out_dim": classes}
        prototypes = preset.prototypes
        if isinstance(prototypes, int):
            prototypes = max(2, round(scale.heads * prototypes))
        training = {**preset.training, **scale.training, **self.row.changes.get("training", {})}
        if "max_steps" in scale.training:
            training.pop("num_train_epochs", None)
        if not training.get("lars"):
            training = {name: value for name, value in training.items() if not name.startswith("lars")}
        return preset.but(
            preset.line, head_options=options, out_dim=out_dim, predictor=predictor, prototypes=prototypes,
            training=training, views={**preset.views, **scale.views},
        )  # fmt: skip

    def written(self) -> dict[str, Any]:
        """Return every value that decides what the run is, as plain JSON."""
        preset, scale = self.preset, self.scale
        parts = ("head", "head_options", "out_dim", "predictor", "prototypes", "scales", "pooling", "objective",
                 "regularizers", "views", "training")  # fmt: skip
        return plain({
            "preset": scale.presets.get(self.row.preset, self.row.preset), "trained": self.row.trained,
            **{name: getattr(preset, name) for name in parts},
            "evaluated": self.row.evaluated, "start": self.row.start, "watched": self.study.watched,
            "backbone": scale.backbone, "trainable": scale.trainable, "lora_rank": scale.lora_rank,
            "data": {"source": type(self.source).__name__, **plain(self.source)},
            "images": scale.images, "test_images": scale.test_images,
            "columns": sorted(self.study.every_column, key=lambda column: column.name),
            "spectra": sorted(self.study.spectra),
        })  # fmt: skip

    @property
    def key(self) -> str:
        """A name of the run that changes with any value: runs of other settings are never taken for it."""
        text = json.dumps(self.written(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def model(self, seed: int) -> PeftModel:
        """Return the backbone with its head, the same for a seed."""
        set_seed(seed)
        backbone = load_backbone(**self.scale.backbone)
        lora = LoraConfig(r=self.scale.lora_rank, lora_alpha=self.scale.lora_rank) if self.scale.lora_rank else None
        config = self.preset.config(trainable=self.scale.trainable, backbone_adapter=lora, keep_original=False)
        model = get_peft_model(backbone, config)
        if self.row.start != 1:
            with torch.no_grad():
                for module in active_head(model).modules():
                    if isinstance(module, nn.Linear):
                        module.weight.mul_(self.row.start)
        return model.to(memory_format=torch.channels_last) if has_convolutions(backbone) else model

    def trainer(self, model: PeftModel, items: Any, seed: int, folder: Path, **options: Any) -> ProjectionTrainer:
        """Return what trains it on items of a data set; `options` are those of `hfproj.ProjectionTrainingArguments`."""
        preset = self.preset
        world, batch = distributed.world_size(), preset.training["per_device_train_batch_size"]
        if batch % world:
            raise UsageError(
                f"Expected a number of processes that divides the batch of {batch}, got {world}; train this study on "
                "another number of processes, or with workers=…, each of which trains rows of its own."
            )
        options = {"per_device_train_batch_size": batch // world, **options}  # a preset's batch is that of all
        quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 50}
        arguments = ProjectionTrainingArguments(
            output_dir=str(folder), seed=seed, **{**quiet, **preset.training, **options}
        )
        views = self.source.views(model, seed=seed, **preset.views)
        return ProjectionTrainer(
            model, arguments, objective=preset.objective, regularizers=preset.regularizers, train_dataset=items,
            data_collator=views, callbacks=self._watchers(arguments, len(items)),
        )  # fmt: skip

    def _watchers(self, arguments: ProjectionTrainingArguments, images: int) -> list[TrainerCallback]:
        """Return what follows the study's `watched` along training."""
        steps = arguments.max_steps
        if steps < 0:
            steps = round(arguments.num_train_epochs * images / (arguments.train_batch_size * distributed.world_size()))
        return watchers(self.study.watched, steps)


def active_head(model: Any) -> Any:
    """Return the active head of a model."""
    heads = getattr(model.get_base_model(), CHILD)
    return heads.projection_head_modules[heads.active_name].head


def has_convolutions(backbone: nn.Module) -> bool:
    """Return whether a backbone computes with convolutions mostly, which want the channels last in memory."""
    return sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) > 3


def plain(value: Any) -> Any:
    """Return a value as JSON has it: tuples as lists, dataclasses as dicts of what is not the default.

    A field that a later version adds then leaves the keys of finished runs as they are.

    Example:
        >>> from hfproj.reproduction import Column
        >>> plain({"column": Column(name="a", measure="knn"), "size": (3, 4)})
        {'column': {'name': 'a', 'measure': 'knn'}, 'size': [3, 4]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: own for f in fields(value) if (own := getattr(value, f.name)) != _default(f)}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def _default(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
