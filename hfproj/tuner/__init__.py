"""The projection head as a PEFT method, registered when this package is imported."""

from peft.utils import PeftType, register_peft_method

NAME = "projection_head"


def _register() -> None:
    """Add PROJECTION_HEAD to PEFT's enum, then register the method the way PEFT's own methods do.

    `register_peft_method` refuses names outside the enum, and a plain string as key breaks transformers' integration.
    """
    if NAME.upper() not in PeftType.__members__:
        member = str.__new__(PeftType, NAME.upper())
        member._name_ = member._value_ = NAME.upper()
        type.__setattr__(PeftType, NAME.upper(), member)
        PeftType._member_names_.append(NAME.upper())
        PeftType._member_map_[NAME.upper()] = member
        PeftType._value2member_map_[NAME.upper()] = member

    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if PeftType(NAME.upper()) in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    from hfproj.tuner.config import ProjectionHeadConfig
    from hfproj.tuner.model import ProjectionHeadModel

    register_peft_method(name=NAME, config_cls=ProjectionHeadConfig, model_cls=ProjectionHeadModel)


_register()

from hfproj.tuner.config import ProjectionHeadConfig  # noqa: E402
from hfproj.tuner.layer import ProjectionOutput  # noqa: E402

__all__ = ["ProjectionHeadConfig", "ProjectionOutput"]
