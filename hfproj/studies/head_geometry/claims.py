"""What the experiments on heads found, claim by claim against the paper's numbers. Verdicts follow from the numbers."""

import itertools
import statistics
from typing import Any, NamedTuple

from hfproj.studies.head_geometry.study import values_of

Rows = list[dict[str, Any]]  # of one experiment, from results.json
REGIMES = {"rotated views": "LoRA", "rotated views, head only": "head only"}
DEPTHS = {
    "LoRA": ("depth 1", "rotated views", "depth 3"),
    "head only": ("depth 1, head only", "rotated views, head only", "depth 3, head only"),
}


class Claim(NamedTuple):
    """What the paper says, its numbers, ours, and whether ours agree."""

    claim: str
    reported: str
    measured: str
    verdict: str


def verdict(differences: list[float], yes: str = "reproduced", no: str = "not reproduced: the opposite") -> str:
    """Return whether differences, one for each seed, are positive as the claim has them.

    They decide where they have the same sign on all seeds and their mean is larger than their standard deviation.
    """
    mean = statistics.mean(differences)
    decided = len({value > 0 for value in differences}) == 1 and (
        len(differences) > 1 and abs(mean) > statistics.stdev(differences)
    )
    if not decided:
        return "cannot be judged: within the spread of seeds"
    return yes if mean > 0 else no


def control(claim: str, measured: str, differences: list[float]) -> Claim:
    """Return a claim that the paper does not make."""
    return Claim(f"Control: {claim}", "–", measured, verdict(differences, "yes", "no: the opposite"))


def probes(rows: Rows) -> list[Claim]:
    """What probes read from h and from z, by model."""
    claims = []
    for model, regime in REGIMES.items():
        for probe, reported in (("linear", "52.3 / 37.6"), ("mlp", "55.5 / 43.6")):
            h, z = (values_of(rows, f"rotation_{probe}_{layer}", model=model) for layer in ("h", "z"))
            claims.append(
                Claim(
                    f"Guillotine: {'an MLP' if probe == 'mlp' else 'a linear'} probe tells four rotations better from "
                    f"h than from z ({regime})",
                    f"{reported} % (h / z)",
                    f"{percent(h)} / {percent(z)} %",
                    verdict(minus(h, z)),
                )
            )
    return claims


def invariance(rows: Rows) -> list[Claim]:
    """Controls: whether z forgets rotation because the views were turned."""
    claims = []
    for regime, upright, rotated, degrees in (
        ("LoRA", "upright views", "rotated views", 45),
        ("head only", "upright views, head only", "rotated views, head only", 45),
        ("head only", "upright views, head only", "all rotations, head only", 180),
    ):
        without, trained = (values_of(rows, "rotation_mlp_z", model=model) for model in (upright, rotated))
        claims.append(
            control(
                f"z forgets rotation because views are turned by up to {degrees}° ({regime}; MLP probe of z)",
                f"{percent(without)} % without, {percent(trained)} % with rotation",
                minus(without, trained),
            )
        )
    h, z = (values_of(rows, f"rotation_linear_{layer}", model="untrained") for layer in ("h", "z"))
    shown_pair = f"{percent(h)} / {percent(z)} %"
    return [*claims, control("a linear probe reads less from z of an untrained head, too", shown_pair, minus(h, z))]


def bending(rows: Rows) -> list[Claim]:
    """The curvature of a rotation sweep, in z against h."""
    untrained = values_of(rows, "ratio", model="untrained")
    claims = []
    for model, regime in REGIMES.items():
        ratio = values_of(rows, "ratio", model=model)
        claims += [
            Claim(
                f"A rotation sweep is more curved in z than in h ({regime})",
                "1.93 ×",
                f"{shown(ratio)} ×",
                verdict([value - 1 for value in ratio]),
            ),
            control(
                f"more so than for an untrained head ({regime})",
                f"{shown(ratio)} × against {shown(untrained)} × untrained",
                minus(ratio, untrained),
            ),
        ]
    return claims


def contraction(rows: Rows) -> list[Claim]:
    """The sizes of orbits of rotation, in h against z."""
    claims = []
    untrained, untrained_unit = (values_of(rows, f"compression{end}", model="untrained") for end in ("", "_unit_input"))
    untrained_ratio = values_of(rows, "ratio_z", model="untrained")
    for model, regime in REGIMES.items():
        raw, unit = (values_of(rows, f"compression{end}", model=model) for end in ("", "_unit_input"))
        ratio_h, ratio_z = (values_of(rows, f"ratio_{layer}", model=model) for layer in ("h", "z"))
        claims += [
            Claim(
                f"The head contracts orbits of rotation; h given as it is ({regime})",
                "–",
                f"{shown(raw)} × (untrained {shown(untrained)} ×)",
                verdict([value - 1 for value in raw]),
            ),
            Claim(
                f"The same with h scaled to unit length first, as the paper's script does ({regime})",
                "21.85 ×",
                f"{shown(unit)} × (untrained {shown(untrained_unit)} ×)",
                verdict([value - 1 for value in unit]),
            ),
            control(
                f"a trained head contracts more than an untrained one; h as it is ({regime})",
                f"{shown(raw)} × against {shown(untrained)} ×",
                minus(raw, untrained),
            ),
            control(
                f"the same with h scaled to unit length ({regime})",
                f"{shown(unit)} × against {shown(untrained_unit)} ×",
                minus(unit, untrained_unit),
            ),
            Claim(
                f"Classes lie further apart against orbits (D_inter / D_intra) in z than in h ({regime})",
                "2.04 → 2.50",
                f"{shown(ratio_h)} → {shown(ratio_z)} (untrained {shown(untrained_ratio)})",
                verdict(minus(ratio_z, ratio_h)),
            ),
        ]
    return claims


def deepening(probes: Rows, orbits: Rows, conditions: Rows) -> list[Claim]:
    """What changes with the depth of the head; the first claim asks both steps of depth, the others first and last."""
    claims = []
    for regime, models in DEPTHS.items():
        steps = [values_of(conditions, "variation", model=model) for model in models]
        rises = [verdict(minus(deep, flat), "yes: at both steps") for flat, deep in itertools.pairwise(steps)]
        claims.append(
            Claim(
                f"Depth 1 / 2 / 3: with depth the metric JᵀJ differs more from image to image (variation, 0 where J is "
                f"the same everywhere; {regime})",
                "–",
                " / ".join(shown(values) for values in steps),
                next((found for found in rises if not found.startswith("yes")), rises[0]),
            )
        )
        for claim, rows, measure, reported, sign, digits in (
            ("a linear probe of z sees less rotation", probes, "rotation_linear_z", ".474 / .397 / .356", -1, 3),
            ("orbits are contracted more, h of unit length", orbits, "compression_unit_input", "49 / 57 / 79 ×", 1, 2),
            ("orbits are contracted more, h as it is", orbits, "compression", "–", 1, 2),
            ("D_inter / D_intra of z is larger", orbits, "ratio_z", "1.89 / 2.61 / 3.29", 1, 2),
        ):
            values = [values_of(rows, measure, model=model) for model in models]
            claims.append(
                Claim(
                    f"Depth 1 / 2 / 3: with depth {claim} ({regime})",
                    reported,
                    " / ".join(shown(value, digits) for value in values),
                    verdict([sign * (deep - flat) for flat, deep in zip(values[0], values[-1])]),
                )
            )
    return claims


def minus(a: list[float], b: list[float]) -> list[float]:
    """Return the differences a − b, one for each seed."""
    return [x - y for x, y in zip(a, b)]


def shown(values: list[float], digits: int = 2) -> str:
    """Return mean ± standard deviation; of one value the value."""
    std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{std}"


def percent(values: list[float]) -> str:
    """Return mean ± standard deviation of fractions in per cent."""
    return shown([100 * value for value in values], 1)
