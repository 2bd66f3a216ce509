"""Differentiable formulas that more than one objective, regularizer or diagnostic uses.

They are functions of tensors, compute in float32 or better whatever autocast says, and know nothing of heads or models.
A kernel that is cheaper than what autograd would do (``contrastive``: loss and gradient in tiles) lives here; the
readable form of an objective lives with the objective.
"""
