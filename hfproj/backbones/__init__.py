"""Backbones: loading them, where their representation is read and how it is pooled, how images are prepared for them.

Three families are known: `transformers` models (vision and text), `timm` models, and plain ``nn.Module``s whose output
is a tensor ``[batch, dim]``, ``[batch, tokens, dim]`` or ``[batch, dim, height, width]``. Of the rooms it imports
none: only the files beside the rooms, such as `hfproj.errors`.
"""

from hfproj.backbones.features import FeatureBackbone
from hfproj.backbones.loading import EMBEDDED, embedded_folder, library_of, load_backbone, source_of
from hfproj.backbones.preprocessing import ImagePreprocessing, image_preprocessing
from hfproj.backbones.reading import (
    POOLINGS, ReadPoint, bare_tensors, blocks_of, feeds_representation, fit_image_size, last_blocks, pool,
    resolve_read_point,
)  # fmt: skip

__all__ = [
    "EMBEDDED", "POOLINGS", "FeatureBackbone", "ImagePreprocessing", "ReadPoint", "bare_tensors", "blocks_of",
    "embedded_folder", "feeds_representation", "fit_image_size", "image_preprocessing", "last_blocks", "library_of",
    "load_backbone", "pool", "resolve_read_point", "source_of",
]  # fmt: skip
