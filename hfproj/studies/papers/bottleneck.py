"""Paper 4: the projector as an information bottleneck.

References:
    Ouyang, Hu, Zhang, Wang, Wang 2025, "Projection Head is Secretly an Information Bottleneck", arXiv 2503.00507;
    PKU-ML/Projector_Theory (5c2e7d1), kaotty/Projector-Theory (5928007).
"""

from hfproj.reproduction.study import Study
from hfproj.presets.settings import BYOL_VIEWS, BYOL_VIEWS_NOTE, SOLO_ASYMMETRIC_NOTE, SOLO_ASYMMETRIC_VIEWS, SOLO_LARS, SOLO_VIEWS, Preset, training

_BASES = {
    "bottleneck_simclr": Preset(
        line="SimCLR, baseline of the bottlenecks, CIFAR",
        source="PKU-ML/Projector_Theory (5c2e7d1) scripts/pretrain/cifar/simclr.yaml, ResNet-18; arXiv 2503.00507. "
        "fp16 there.",
        objective={"name": "nt_xent", "temperature": 0.2},
        head="simclr_solo",
        views=SOLO_VIEWS,
        training=training(200.0, 256, 0.4, 1e-4, **SOLO_LARS),
    ),
    "bottleneck_barlow_twins": Preset(
        line="Barlow Twins, baseline of the bottlenecks, CIFAR",
        source="PKU-ML/Projector_Theory (5c2e7d1) scripts/pretrain/cifar/barlow.yaml, ResNet-18; arXiv 2503.00507. "
        f"Epochs and batch as for SimCLR. fp16 there. {SOLO_ASYMMETRIC_NOTE}",
        objective={"name": "barlow_twins", "scale": 0.1},
        head="barlow_twins",
        head_options={"hidden_dim": 2048},
        out_dim=2048,
        views=SOLO_ASYMMETRIC_VIEWS,
        training=training(200.0, 256, 0.3, 1e-4, **SOLO_LARS),
    ),
    # solo-learn's batch is that of a GPU, of two here, and its learning rate is for 256
    "bottleneck_simclr_imagenet100": Preset(
        line="SimCLR, baseline of the bottlenecks, ImageNet-100",
        source="kaotty/Projector-Theory (5928007) scripts/pretrain/imagenet-100/simclr.yaml, ResNet-18, 128 images on "
        "each of 2 GPUs; arXiv 2503.00507. fp16 there.",
        objective={"name": "nt_xent", "temperature": 0.2},
        head="simclr_solo",
        head_options={"hidden_dim": 4096},
        out_dim=512,
        views=SOLO_VIEWS,
        training=training(100.0, 256, 0.3, 1e-4, **SOLO_LARS),
    ),
    "bottleneck_barlow_twins_imagenet100": Preset(
        line="Barlow Twins, baseline of the bottlenecks, ImageNet-100",
        source="kaotty/Projector-Theory (5928007) scripts/pretrain/imagenet-100/barlow.yaml, ResNet-18, 256 images on "
        f"each of 2 GPUs, learning rate 0.3·batch/256; arXiv 2503.00507. fp16 there. {BYOL_VIEWS_NOTE}",
        objective={"name": "barlow_twins", "scale": 0.1},
        head="barlow_twins",
        head_options={"hidden_dim": 2048},
        out_dim=2048,
        views=BYOL_VIEWS,
        training=training(100.0, 512, 0.6, 1e-4, **SOLO_LARS),
    ),
}
_SPARSE_NOTE = "m = 32·d and top_k = m/100 are ours; m = 100000, top_k = 1000 there."
# Barlow Twins' first layer stays, the autoencoder follows it.
_SPARSE_STEM = {"depth": 1, "last_norm": "batch", "last_bias": True, "last_activation": "relu"}


def _bottlenecks(name: str, base: Preset) -> dict[str, Preset]:
    """Return the baseline and its three variants."""
    method, _, data = base.line.split(", ")
    is_simclr = method == "SimCLR"
    changed, suffix = name.removesuffix("_imagenet100"), "_imagenet100" if name.endswith("_imagenet100") else ""
    levels = 30 if is_simclr else 3
    inner = {"head": base.head, "head_options": base.head_options}
    sparse = {} if is_simclr else {"stem": "mlp", "stem_options": _SPARSE_STEM}
    return {
        name: base,
        f"{changed}_bottleneck{suffix}": base.but(
            f"{method} + bottleneck regularizer, {data}",
            "λ is not published (0, off, in the official configurations); 0.1 is ours.",
            regularizers={"bottleneck": {"weight": 0.1, "alpha": 2.0}},
        ),
        f"{changed}_discretised{suffix}": base.but(
            f"{method} with a discretised projector of {levels} levels, {data}",
            head="quantized",
            head_options={**inner, "levels": levels},
        ),
        f"{changed}_sparse{suffix}": base.but(
            f"{method} with a sparse autoencoder {'as' if is_simclr else 'in the'} projector, {data}",
            _SPARSE_NOTE,
            head="topk",
            head_options=sparse,
            out_dim=None if is_simclr else base.out_dim,  # the autoencoder keeps the width of h
        ),
    }


PRESETS: dict[str, Preset] = {}
for _name, _base in _BASES.items():
    PRESETS |= _bottlenecks(_name, _base)


def studies() -> list[Study]:
    """Return its tables."""
    return []
