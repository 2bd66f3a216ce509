"""Differentiable formulas that more than one objective, regularizer or diagnostic uses.

They are functions of tensors that know nothing of heads or models, accept any floating-point type and compute in
float32 or better whatever autocast says. Over processes, rows are those of the global batch
(:mod:`hfproj.distributed`). A kernel that is cheaper than autograd (:mod:`~hfproj.functional.contrastive`: loss and
gradient in tiles) lives here; the readable form of an objective lives with the objective.
:mod:`~hfproj.functional.feature_rows` validates features. This room imports ``errors``, ``typing``, ``distributed``.
"""
