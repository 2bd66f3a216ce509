"""MoCo v3: ResNet-50 and ViTs, BatchNorm in every layer of the projector, predictor.

ResNet: ``fc`` of two layers; ViT: ``head`` of three; no biases, the last BatchNorm without scale and shift. The
predictor has two layers; that of a ResNet has a last BatchNorm in files of early versions only. Its ViT-S has 12
attention heads, where other ViT-S have 6: no shape shows that. Fixed sine positions are stored, and read like learned
ones.

Left out: the momentum encoder, which has no predictor; ``network="momentum"`` reads it, without one.

References:
    Chen, Xie, He 2021, arXiv 2104.02057; facebookresearch/moco-v3 ``moco/builder.py`` (0c5d00a), ``vits.py`` (1c6b717),
    ``main_moco.py`` (02655ae): ``{"state_dict": {"module.base_encoder.*", "module.momentum_encoder.*",
    "module.predictor.*"}}``.
"""

from dataclasses import replace

from hfproj.converters.family import Family, Layout
from hfproj.converters.mlp import MLP

_ENCODERS = {"base": "base_encoder.", "momentum": "momentum_encoder."}
_TWO = MLP(bias=False, norm=True, last_bias=False, last_norm=True, last_affine=False, max_depth=2)
_THREE = replace(_TWO, min_depth=3, max_depth=3)
_WITHOUT_LAST_NORM = replace(_TWO, last_norm=False)


def layouts(network: str) -> tuple[Layout, ...]:
    """Return the layouts of a file with `network`: of a ViT and of a ResNet."""
    own = _ENCODERS[network]
    ignored = {prefix: f"of network={name!r}" for name, prefix in _ENCODERS.items() if name != network}
    predictor: str | None = "predictor."
    if network == "momentum":
        ignored["predictor."], predictor = "of network='base'", None

    def layout(name: str, structure: MLP, predictors: tuple[MLP, ...]) -> Layout:
        return Layout(
            inside="state_dict",
            backbone=own,
            head=f"{own}{name}.",
            structures=(structure,),
            predictor=predictor,
            predictor_structures=predictors,
            ignored=ignored,
        )

    return layout("head", _THREE, (_TWO,)), layout("fc", _TWO, (_WITHOUT_LAST_NORM, _TWO))


FAMILY = Family(
    name="moco_v3",
    line="MoCo v3 (ViT, ResNet-50): BatchNorm in every layer, predictor",
    source="facebookresearch/moco-v3",
    networks=("base", "momentum"),
    layouts=layouts,
    num_heads={384: 12, 768: 12, 1024: 16, 1280: 16}.get,
)
