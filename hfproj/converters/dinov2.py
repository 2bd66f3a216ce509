"""DINOv2: checkpoints of training; the released backbones have no head.

As DINO, with ``dino_head`` on the class token. ``ibot_head`` (of a run with ``ibot.separate_head``), trained on each
patch token, is read instead with ``head="ibot_head"``; h of that adapter is the mean patch token, and its head by
itself takes any of them. Blocks that are chunked for FSDP are counted through; register tokens take no position, so
that the class token's is added to it, as timm has it; SwiGLU's ``w12`` and ``w3`` are timm's ``fc1`` and ``fc2``.

Left out: the other head, the other network, and the mask token.

Files of ``FSDPCheckpointer`` (``model_….rank_0.pth``) hold shards of one process each: use the
``teacher_checkpoint.pth`` that evaluation writes.

References:
    Oquab et al. 2023, arXiv 2304.07193; facebookresearch/dinov2 ``dinov2/layers/dino_head.py`` (05c66df),
    ``dinov2/models/vision_transformer.py`` (027a9ac), ``dinov2/train/ssl_meta_arch.py`` (0239fd0),
    ``dinov2/train/train.py`` (02eb93a): ``{"teacher": {"backbone.*", "dino_head.*", "ibot_head.*"}}``.
"""

from hfproj.converters.dino import DINO_HEADS
from hfproj.converters.family import Family, Layout

_RENAME = (
    (r"^blocks\.\d+\.(\d+\..*)mlp\.w12\.", r"blocks.\1mlp.fc1."),
    (r"^blocks\.\d+\.(\d+\..*)mlp\.w3\.", r"blocks.\1mlp.fc2."),
    (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"),
    (r"^(blocks\.\d+\.mlp\.)w12\.", r"\1fc1."),
    (r"^(blocks\.\d+\.mlp\.)w3\.", r"\1fc2."),
)


def layouts(network: str, head: str) -> tuple[Layout, ...]:
    """Return the layouts of a file with `network`: one of the teacher alone, and the whole model's state dict."""
    other = {"dino_head": "ibot_head", "ibot_head": "dino_head"}[head]

    def below(prefix: str, inside: str, ignored: dict[str, str]) -> Layout:
        return Layout(
            inside=inside,
            backbone=f"{prefix}backbone.",
            head=f"{prefix}{head}.mlp.",
            structures=DINO_HEADS,
            prototypes=f"{prefix}{head}.last_layer.",
            rows="weight_v",
            ignored={
                f"{prefix}{other}.": f"of head={other!r}",
                f"{prefix}backbone.mask_token": "of masked patches, which h has none of",
                **ignored,
            },
            rename=_RENAME,
        )

    rest = {"dino_loss.": "of the loss", "ibot_patch_loss.": "of the loss", "koleo_loss.": "of the loss"}
    rest |= {f"{name}.": f"of network={name!r}" for name in ("student", "teacher") if name != network}
    return below("", network, {}), below(f"{network}.", "model", rest)


FAMILY = Family(
    name="dinov2",
    line="DINOv2, checkpoints of training: dino_head or ibot_head, last layer as prototypes",
    source="facebookresearch/dinov2",
    networks=("teacher", "student"),
    layouts=layouts,
    num_heads=lambda width: width // 64 if width % 64 == 0 else None,
    options={"head": ("dino_head", "ibot_head")},
    full_file="teacher_checkpoint.pth of a training run (the released backbones have no head)",
)
