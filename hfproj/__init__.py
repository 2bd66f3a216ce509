"""Projection heads of self-supervised learning as PEFT adapters.

``import hfproj`` registers the PEFT method ``PROJECTION_HEAD``; everything else is imported when first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ProjectionHeadConfig": "tuner",
    "ProjectionOutput": "tuner",
    "load_backbone": "backbones",
    "from_pretrained": "hub.pull",
    "load_head": "hub.pull",
    "detach": "hub.pull",
    "list_adapters": "hub.pull",
    "push_to_hub": "hub.push",
    "convert": "hub.convert",
    "list_converters": "hub.convert",
    "export_backbone_adapter": "hub.export",
    "export_merged": "hub.export",
    "export_onnx": "hub.export",
    "export_program": "hub.export",
    "ProjectionTrainer": "training.trainer",
    "ProjectionTrainingArguments": "training.arguments",
    "SpectrumCallback": "training.callbacks",
    "CurvatureCallback": "training.callbacks",
    "UpdateRatioCallback": "training.callbacks",
    "CollapseCallback": "training.callbacks",
    "OnlineProbeCallback": "training.callbacks",
    "ImageViews": "data.images",
    "EvalImages": "data.images",
    "TextViews": "data.text",
    "EvalText": "data.text",
    "IndexedDataset": "data.indexing",
    "EpochSampler": "data.indexing",
    "load_image_dataset": "data.datasets",
    "CorruptedDataset": "data.corruptions",
    "corrupt": "data.corruptions",
    "list_corruptions": "data.corruptions",
    "cache_features": "data.cache",
    "CachedFeatures": "data.cache",
    "FeatureViews": "data.cache",
    "EvalFeatures": "data.cache",
    "FeatureBackbone": "backbones",
    "create_head": "heads",
    "list_heads": "heads",
    "register_head": "heads",
    "create_objective": "objectives",
    "list_objectives": "objectives",
    "register_objective": "objectives",
    "register_regularizer": "regularizers",
    "create_regularizer": "regularizers",
    "list_regularizers": "regularizers",
    "get_preset": "presets",
    "list_presets": "presets",
    "KNNProbe": "probes",
    "LinearProbe": "probes",
    "create_probe": "probes",
    "list_probes": "probes",
    "extract_features": "probes",
    "evaluate": "probes",
    "Results": "results",
    "report": "reporting",
    "HfprojError": "errors",
    "UsageError": "errors",
    "AdapterFileError": "errors",
    "HubError": "errors",
    "NonFiniteLossError": "errors",
    "CollapseWarning": "errors",
}
_SUBMODULES = (
    "backbones",
    "cli",
    "data",
    "diagnostics",
    "distributed",
    "functional",
    "geometry",
    "heads",
    "hub",
    "objectives",
    "plots",
    "presets",
    "probes",
    "regularizers",
    "training",
    "tuner",
)

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"hfproj.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"hfproj.{name}")
    raise AttributeError(f"module 'hfproj' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_SUBMODULES])


import hfproj.tuner  # noqa: E402, F401  registers the PEFT method
