"""What a preset is."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from hfproj.tuner import ProjectionHeadConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published setting.

    Learning rate and batch go together: the batch is that of all processes, so divide it by their number, and scale the
    learning rate with it if you change it.

    Args:
        line: What it is.
        source: Paper, table or file that it follows, what that leaves open, and how this differs.
        objective: ``{"name": name, **options}``, without what `ProjectionTrainer` fills in.
        head: Name of the head.
        head_options: Its options, without `out_dim`.
        out_dim: Width of the projection; None where the head decides it.
        predictor: As in `ProjectionHeadConfig`.
        prototypes: As in `ProjectionHeadConfig`.
        scales: As in `ProjectionHeadConfig`.
        regularizers: As in `ProjectionTrainer`.
        views: Options of `hfproj.ImageViews`; those that are missing are its defaults, SimCLR's.
        training: Values of `ProjectionTrainingArguments`.
    """

    line: str
    source: str
    objective: dict[str, Any]
    head: str
    head_options: dict[str, Any] = field(default_factory=dict)
    out_dim: int | None = None
    predictor: dict[str, Any] | None = None
    prototypes: int | dict[str, Any] | None = None
    scales: dict[str, float] | None = None
    regularizers: dict[str, Any] = field(default_factory=dict)
    views: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> ProjectionHeadConfig:
        """Return the config of the adapter; `changes` replace its values.

        Raises:
            UsageError: If a change contradicts another value.
        """
        names = ("head", "head_options", "out_dim", "predictor", "prototypes", "scales")
        own = {name: copy.deepcopy(getattr(self, name)) for name in names}
        return ProjectionHeadConfig(**{**own, **changes})

    def but(self, line: str, source: str = "", **changes: Any) -> "Preset":
        """Return this preset with another `line`, `source` after its own, and `changes` in place of its values."""
        return replace(self, line=line, source=f"{self.source} {source}".strip(), **changes)
