"""Backbones: loading them, where their representation is read and how it is pooled, how images are prepared for them.

Three families are known: `transformers` models (vision and text), `timm` models, and plain ``nn.Module``s whose output
is a tensor ``[batch, dim]``, ``[batch, tokens, dim]`` or ``[batch, dim, height, width]``. Of the rooms it imports
none: only the files beside the rooms, such as `hfproj.errors`.
"""

from hfproj.backbones.features import FeatureBackbone
from hfproj.backbones.loading import EMBEDDED, embedded_folder, library_of, load_backbone, main_input_of, source_of
from hfproj.backbones.preprocessing import ImagePreprocessing, image_preprocessing
from hfproj.backbones.pooling import by_name, check_texts, mask_of, pool, without_left_padding
from hfproj.backbones.reading import (
    acting_modules,
    channels_last,
    feeds_representation,
    last_blocks,
    pooling_of_tokens,
    resolve_read_point,
    skips_after,
)
from hfproj.backbones.reruns import shorten
from hfproj.backbones.structure import (
    POOLINGS,
    READING,
    ReadPoint,
    bare_tensors,
    blocks_of,
    fit_image_size,
    without_masking,
)

__all__ = [
    "EMBEDDED", "POOLINGS", "READING", "FeatureBackbone", "ImagePreprocessing", "ReadPoint", "acting_modules",
    "bare_tensors", "blocks_of", "by_name", "channels_last", "check_texts", "embedded_folder",
    "feeds_representation",
    "fit_image_size", "image_preprocessing", "last_blocks", "library_of", "load_backbone", "main_input_of",
    "mask_of", "pool", "pooling_of_tokens", "resolve_read_point", "shorten", "skips_after", "source_of",
    "without_left_padding", "without_masking",
]  # fmt: skip
