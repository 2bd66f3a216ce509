"""Which tensors an adapter's file has to hold, found from its configuration without allocating one.

The head is made on torch's meta device, where a tensor is a shape. So a configuration that asks for billions of numbers
costs nothing before the file is seen not to hold them.
"""

import math
from typing import Any, cast

import torch

from hfproj.errors import AdapterFileError, one_line
from hfproj.heads import HEADS
from hfproj.hub.untrusted import FLOATS, TensorInfo, short
from hfproj.tuner.config import ProjectionHeadConfig
from hfproj.tuner.layer import CHILD, HeadModules

HEAD_KEYS = f"base_model.model.{CHILD}.projection_head_modules."
BACKBONE_KEYS = f"base_model.model.{CHILD}.backbone."


def head_tensors(config: ProjectionHeadConfig, where: str) -> dict[str, TensorInfo]:
    """Return the tensors of a config's head, predictor and prototypes, under their names in a saved file.

    Nothing is allocated. The dtype is "F32" for whatever may have any floating-point type.

    Raises:
        AdapterFileError: If no head has this name, or none can be made with these options.
    """
    try:
        modules = _modules(config)
    except Exception as error:  # the head's own, or whatever a value does to torch
        raise AdapterFileError(
            f"{where}: no head {short(config.head)} can be made of its options: {one_line(error, 400)}"
        ) from error
    kinds = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
    return {
        HEAD_KEYS + name: TensorInfo(kinds.get(tensor.dtype, "F32"), tuple(tensor.shape))
        for name, tensor in modules.state_dict().items()
    }


def _modules(config: ProjectionHeadConfig) -> HeadModules:
    in_dim, predictor = cast(int, config.in_dim), cast(dict[str, Any], config.predictor or {})
    try:
        with torch.device("meta"):
            return HeadModules(config, in_dim)
    except (RuntimeError, NotImplementedError):
        names = [name for name in (config.head, predictor.get("head")) if name]
        if all(HEADS.get(name).__module__.startswith("hfproj.") for name in names):
            raise
        return HeadModules(config, in_dim)  # a class of the user's own need not know the meta device


def check_tensors(
    found: dict[str, TensorInfo], expected: dict[str, TensorInfo], config: ProjectionHeadConfig, where: str
) -> None:
    """Refuse a file whose header lists other tensors (`found`) than the config has (`expected`, of `head_tensors`).

    The head's are compared one by one. Those of the backbone's PEFT method, and the trained ones of the backbone
    itself, may be there where the config has such; they are compared when the backbone is there too.

    Raises:
        AdapterFileError: If names, shapes or dtypes differ.
    """
    problems = [f"missing {n}" for n in expected if n not in found]
    for name, info in found.items():
        wanted = expected.get(name)
        if wanted is None:
            if name.startswith(HEAD_KEYS) or not _may_have(config, name):
                problems.append(f"unexpected {short(name, 120)[1:-1]}")
        elif info.shape != wanted.shape:
            problems.append(f"{name} has shape {short(info.shape)}, expected {short(wanted.shape)}")
        elif info.dtype != wanted.dtype and not {info.dtype, wanted.dtype} <= set(FLOATS):
            problems.append(f"{name} has dtype {info.dtype}, expected {wanted.dtype}")
    if problems:
        listed = "; ".join(p.replace(HEAD_KEYS, "").replace("base_model.model.", "") for p in problems[:5])
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterFileError(
            f"{where}: its tensors are not those of head {short(config.head)} ({config.in_dim} → {config.out_dim}): "
            f"{listed}{more}. The file belongs to another config or is damaged; download or save it again."
        )


def _may_have(config: ProjectionHeadConfig, name: str) -> bool:
    if name.startswith(BACKBONE_KEYS):
        return config.trains_backbone
    return config.backbone_adapter is not None and name.startswith("base_model.model.")


def plausible_size(expected: dict[str, TensorInfo], config: ProjectionHeadConfig) -> tuple[int, int | None]:
    """Return the fewest and the most bytes of a file with the tensors of `head_tensors`; None where that is open."""
    numbers = sum(math.prod(info.shape) for info in expected.values())
    beside = config.trains_backbone or config.backbone_adapter is not None
    return 2 * numbers, None if beside else 8 * numbers + (1 << 20)
