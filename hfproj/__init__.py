"""Projection heads of self-supervised learning as PEFT adapters.

After ``import hfproj`` PEFT has the method ``PROJECTION_HEAD``: at once if PEFT has been imported, else as soon as it
is. Everything else is imported when first used.
"""

from typing import TYPE_CHECKING

from hfproj.lazy import lazy_names, when_imported

# fmt: off
if TYPE_CHECKING:
    from hfproj import (
        backbones as backbones, checking as checking, cli as cli, commands as commands, converters as converters,
        data as data, diagnostics as diagnostics, distributed as distributed, errors as errors, export as export,
        features as features, filenames as filenames, files as files, functional as functional, geometry as geometry,
        heads as heads, hints as hints, hub as hub, inspection as inspection, lazy as lazy, limits as limits,
        objectives as objectives, plots as plots, presets as presets, probes as probes, redaction as redaction,
        registry as registry, regularizers as regularizers, reporting as reporting,
        reproduction as reproduction, results as results, saving as saving, secret_names as secret_names,
        shifts as shifts, strict_json as strict_json, studies as studies, training as training, tuner as tuner,
        typing as typing,
    )
    from hfproj.backbones import FeatureBackbone, load_backbone
    from hfproj.converters import convert, list_converters
    from hfproj.data import (
        EpochSampler, EvalImages, EvalText, ImageViews, IndexedDataset, TextViews, load_image_dataset,
    )
    from hfproj.errors import (
        AdapterFileError, CollapseWarning, HfprojError, HubError, NonFiniteLossError, SaveError, UsageError,
    )
    from hfproj.export import detach, export_backbone_adapter, export_merged, export_onnx, export_program
    from hfproj.features import CachedFeatures, EvalFeatures, FeatureViews, cache_features, extract_features
    from hfproj.heads import create_head, list_heads, register_head
    from hfproj.hub import from_pretrained, list_adapters, load_head, push_to_hub
    from hfproj.inspection import autopsy, cut_head, invariance_report
    from hfproj.objectives import create_objective, list_objectives, register_objective
    from hfproj.presets import get_preset, list_presets
    from hfproj.probes import KNNProbe, LinearProbe, create_probe, evaluate, list_probes, register_probe
    from hfproj.regularizers import create_regularizer, list_regularizers, register_regularizer
    from hfproj.reporting import report, write_card
    from hfproj.reproduction import get_study, list_studies, reproduce
    from hfproj.results import Results
    from hfproj.shifts import CorruptedDataset, corrupt, list_corruptions
    from hfproj.training import (
        CollapseCallback, CurvatureCallback, OnlineProbeCallback, ProjectionTrainer, ProjectionTrainingArguments,
        SpectrumCallback, UpdateRatioCallback,
    )
    from hfproj.tuner import ProjectionHeadConfig, ProjectionOutput

__version__ = "0.2.0.dev0"

__all__ = [
    "AdapterFileError", "CachedFeatures", "CollapseCallback", "CollapseWarning", "CorruptedDataset",
    "CurvatureCallback", "EpochSampler", "EvalFeatures", "EvalImages", "EvalText", "FeatureBackbone", "FeatureViews",
    "HfprojError", "HubError", "ImageViews", "IndexedDataset", "KNNProbe", "LinearProbe", "NonFiniteLossError",
    "OnlineProbeCallback", "ProjectionHeadConfig", "ProjectionOutput", "ProjectionTrainer",
    "ProjectionTrainingArguments", "Results", "SaveError", "SpectrumCallback", "TextViews", "UpdateRatioCallback",
    "UsageError", "autopsy", "cache_features", "convert", "corrupt", "create_head", "create_objective", "create_probe",
    "create_regularizer", "cut_head", "detach", "evaluate", "export_backbone_adapter", "export_merged", "export_onnx",
    "export_program", "extract_features", "from_pretrained", "get_preset", "get_study", "invariance_report",
    "list_adapters", "list_converters", "list_corruptions", "list_heads", "list_objectives", "list_presets",
    "list_probes", "list_regularizers", "list_studies", "load_backbone", "load_head", "load_image_dataset",
    "push_to_hub", "register_head", "register_objective", "register_probe", "register_regularizer", "report",
    "reproduce", "write_card",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {
        "backbones": ["FeatureBackbone", "load_backbone"],
        "converters": ["convert", "list_converters"],
        "data": ["EpochSampler", "EvalImages", "EvalText", "ImageViews", "IndexedDataset", "TextViews",
                 "load_image_dataset"],
        "errors": ["AdapterFileError", "CollapseWarning", "HfprojError", "HubError", "NonFiniteLossError",
                   "SaveError", "UsageError"],
        "export": ["detach", "export_backbone_adapter", "export_merged", "export_onnx", "export_program"],
        "features": ["CachedFeatures", "EvalFeatures", "FeatureViews", "cache_features", "extract_features"],
        "heads": ["create_head", "list_heads", "register_head"],
        "hub": ["from_pretrained", "list_adapters", "load_head", "push_to_hub"],
        "inspection": ["autopsy", "cut_head", "invariance_report"],
        "objectives": ["create_objective", "list_objectives", "register_objective"],
        "presets": ["get_preset", "list_presets"],
        "probes": ["KNNProbe", "LinearProbe", "create_probe", "evaluate", "list_probes", "register_probe"],
        "regularizers": ["create_regularizer", "list_regularizers", "register_regularizer"],
        "reproduction": ["get_study", "list_studies", "reproduce"],
        "reporting": ["report", "write_card"],
        "results": ["Results"],
        "shifts": ["CorruptedDataset", "corrupt", "list_corruptions"],
        "training": ["CollapseCallback", "CurvatureCallback", "OnlineProbeCallback", "ProjectionTrainer",
                     "ProjectionTrainingArguments", "SpectrumCallback", "UpdateRatioCallback"],
        "tuner": ["ProjectionHeadConfig", "ProjectionOutput"],
    }, [
        "backbones", "checking", "cli", "commands", "converters", "data", "diagnostics", "distributed", "errors",
        "export", "features", "filenames", "files", "functional", "geometry", "heads", "hints", "hub", "inspection",
        "lazy", "limits", "objectives", "plots", "presets", "probes", "redaction", "registry", "regularizers",
        "reporting", "reproduction", "results", "saving", "secret_names", "shifts", "strict_json", "studies",
        "training", "tuner", "typing",
    ])
# fmt: on


def _register() -> None:
    import hfproj.tuner  # noqa: F401  registers the PEFT method


when_imported("peft", _register, outside="hfproj")
