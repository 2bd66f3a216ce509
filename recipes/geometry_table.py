"""What recipes/geometry.py and recipes/collapse_geometry.py measured, claim by claim against the paper's.

    python recipes/geometry_table.py

Writes docs/geometry_study.md from recipes/results/geometry/results.json. Verdicts follow from the numbers.
"""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hfproj import cli
from hfproj.errors import UsageError
from hfproj.files import write_atomic

RESULTS = Path(__file__).resolve().parent / "results" / "geometry" / "results.json"
DOCS = Path(__file__).resolve().parents[1] / "docs" / "geometry_study.md"
DATASET = "digits"
INTRODUCTION = """# The geometry of projection heads, measured

"The Geometry of Projection Heads" (arXiv 2605.17180) trains ResNet-18 on CIFAR-10. Here are its experiments at the size
of two CPU cores: vit_nano, a very small ViT, on {dataset}, with the paper's head at a quarter of its width. Adapters
are trained with SimCLR in two regimes: "LoRA", head and a LoRA on the backbone, for a short time on images; and "head
only", the head for long, on cached views of the frozen backbone. The runs on collapse train a linear map and SimSiam's
heads on cached features. Numbers are mean ± standard deviation over seeds 0, 1 and 2.

A claim is "reproduced" where each seed has the paper's sign and the mean difference is larger than its standard
deviation, "not reproduced" where each seed has the other sign; in between it cannot be judged. The controls are ours.
What the claims mean in theory, and which versions of them are false, is in [geometry.md](geometry.md).

Written by `recipes/geometry_table.py` from `recipes/results/geometry/results.json`, which `recipes/geometry.py` and
`recipes/collapse_geometry.py` write."""
FIGURES = {
    name: f"{name}: {caption}"
    for name, caption in {
        "guillotine_linear": "Accuracy of a linear probe that tells four rotations apart, from h and from z",
        "guillotine_mlp": "The same of an MLP probe",
        "curvature": "Local curvature of a sweep of rotations in h and in z",
        "compression": "Spread of an image's rotations in h over that in z: above 1, the head contracts",
        "orbits": "Images of three classes turning by 360°, in the two main directions of h and of z",
        "depth": "Accuracy of a linear probe that tells four rotations apart, by depth of the head",
        "depth_condition": "Condition number of the pullback metric after each layer, over images",
        "collapse_sgd_without_batchnorm": "Spread of z under SGD from small weights, heads without BatchNorm",
        "collapse_sgd_with_batchnorm": "The same with BatchNorm",
        "collapse_flow": "Spread of z in continuous time, of a smaller system",
        "collapse_equilibrium": "Smallest eigenvalue at constructed equilibria, by size of the residual",
        "hessian": "Extreme eigenvalues of the Hessian in h along training, SiLU head from small weights",
        "hessian_smallest": "Smallest eigenvalue of the Hessian in h along training",
    }.items()
}
REGIMES = {"rotated views": "LoRA", "rotated views, head only": "head only"}
DEPTHS = {
    "LoRA": ("depth 1", "rotated views", "depth 3"),
    "head only": ("depth 1, head only", "rotated views, head only", "depth 3, head only"),
}
ESCAPED = 2.0  # times its lowest value: from there on, std of z counts as having left collapse


class Claim(NamedTuple):
    """What the paper says, its numbers, ours, and whether ours agree."""

    claim: str
    reported: str
    measured: str
    verdict: str


def verdict(differences: list[float], yes: str = "reproduced", no: str = "not reproduced: the opposite") -> str:
    """Return whether differences, one a seed, are positive as the claim has them.

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


def probes(rows: list[dict]) -> list[Claim]:
    claims = []
    for model, regime in REGIMES.items():
        for probe, reported in (("linear", "52.3 / 37.6"), ("mlp", "55.5 / 43.6")):
            h, z = (of(rows, f"rotation_{probe}_{layer}", model=model) for layer in ("h", "z"))
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


def invariance(rows: list[dict]) -> list[Claim]:
    claims = []
    for regime, upright, rotated, degrees in (
        ("LoRA", "upright views", "rotated views", 45),
        ("head only", "upright views, head only", "rotated views, head only", 45),
        ("head only", "upright views, head only", "all rotations, head only", 180),
    ):
        without, trained = (of(rows, "rotation_mlp_z", model=model) for model in (upright, rotated))
        claims.append(
            control(
                f"z forgets rotation because views are turned by up to {degrees}° ({regime}; MLP probe of z)",
                f"{percent(without)} % without, {percent(trained)} % with rotation",
                minus(without, trained),
            )
        )
    h, z = (of(rows, f"rotation_linear_{layer}", model="untrained") for layer in ("h", "z"))
    shown_pair = f"{percent(h)} / {percent(z)} %"
    return [*claims, control("a linear probe reads less from z of an untrained head, too", shown_pair, minus(h, z))]


def bending(rows: list[dict]) -> list[Claim]:
    untrained = of(rows, "ratio", model="untrained")
    claims = []
    for model, regime in REGIMES.items():
        ratio = of(rows, "ratio", model=model)
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


def contraction(rows: list[dict]) -> list[Claim]:
    claims = []
    untrained, untrained_unit = (of(rows, f"compression{end}", model="untrained") for end in ("", "_unit_input"))
    for model, regime in REGIMES.items():
        raw, unit = (of(rows, f"compression{end}", model=model) for end in ("", "_unit_input"))
        ratio_h, ratio_z = (of(rows, f"ratio_{layer}", model=model) for layer in ("h", "z"))
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
                f"{shown(ratio_h)} → {shown(ratio_z)} (untrained {shown(of(rows, 'ratio_z', model='untrained'))})",
                verdict(minus(ratio_z, ratio_h)),
            ),
        ]
    return claims


def deepening(probes: list[dict], orbits: list[dict]) -> list[Claim]:
    claims = []
    for regime, models in DEPTHS.items():
        for claim, rows, measure, reported, sign, digits in (
            ("a linear probe of z sees less rotation", probes, "rotation_linear_z", ".474 / .397 / .356", -1, 3),
            ("orbits are contracted more, h of unit length", orbits, "compression_unit_input", "49 / 57 / 79 ×", 1, 2),
            ("orbits are contracted more, h as it is", orbits, "compression", "–", 1, 2),
            ("D_inter / D_intra of z is larger", orbits, "ratio_z", "1.89 / 2.61 / 3.29", 1, 2),
        ):
            values = [of(rows, measure, model=model) for model in models]
            claims.append(
                Claim(
                    f"Depth 1 / 2 / 3: with depth {claim} ({regime})",
                    reported,
                    " / ".join(shown(value, digits) for value in values),
                    verdict([sign * (deep - flat) for flat, deep in zip(values[0], values[-1])]),
                )
            )
    return claims


def equilibria(rows: list[dict]) -> list[Claim]:
    claims = []
    alphas = rows[0]["alpha"]
    for heads, expected in ((("linear", "ReLU"), "stable"), (("GELU", "SiLU"), "unstable")):
        found = [row for row in rows if row["head"] in heads]
        ends = [row["lambda_min"][-1] for row in found]
        unstable = sum(min(row["n_neg"]) > 0 if expected == "stable" else row["n_neg"][-1] > 0 for row in found)
        errors = [
            abs(rate + value) / abs(value) for row in found for rate, value in zip(row["rate"], row["lambda_min"])
        ]
        agrees = unstable == (0 if expected == "stable" else len(found))
        claims.append(
            Claim(
                f"A collapsed h with a residual is {expected} for {' and '.join(heads)} heads: λ_min of the Hessian in "
                f"h {'is not negative' if expected == 'stable' else f'is negative at a residual of {alphas[-1]:g}'}, "
                "and the flow in h moves at the rate −λ_min",
                "Theorem 4.1",
                f"negative for {unstable} of {len(found)} heads; λ_min {shown(ends, 3)}; rates differ from −λ_min by "
                f"at most {max(errors):.1g} of it",
                "reproduced" if agrees and max(errors) < 0.01 else "not reproduced",
            )
        )
    return claims


def escapes(rows: list[dict]) -> list[Claim]:
    claims = []
    for head, reported, leaves in (
        ("SiLU", "4e-4 → 1.7e-3", True),
        ("GELU", "3e-4 → 2.0e-3", True),
        ("ReLU", "1e-4 → < 5e-5", False),
        ("linear", "1e-4 → 1.9e-3", True),
    ):
        found = [row for row in rows if row["head"] == head and row["norm"] is None]
        lowest, last = ([pick(row["std_z"]) for row in found] for pick in (min, last_of))
        left = sum(end > ESCAPED * low for end, low in zip(last, lowest))
        agrees = left == (len(found) if leaves else 0)
        claims.append(
            Claim(
                f"SGD without BatchNorm, {head} head: std of z {'leaves' if leaves else 'stays in'} collapse",
                f"{reported} (epoch 1 → 50)",
                f"start {spread([row['std_z'][0] for row in found])}, lowest {spread(lowest)}, end {spread(last)}; "
                f"more than {ESCAPED:g} × its lowest on {left} of {len(found)} seeds",
                "reproduced" if agrees else "not reproduced" if left in (0, len(found)) else "on some seeds",
            )
        )
    ends = {norm: [row["std_z"][-1] for row in rows if row["norm"] == norm] for norm in (None, "batch")}
    claims.append(
        Claim(
            "BatchNorm keeps z from collapse, with every activation",
            "SiLU .0119 → .0126, ReLU .0112 → .0088",
            f"std of z at the end {spread(ends['batch'])} with, {spread(ends[None])} without",
            "reproduced" if min(ends["batch"]) > 10 * max(ends[None]) else "not reproduced",
        )
    )
    means = {
        norm: [statistics.median(row["timescale_ratio"]) for row in rows if row["norm"] == norm]
        for norm in (None, "batch")
    }
    apart = min(means[None]) > max(means["batch"])
    claims.append(
        Claim(
            "Without BatchNorm the head moves much faster than the backbone (timescale ratio)",
            "31 to 653 without, 0.41 to 2.7 with",
            f"{span(means[None])} without, {span(means['batch'])} with",
            ("reproduced" if min(means[None]) > 1 else "in part: the order is the same") if apart else "not reproduced",
        )
    )
    return claims


def flows(rows: list[dict], kink_step: float) -> list[Claim]:
    claims = []
    for head in ("linear", "ReLU", "SiLU"):
        found = [row for row in rows if row["head"] == head]
        lowest, last = ([pick(row["std_z"]) for row in found] for pick in (min, last_of))
        left = sum(end > 1.1 * low for end, low in zip(last, lowest))
        claims.append(
            Claim(
                f"Gradient flow of all parameters, {head} head, from small weights",
                "no experiment; Theorem 4.1 is on the flow in h",
                f"std of z: start {spread([row['std_z'][0] for row in found])}, lowest {spread(lowest)}, at time "
                f"{found[0]['times'][-1]:g} {spread(last)}; rises by a tenth on {left} of {len(found)} seeds",
                "–",
            )
        )
    for head in ("linear", "ReLU"):
        flow, sgd = (of(rows, f"drift_{name}", head=head) for name in ("flow", "sgd"))
        kinks = f"; kinks resolved to a time of {kink_step:g}" if head == "ReLU" else ""
        claims.append(
            control(
                f"gradient flow conserves what the layers of a {head} head have in common, SGD does not",
                f"relative drift {span(flow)} in the flow{kinks}, {span(sgd)} under SGD",
                [math.log(b / a) for a, b in zip(flow, sgd)],
            )
        )
    return claims


def tracking(rows: list[dict]) -> list[Claim]:
    claims = []
    for head, start, rho, negative in (
        ("SiLU", "usual", ".339", "69"),
        ("SiLU", "collapsed", ".609", "72"),
        ("ReLU", "collapsed", ".669", "1"),
        ("ReLU", "usual", "not run", "not run"),
    ):
        found = [row for row in rows if (row["head"], row["start"]) == (head, start)]
        rank = [row["spearman_condition_number_clamped"] for row in found]
        below = [sum(a < -b for a, b in zip(row["lambda_min_h"], row["lambda_min_error_h"])) for row in found]
        share = [sum(values) / len(values) for values in zip(*(relative(row) for row in found))]
        measured = len(found[0]["step"])
        claims += [
            Claim(
                f"Spread and condition number of h rise together along training ({head}, {start} start; Spearman)",
                rho,
                shown(rank),
                verdict(rank),
            ),
            Claim(
                f"λ_min of the Hessian in h is negative ({head}, {start} start)",
                f"{negative} of 100 epochs, at most 6e-6 in size" if negative != "not run" else negative,
                f"{shown([float(n) for n in below], 1)} of {measured} times, beyond the error; −λ_min / λ_max from "
                f"{min(share):.2g} to {max(share):.2g}; smallest of the head's part M "
                f"{min(min(row['lambda_min_M']) for row in found):.1e}, of the loss' part G_L "
                f"{min(min(row['lambda_min_G_L']) for row in found):.1e}",
                SIGNS[head](below, measured),
            ),
        ]
    return claims


SIGNS: dict[str, Callable[[list[int], int], str]] = {
    "SiLU": lambda below, measured: "reproduced" if min(below) > measured / 2 else "not reproduced",
    "ReLU": lambda below, measured: (
        "reproduced" if max(below) <= measured / 10 else "not reproduced: negative as often"
    ),
}


def last_of(values: list[float]) -> float:
    return values[-1]


def relative(row: dict) -> list[float]:
    return [-low / high for low, high in zip(row["lambda_min_h"], row["lambda_max_h"])]


def of(rows: list[dict], measure: str, **which: object) -> list[float]:
    """Return a measure of the rows that have the values in `which`, one a seed."""
    return [row[measure] for row in rows if all(row[name] == value for name, value in which.items())]


def minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b)]


def shown(values: list[float], digits: int = 2) -> str:
    std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{std}"


def percent(values: list[float]) -> str:
    return shown([100 * value for value in values], 1)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1e}"


def span(values: list[float]) -> str:
    return f"{min(values):.2g} to {max(values):.2g}"


def section(title: str, claims: list[Claim], *figures: str) -> list[str]:
    lines = [f"## {title}", "", "| claim | paper | here | verdict |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(claim) + " |" for claim in claims]
    lines += [""]
    for figure in figures:
        name, _, caption = figure.partition(": ")
        lines += [f"![{caption}](../recipes/results/geometry/{name}.png)", "", f"*{caption}*", ""]
    return lines


def drawn(beginning: str) -> list[str]:
    return [figure for name, figure in FIGURES.items() if name.startswith(beginning)]


def document(found: dict, dataset: str) -> list[str]:
    """Return the lines of the document; what was not measured has no section."""
    rows = {name: part["rows"] for name, part in found.items() if "rows" in part}
    lines = [*INTRODUCTION.format(dataset=dataset).splitlines(), ""]
    if "guillotine" in rows:
        claims = [*probes(rows["guillotine"]), *invariance(rows["guillotine"])]
        lines += section("What probes read from h and from z", claims, *drawn("guillotine_"))
    if "curvature" in rows:
        lines += section("Curvature of a rotation sweep", bending(rows["curvature"]), FIGURES["curvature"])
    if "orbits" in rows:
        claims = contraction(rows["orbits"])
        lines += section("Orbits of rotation", claims, FIGURES["compression"], FIGURES["orbits"])
    if "depth" in rows:
        claims = deepening(rows["guillotine"], rows["orbits"])
        lines += section("Depth of the head", claims, *drawn("depth"))
    if "collapse" in found:
        claims = [*equilibria(found["collapse"]["equilibrium"]), *escapes(found["collapse"]["sgd"])]
        claims += flows(found["collapse"]["flow"], found["collapse"]["settings"]["flow"]["kink_step"])
        lines += section("Collapse", claims, *drawn("collapse_"))
    if "hessian" in found:
        lines += section("The Hessian along training", tracking(found["hessian"]["runs"]), *drawn("hessian"))
    return lines


def main() -> None:
    if not RESULTS.is_file():
        raise UsageError(f"There is no {RESULTS}: run recipes/geometry.py and recipes/collapse_geometry.py first.")
    lines = document(json.loads(RESULTS.read_text(encoding="utf-8"))[DATASET], DATASET)
    write_atomic(DOCS, ("\n".join(lines).rstrip() + "\n").encode())
    print(f"Wrote {DOCS}.")


if __name__ == "__main__":
    cli.run(main)
