"""DINO: ViTs and ResNet-50 with DINOHead.

The head is the MLP up to the bottleneck, z of width 256. Its weight-normalised last layer is the adapter's prototypes:
with ẑ = z/‖z‖ the official logits are g_j ⟨v_j/‖v_j‖, ẑ⟩, our scores. Where all g are 1 (``norm_last_layer``) the
adapter has no lengths. BatchNorm in the head (``use_bn_in_head``) is read where it is there.

Left out: the other network, and the centre of the loss (in ``dino_loss``), which a new training estimates again.

References:
    Caron et al. 2021, arXiv 2104.14294; facebookresearch/dino (04c0ad9) ``vision_transformer.py`` (VisionTransformer,
    DINOHead), ``main_dino.py``: ``{"student", "teacher", "optimizer", "epoch", "args", "dino_loss"}``, keys
    ``module.backbone.*`` and ``module.head.*`` (of a ViT's teacher without ``module.``).
"""

from hfproj.converters.family import Family, Layout
from hfproj.converters.mlp import MLP

DINO_HEADS = (  # run once on all crops
    MLP(activation="gelu", init="trunc_normal"),
    MLP(norm=True, activation="gelu", init="trunc_normal", batch_statistics="joint"),
    MLP(names=("",)),
)


def layouts(network: str) -> tuple[Layout, ...]:
    """Return the layouts of a file with `network`."""
    return (
        Layout(
            inside=network,
            backbone="backbone.",
            head="head.mlp.",
            structures=DINO_HEADS,
            prototypes="head.last_layer.",
            rows="weight_v",
        ),
    )


FAMILY = Family(
    name="dino",
    line="DINO (ViT, ResNet-50): MLP to the bottleneck, weight-normalised last layer as prototypes",
    source="facebookresearch/dino",
    networks=("teacher", "student"),
    layouts=layouts,
    num_heads=lambda width: width // 64 if width % 64 == 0 else None,
    timm_ids={
        (384, 12, 16): "vit_small_patch16_224.dino",
        (384, 12, 8): "vit_small_patch8_224.dino",
        (768, 12, 16): "vit_base_patch16_224.dino",
        (768, 12, 8): "vit_base_patch8_224.dino",
    },
    full_file="dino_…_pretrain_full_checkpoint.pth",
)
