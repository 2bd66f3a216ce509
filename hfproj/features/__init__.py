"""Features: h, z, intermediate layers and tokens of whole data sets, kept on disk on request, and their neighbours.

Probes, callbacks and heads on a frozen backbone read features from here. Imports `tuner`, `backbones`, `data` and
what lies below them.
"""

from hfproj.features.extraction import Features, extract_features
from hfproj.features.neighbours import NeighbourBank, Neighbours
from hfproj.features.similarity import linear_cka, mutual_knn
from hfproj.features.views import CachedFeatures, EvalFeatures, FeatureViews, FixedViews, cache_features

__all__ = [
    "CachedFeatures", "EvalFeatures", "FeatureViews", "Features", "FixedViews", "NeighbourBank", "Neighbours",
    "cache_features", "extract_features", "linear_cka", "mutual_knn",
]  # fmt: skip
