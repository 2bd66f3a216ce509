"""Training: `transformers.Trainer` with several views, objectives of the global batch and online probes.

It imports every room below it: `hub` for pushing while it trains, `probes` and `features` for measuring.
"""

from hfproj.training import callbacks as callbacks
from hfproj.training.arguments import ProjectionTrainingArguments
from hfproj.training.callbacks import (
    CollapseCallback, CurvatureCallback, OnlineProbeCallback, SpectrumCallback, UpdateRatioCallback,
)  # fmt: skip
from hfproj.training.trainer import ProjectionTrainer

__all__ = [
    "CollapseCallback", "CurvatureCallback", "OnlineProbeCallback", "ProjectionTrainer",
    "ProjectionTrainingArguments", "SpectrumCallback", "UpdateRatioCallback",
]  # fmt: skip
