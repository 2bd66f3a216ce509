"""How much of each feature of the input is in a layer, and how unequal these weights are.

Known scalar features φ_i of the inputs, standardised, have in layer l with features f^(l) the weights

    w_i = ‖E[f^(l) φ_i]‖₂,        ‖W e_i‖ for a linear layer f = Wx of an x with uncorrelated entries of variance 1.

Without known features, the singular values of the centred features take the place of w: a scale-free measure of how
unequal directions are. A projection head weights features progressively if the inequality grows with depth: in a
two-layer linear network trained by the spectral loss the weights in h are the square roots of those in z.

References:
    Xue et al. 2024, Investigating the Benefits of Projection Head for Representation Learning, arXiv 2403.11391.

Deviations:
    The paper has the theory; the estimator for any network and the three numbers for inequality are our definitions.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.checking import checked
from hfproj.diagnostics._factors import EPS, RESOLUTION, eps_of, minus, rounding_of, row_factor
from hfproj.diagnostics.spectrum import exp_entropy
from hfproj.errors import UsageError, check_type
from hfproj.functional.feature_rows import check_features, double_rows
from hfproj.typing import Features


class WeightInequality(NamedTuple):
    """How unequal weights are; all scale-free.

    `max_over_min`: from 1; infinite if a weight is 0. `variation`: standard deviation (1/count) over mean, from 0 to
    √(count − 1). `effective_count`: exp of the entropy of w/Σw, from 1 (one weight) to count; 0 if all are 0.
    """

    max_over_min: float
    variation: float
    effective_count: float


@torch.no_grad()
@checked
def feature_weights(f: Features, phi: Float[Tensor, "_ features"]) -> Float[Tensor, " features"]:
    """Return the weight w_i = ‖E[f φ_i]‖ of each known feature in f, in float64 and the unit of f.

    Centres both and divides each φ_i by its standard deviation (1/rows). A weight also counts what f has of
    other features that φ_i is correlated with. `phi` holds known scalar features of the same inputs, a column each.

    Raises:
        UsageError: If f or phi has fewer than two or non-finite rows, the numbers differ, or a phi is constant.

    Example:
        >>> phi = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> feature_weights(phi @ torch.tensor([[3.0, 4.0], [0.0, 1.0]]), phi).tolist()
        [5.0, 1.0]
    """
    check_features(f)
    check_features(phi, what="known features phi")
    if len(f) != len(phi):
        raise UsageError(f"f and phi must hold the same rows, got {len(f)} rows of f and {len(phi)} of phi.")
    eps = eps_of(phi)
    f, phi = double_rows(f), double_rows(phi)
    norm = torch.linalg.vector_norm(phi, dim=0)
    f, phi = (minus(x, (x.mean(0), (x - x.mean(0)).mean(0))) for x in (f, phi))
    deviation = torch.linalg.vector_norm(phi, dim=0)
    rounding = RESOLUTION if eps <= EPS else rounding_of(eps) / 2
    if constant := (deviation <= rounding * norm).nonzero().flatten().tolist():
        raise UsageError(f"Expected known features that vary; constant: columns {', '.join(map(str, constant))}.")
    return torch.linalg.vector_norm(f.T @ (phi / deviation), dim=0) / math.sqrt(len(f))


@torch.no_grad()
@checked
def weight_inequality(weights: Float[Tensor, " count"]) -> WeightInequality:
    """Return how unequal `weights`, numbers from 0, are.

    Raises:
        UsageError: If there is no weight, or one is negative or not finite.

    Example:
        >>> weight_inequality(torch.ones(4))
        WeightInequality(max_over_min=1.0, variation=0.0, effective_count=4.0)
    """
    check_type("weights", weights, Tensor, "make a tensor of them: torch.tensor(…)")
    if not len(weights) or not (torch.isfinite(weights) & (weights >= 0)).all():
        raise UsageError(f"Expected weights as finite numbers of at least 0, got {weights.tolist()}.")
    weights = double_rows(weights)
    largest, smallest = weights.max().item(), weights.min().item()
    if largest == 0:
        return WeightInequality(1.0, 0.0, 0.0)
    relative = weights / largest
    return WeightInequality(
        max_over_min=largest / smallest if smallest else math.inf,
        variation=(relative.std(correction=0) / relative.mean()).item(), effective_count=exp_entropy(relative),
    )  # fmt: skip


@checked
def layer_inequality(
    layers: Mapping[str, Features], phi: Float[Tensor, "_ features"] | None = None
) -> dict[str, WeightInequality]:
    """Return the inequality of the weights of each layer; growth with depth is progressive weighting.

    `layers` holds features of the same inputs by name of the layer (h, the head's layers, z), `phi` known features of
    these inputs. Without phi the weights are the min(rows, dim) singular values of the centred features, so that
    `effective_count` and `variation` compare layers of one width only.

    Raises:
        UsageError: If `feature_weights` raises it.

    Example:
        >>> h = torch.cat([torch.eye(3), -torch.eye(3)])
        >>> found = layer_inequality({"h": h, "z": h * torch.tensor([4.0, 2.0, 1.0])})
        >>> round(found["h"].max_over_min, 6), round(found["z"].max_over_min, 6)
        (1.0, 4.0)
    """
    check_type("layers", layers, Mapping, "give each layer's features a name")
    for name, f in layers.items():
        check_features(f, what=f"features of {name}")
    if phi is None:
        return {name: weight_inequality(row_factor(f).resolved(center=True)) for name, f in layers.items()}
    return {name: weight_inequality(feature_weights(f, phi)) for name, f in layers.items()}
