"""The projection head as a PEFT method, registered when this package is imported.

Here live the config, the layer and its hooks, the tuner with an adapter's saved form, and what an adapter is in plain
values. It imports `backbones`, `heads`, `objectives` and what lies below them, and PEFT.
"""

import warnings

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "PROJECTION_HEAD"


def _extend_enum() -> None:
    # `register_peft_method` refuses names outside the enum, and a plain string as key breaks transformers' integration.
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        type.__setattr__(PeftType, NAME, member)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member


# Of PEFT's doings whenever an adapter is attached, about which who attaches it can do nothing: it asks transformers by
# an old name, and for LN tuning measures the width of a norm, which it does not know how to.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "Unsupported layer type '.*Norm", UserWarning)
_extend_enum()

from hfproj.tuner.config import ProjectionHeadConfig  # noqa: E402
from hfproj.tuner.layer import ProjectionOutput  # noqa: E402
from hfproj.tuner.model import ProjectionHeadModel  # noqa: E402

if PeftType(NAME) not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name=NAME.lower(), config_cls=ProjectionHeadConfig, model_cls=ProjectionHeadModel)

__all__ = ["ProjectionHeadConfig", "ProjectionOutput"]
