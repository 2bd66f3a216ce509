"""The document of the study: every claim with the paper's number, ours and the verdict, and the figures."""

from collections.abc import Mapping
from typing import Any

from hfproj.studies.head_geometry.claims import Claim, bending, contraction, deepening, invariance, probes
from hfproj.studies.head_geometry.collapse_claims import equilibria, escapes, flows, tracking

INTRODUCTION = """# The geometry of projection heads, measured

"The Geometry of Projection Heads" (arXiv 2605.17180) trains ResNet-18 on CIFAR-10. Here are its experiments at the size
of two CPU cores: vit_nano, a very small ViT, on {dataset}, with the paper's head at a quarter of its width. Adapters
are trained with SimCLR in two regimes: "LoRA", head and a LoRA on the backbone, for a short time on images; and "head
only", the head for long, on cached views of the frozen backbone. The runs on collapse train a linear map and SimSiam's
heads on cached features. Numbers are mean ± standard deviation over seeds 0, 1 and 2.

A claim is "reproduced" where each seed has the paper's sign and the mean difference is larger than its standard
deviation, "not reproduced" where each seed has the other sign; in between it cannot be judged. The controls are ours,
and so are claims for which the paper has no number (–).
What the claims mean in theory, and which versions of them are false, is in [geometry.md](geometry.md).

Written by `recipes/geometry_table.py` from `recipes/results/geometry/results.json`, which `recipes/geometry.py` and
`recipes/collapse_geometry.py` write."""
FIGURES = {  # file → caption
    "guillotine_linear": "Accuracy of a linear probe that tells four rotations apart, from h and from z",
    "guillotine_mlp": "The same of an MLP probe",
    "curvature": "Local curvature of a sweep of rotations in h and in z",
    "compression": "Spread of an image's rotations in h over that in z: above 1, the head contracts (geometric "
    "mean over seeds, bar: standard deviation of logarithms)",
    "orbits": "Images of three classes turning by 360°, in the two main directions of h and of z",
    "depth": "Accuracy of a linear probe that tells four rotations apart, by depth of the head",
    "depth_condition": "Condition number of the pullback metric after each layer, over images (LoRA, seed 0)",
    "depth_condition_head_only": "The same where the head alone was trained (seed 0)",
    "collapse_sgd_without_batchnorm": "Spread of z under SGD from small weights, heads without BatchNorm; geometric "
    "mean over seeds, band: standard deviation of logarithms",
    "collapse_sgd_with_batchnorm": "The same with BatchNorm",
    "collapse_flow": "Spread of z in continuous time, of a smaller system",
    "collapse_equilibrium": "Smallest eigenvalue at constructed equilibria, by size of the residual",
    "hessian": "Extreme eigenvalues of the Hessian in h along training, SiLU head from small weights",
    "hessian_smallest": "Smallest eigenvalue of the Hessian in h along training",
}


def document(found: Mapping[str, Any], dataset: str) -> list[str]:
    """Return the lines of the document; what was not measured has no section.

    Args:
        found: What results.json holds of one data set.
        dataset: Its name.
    """
    rows = {name: part["rows"] for name, part in found.items() if "rows" in part}
    lines = [*INTRODUCTION.format(dataset=dataset).splitlines(), ""]
    if "guillotine" in rows:
        claims = [*probes(rows["guillotine"]), *invariance(rows["guillotine"])]
        lines += _section("What probes read from h and from z", claims, "guillotine_linear", "guillotine_mlp")
    if "curvature" in rows:
        lines += _section("Curvature of a rotation sweep", bending(rows["curvature"]), "curvature")
    if "orbits" in rows:
        lines += _section("Orbits of rotation", contraction(rows["orbits"]), "compression", "orbits")
    if "depth" in rows:
        claims = deepening(rows["guillotine"], rows["orbits"], rows["depth"])
        lines += _section("Depth of the head", claims, "depth", "depth_condition", "depth_condition_head_only")
    if "collapse" in found:
        claims = [*equilibria(found["collapse"]["equilibrium"]), *escapes(found["collapse"]["sgd"])]
        claims += flows(found["collapse"]["flow"], found["collapse"]["settings"]["flow"]["kink_step"])
        lines += _section("Collapse", claims, *(name for name in FIGURES if name.startswith("collapse_")))
    if "hessian" in found:
        lines += _section(
            "The Hessian along training", tracking(found["hessian"]["runs"]), "hessian", "hessian_smallest"
        )
    return lines


def _section(title: str, claims: list[Claim], *figures: str) -> list[str]:
    lines = [f"## {title}", "", "| claim | paper | here | verdict |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(claim) + " |" for claim in claims]
    lines += [""]
    for name in figures:
        caption = FIGURES[name]
        lines += [f"![{caption}](../recipes/results/geometry/{name}.png)", "", f"*{caption}*", ""]
    return lines
