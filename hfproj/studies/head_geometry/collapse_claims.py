"""What the experiments on collapse found, claim by claim against the paper's numbers and its Theorem 4.1."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from scipy.stats import spearmanr

from hfproj.studies.head_geometry.claims import Claim, Rows, control, shown, verdict
from hfproj.studies.head_geometry.study import values_of

_FLOAT32 = 2.0**-23  # its rounding
ESCAPED = 2.0  # times its lowest value: from there on, std of z counts as having left collapse


def equilibria(rows: Rows) -> list[Claim]:
    """Whether a collapsed h with a residual is stable, by head."""
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


def escapes(rows: Rows) -> list[Claim]:
    """Whether training leaves collapse, by head and BatchNorm."""
    claims = []
    for head, reported, leaves in (
        ("SiLU", "4e-4 → 1.7e-3", True),
        ("GELU", "3e-4 → 2.0e-3", True),
        ("ReLU", "1e-4 → < 5e-5", False),
        ("linear", "1e-4 → 1.9e-3", True),
    ):
        found = [row for row in rows if row["head"] == head and row["norm"] is None]
        lowest, last = ([pick(row["std_z"]) for row in found] for pick in (min, _last))
        left = sum(end > ESCAPED * low for end, low in zip(last, lowest))
        agrees = left == (len(found) if leaves else 0)
        claims.append(
            Claim(
                f"SGD without BatchNorm, {head} head: std of z {'leaves' if leaves else 'stays in'} collapse",
                f"{reported} (epoch 1 → 50)",
                f"start {_spread([row['std_z'][0] for row in found])}, lowest {_spread(lowest)}, end {_spread(last)}; "
                f"more than {ESCAPED:g} × its lowest on {left} of {len(found)} seeds",
                "reproduced" if agrees else "not reproduced" if left in (0, len(found)) else "on some seeds",
            )
        )
    ends = {norm: [row["std_z"][-1] for row in rows if row["norm"] == norm] for norm in (None, "batch")}
    claims.append(
        Claim(
            "BatchNorm keeps z from collapse, with every activation",
            "SiLU .0119 → .0126, ReLU .0112 → .0088",
            f"std of z at the end {_spread(ends['batch'])} with, {_spread(ends[None])} without",
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
            f"{_span(means[None])} without, {_span(means['batch'])} with",
            ("reproduced" if min(means[None]) > 1 else "in part: the order is the same") if apart else "not reproduced",
        )
    )
    return claims


def flows(rows: Rows, kink_step: float) -> list[Claim]:
    """What gradient flow does from small weights, and what it conserves."""
    claims = []
    for head in ("linear", "ReLU", "SiLU"):
        found = [row for row in rows if row["head"] == head]
        lowest, last = ([pick(row["std_z"]) for row in found] for pick in (min, _last))
        left = sum(end > 1.1 * low for end, low in zip(last, lowest))
        claims.append(
            Claim(
                f"Gradient flow of all parameters, {head} head, from small weights",
                "no experiment; Theorem 4.1 is on the flow in h",
                f"std of z: start {_spread([row['std_z'][0] for row in found])}, lowest {_spread(lowest)}, at time "
                f"{found[0]['times'][-1]:g} {_spread(last)}; rises by a tenth on {left} of {len(found)} seeds",
                "–",
            )
        )
    for head in ("linear", "ReLU"):
        flow, sgd = (values_of(rows, f"drift_{name}", head=head) for name in ("flow", "sgd"))
        kinks = f"; kinks resolved to a time of {kink_step:g}" if head == "ReLU" else ""
        claims.append(
            control(
                f"gradient flow conserves what the layers of a {head} head have in common, SGD does not",
                f"relative drift {_span(flow)} in the flow{kinks}, {_span(sgd)} under SGD",
                [math.log(b / a) for a, b in zip(flow, sgd)],
            )
        )
    return claims


def tracking(rows: Rows) -> list[Claim]:
    """How spread, conditioning and the smallest eigenvalue go together along training."""
    claims = []
    for head, start, rho, negative in (
        ("SiLU", "usual", ".339", "69"),
        ("SiLU", "collapsed", ".609", "72"),
        ("ReLU", "collapsed", ".669", "1"),
        ("ReLU", "usual", "not run", "not run"),
    ):
        found = [row for row in rows if (row["head"], row["start"]) == (head, start)]
        below = [sum(a < -b for a, b in zip(row["lambda_min_h"], row["lambda_min_error_h"])) for row in found]
        fraction = [sum(values) / len(values) for values in zip(*(_relative(row) for row in found))]
        measured = len(found[0]["step"])
        claims += [
            *conditioned(found, f"{head}, {start} start", rho),
            Claim(
                f"λ_min of the Hessian in h is negative ({head}, {start} start)",
                f"{negative} of 100 epochs, at most 6e-6 in size" if negative != "not run" else negative,
                f"{shown([float(n) for n in below], 1)} of {measured} times, beyond the error; −λ_min / λ_max from "
                f"{min(fraction):.2g} to {max(fraction):.2g}; smallest of the head's part M "
                f"{min(min(row['lambda_min_M']) for row in found):.1e}, of the loss' part G_L "
                f"{min(min(row['lambda_min_G_L']) for row in found):.1e}",
                _as_expected(head, below, measured, ran=negative != "not run"),
            ),
        ]
    return claims


def conditioned(found: Rows, which: str, reported: str) -> list[Claim]:
    """Whether spread and condition number of h rise together: on the support, and with eigenvalues raised to 1e-7.

    h has a direction without variance (it comes out of a LayerNorm), so that the number of the paper's code, with
    eigenvalues raised to 1e-7, is the largest eigenvalue times 1e7. It can't tell whether conditioning changes. A
    number that moves by less than the rounding of float32 allows, after the first record, rises with nothing: the
    smallest σ is known to ε·σ_max, so that their squared ratio κ is known to 2ε√κ of it.
    """
    claim = f"Spread and condition number of h rise together along training ({which}; Spearman"
    clamped = [_together(row, "condition_number_clamped") for row in found]
    control = f"Control: the same with eigenvalues raised to 1e-7, as in the paper's code ({which}; Spearman)"
    if not all("rank" in row for row in found):  # without it, rounding was taken for an eigenvalue
        return [
            Claim(f"{claim})", reported, "–", "cannot be judged: only the clamped number was recorded"),
            Claim(control, "–", shown(clamped), "–"),
        ]
    ranks = sorted({rank for row in found for rank in row["rank"]})
    of_support = f"; on the support, rank {' to '.join(str(rank) for rank in {ranks[0]: 0, ranks[-1]: 0})}"
    rho = [_together(row, "condition_number") for row in found]
    moved = max(_moved(row["condition_number"][1:]) for row in found)
    rounding = 2 * _FLOAT32 * math.sqrt(max(max(row["condition_number"]) for row in found))
    judged = f"cannot be judged: it moves by {moved:.0e} of it, less than rounding"
    if moved > rounding:
        judged = verdict(rho, "yes", "no: the opposite") if reported == "not run" else verdict(rho)
    alone = all(a > 1.01 * b for row in found for a, b in zip(row["condition_number_clamped"], row["condition_number"]))
    return [
        Claim(f"{claim}{of_support})", reported, shown(rho), judged),
        Claim(control, "–", shown(clamped), "no condition number: it is λ_max · 1e7" if alone else "–"),
    ]


def _moved(values: list[float]) -> float:
    return (max(values) - min(values)) / min(values)


def _together(row: Mapping[str, Any], measure: str) -> float:
    return float(spearmanr(row["std_h"], row[measure]).statistic)


def _as_expected(head: str, below: list[int], measured: int, *, ran: bool) -> str:
    """Return whether λ_min is negative as the paper has it: mostly for SiLU, at most at a tenth of times for ReLU."""
    agrees = min(below) > measured / 2 if head == "SiLU" else max(below) <= measured / 10
    if head == "SiLU":
        return "reproduced" if agrees else "not reproduced"
    if ran:
        return "reproduced" if agrees else "not reproduced: negative as often"
    return "seldom" if agrees else "negative as often"


def _last(values: list[float]) -> float:
    return values[-1]


def _relative(row: dict[str, Any]) -> list[float]:
    return [-low / high for low, high in zip(row["lambda_min_h"], row["lambda_max_h"])]


def _spread(values: list[float]) -> str:
    """Return the mean, as a power of ten."""
    return f"{statistics.mean(values):.1e}"


def _span(values: list[float]) -> str:
    """Return the smallest and the largest value."""
    return f"{min(values):.2g} to {max(values):.2g}"
