"""The active adapter of a model: its name, its parts and its config."""

from peft import PeftModel

from hfproj.tuner.config import ProjectionHeadConfig
from hfproj.tuner.layer import CHILD, HeadModules


def active_name(model: PeftModel) -> str:
    """Return the name of the active adapter."""
    return getattr(model.get_base_model(), CHILD).active_name


def active_modules(model: PeftModel) -> HeadModules:
    """Return the active adapter's head with its predictor, prototypes and scales."""
    return getattr(model.get_base_model(), CHILD).projection_head_modules[active_name(model)]


def active_config(model: PeftModel) -> ProjectionHeadConfig:
    """Return the active adapter's config."""
    return model.peft_config[active_name(model)]
