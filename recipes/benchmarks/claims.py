"""Every claim that the documents make of measured numbers: its page, results, rule and verdict, worked out again.

    python recipes/benchmarks/claims.py            # writes docs/claims.md
    python recipes/benchmarks/claims.py --check    # writes nothing: status 2 if a claim or its page is another

A claim is a sentence that interprets numbers. Its words stand in claims.json as on the page, numbers left open; a rule
reads the results and returns verdict and numbers. A sentence that is not on its page, a number that is another, or a
rule that does not come to "holds" is an error. "Cannot be judged" is a claim like any other: it holds where the
interval has 0. docs/geometry_study.md and the tables of results are written from their files whole and are not listed.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hfproj import Results, cli
from hfproj.errors import UsageError
from hfproj.files import write_atomic
from hfproj.results import Interval, findings, paired_interval, unpack_outcomes
from hfproj.results.inside import Autopsy
from hfproj.studies.dropped_digits import HEADS, compared
from hfproj.studies.pooled import pooled_interval

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "claims.md"
LIST = Path(__file__).with_suffix(".json")
Found = tuple[bool, dict[str, Any]]  # whether the claim holds, and the numbers in its words


class Claim(NamedTuple):
    """A sentence of a page, the results that it speaks of, and the rule by which it is judged."""

    page: str
    words: str
    results: str
    rule: str
    judge: str  # one of JUDGES


def told(gap: Interval) -> str:
    """Return a difference with its interval, as documents write it."""
    low, high = (f"{value:+.3f}".replace("-", "−") for value in gap[1:])
    return f"{gap.difference:+.3f}".replace("-", "−") + f" [{low}, {high}]"


def side(gap: Interval) -> int:
    """Return 1 if the interval lies above 0, -1 below, 0 if it has 0: then it cannot be judged."""
    return 1 if gap.low > 0 else -1 if gap.high < 0 else 0


def gain(found: dict, name: str, run: str = "simclr") -> Interval:
    """Return the gain of h of a final run of the study of LoRA."""
    [row] = [row for row in found["final"] if (row["dataset"], row["run"]) == (name, run)]
    return Interval(*(row["gain_h"][end] for end in ("mean", "low", "high")))


def shift_of_domain(found: dict) -> Found:
    clothes, natural = (gain(found, name) for name in ("fashion_mnist", "cifar10"))
    return side(clothes) == 1 and side(natural) == 0, {"clothes": told(clothes), "natural": told(natural)}


def longer_training(found: dict) -> Found:
    gaps = [gain(found, "cifar10", run) for run in ("simclr", "simclr, 100 steps")]
    ranks = {row["run"]: row["rankme_h"]["after"] for row in found["final"] if row["dataset"] == "cifar10"}
    falls = max(ranks["simclr"]) < min(ranks["simclr, 100 steps"]) < max(ranks["learning rate 0"])
    return falls and not any(side(gap) for gap in gaps), {}


def mildly(found: dict, name: str) -> Interval:
    """Return what mild augmentation changed in one seed: two fractions of the same number of images."""
    rows = {row["trial"]: row["knn_h_after"] for row in found["tune"] if row["dataset"] == name}
    mild, base = rows["mild augmentation"], rows["base"]
    half = 1.96 * math.sqrt(sum(p * (1 - p) for p in (mild, base)) / found["tune_settings"]["holdout"])
    return Interval(mild - base, mild - base - half, mild - base + half)


def mild_views(found: dict) -> Found:
    natural, clothes = mildly(found, "cifar10"), mildly(found, "fashion_mnist")
    return side(natural) == -1 and side(clothes) == 0, {"lost": f"{-natural.difference:.3f}"}


def agreement(found: dict) -> Found:
    peers = {row["peer"] for row in found["rows"]} - {"formula"}
    closest = all(max(row["value"], row["gradient"]) < 1e-6 for row in found["rows"])
    return closest and len(peers) == 6 and peers <= set(found["peers"]), {}


def plain(found: dict, kind: str, layer: str) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return accuracies of each objective without regularizer, and on which side of NT-Xent it lies."""
    values: dict[str, list[float]] = {}
    for row in found[kind]:
        if row["regularizer"] == "plain" and row["objective"] in found["objectives"]:
            values.setdefault(row["objective"], []).append(row[layer]["knn"])
    rows = found["settings"][kind]["test"]
    gaps = {name: pooled_interval(values, name, "nt_xent", rows=rows) for name in values if name != "nt_xent"}
    return values, {name: side(gap) for name, gap in gaps.items()}


def with_lora(found: dict) -> Found:
    values, sides = plain(found, "lora", "h")
    means = [statistics.mean(own) for own in values.values()]
    return len(sides) == 5 and not any(sides.values()), {"low": f"{min(means):.3f}", "high": f"{max(means):.3f}"}


def on_features(found: dict) -> Found:
    _, sides = plain(found, "features", "z")
    apart = [f"`{name}`" for name in found["objectives"] if sides.get(name)]
    return all(s <= 0 for s in sides.values()), {"n": len(apart), "of": len(sides), "names": ", ".join(apart)}


def teachers(found: dict) -> Found:
    plain_cost = {row["objective"]: row["cpu_seconds_per_step"] for row in found["images"]}
    ratios = {name: value / plain_cost["nt_xent"] for name, value in plain_cost.items()}
    taught = [ratios.pop(name) for name in ("moco", "moco_v3", "byol", "dino")]
    numbers = {"a": min(taught), "b": max(taught), "c": min(ratios.values()), "d": max(ratios.values())}
    return min(taught) > max(ratios.values()), {key: f"{value:.2f}" for key, value in numbers.items()}


def digit(found: dict, probe: str, head: str, p: float = 0.5) -> str:
    """Return how well a probe reads the digit from h."""
    rows = [row for row in found["runs"] if (row["head"], row["drop_probability"]) == (head, p)]
    return f"{statistics.mean(row[f'{probe}: digit of h'] for row in rows):.3f}"


def kept_by_a_head(found: dict) -> Found:
    gaps = [compared(found["before"], found["runs"], probe, "digit", "MLP", "no head") for probe in ("linear", "20-NN")]
    names = {"mlp": "MLP", "none": "no head"}
    return all(side(gap) == 1 for gap in gaps), {
        f"{probe}_{key}": digit(found, name, head)
        for probe, name in (("linear", "linear"), ("knn", "20-NN"))
        for key, head in names.items()
    }


def lost_for_neighbours(found: dict) -> Found:
    linear, knn = (
        [compared(found["before"], found["runs"], probe, "digit", head) for head in HEADS]
        for probe in ("linear", "20-NN")
    )
    numbers = {}
    for key, name in (("linear", "linear"), ("knn", "20-NN")):
        numbers[f"{key}_before"] = f"{found['before'][f'{name}: digit of h']:.3f}"
        numbers[f"{key}_after"] = digit(found, name, "MLP")
    with_head = side(linear[0]) >= 0 and side(linear[1]) >= 0
    return with_head and all(side(gap) == -1 for gap in knn), numbers


def class_alike(found: dict) -> Found:
    gaps = [compared(found["before"], found["runs"], probe, "class", "MLP", "no head") for probe in ("linear", "20-NN")]
    _, numbers = kept_by_a_head(found)
    return not any(side(gap) for gap in gaps), numbers


def of_layers(found: dict, probe: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for m in found["measurements"]:
        if (m["name"], m["when"]) == (probe, "after"):
            values.setdefault(m["layer"], []).append(m["value"])
    return values


def blocks(found: dict) -> Found:
    first, last = [], []
    for probe in ("knn", "linear", "mlp"):
        values = of_layers(found, probe)
        first.append(side(pooled_interval(values, "layers.0", "h", rows=597)))
        last += [side(pooled_interval(values, name, "h", rows=597)) for name in ("layers.3", "layers.4", "layers.5")]
    return set(first) == {-1} and set(last) == {0}, {}


def z_below_h(found: Results) -> Found:
    def right(probe: str, layer: str) -> np.ndarray:
        key = (probe, layer, "after")
        return np.stack([unpack_outcomes(m.outcomes) for m in found.measurements if (m.name, m.layer, m.when) == key])

    linear, knn = (paired_interval(right(probe, "z"), right(probe, "h")) for probe in ("linear", "knn"))
    return side(linear) == -1 and side(knn) == 0, {"linear": told(linear), "knn": told(knn)}


def ranked(found: dict) -> Found:
    three = [
        r for r in found["ranking"] if r["layer"] == "h" and r["measure"] in ("alpha_req", "uniformity", "alignment")
    ]
    rhos = [row["spearman"] for row in three]
    numbers = {"n": len(found["checkpoints"]), "low": f"{min(rhos):+.2f}", "high": f"{max(rhos):+.2f}"}
    return len(three) == 3 and all(row["low"] > 0 for row in three), numbers


def never_stopped(found: dict) -> Found:
    return all(row["stopped by"] is None for row in found["runs"]), {}


def clothes_fell(found: dict) -> Found:
    [row] = [row for row in found["runs"] if (row["data"], row["run"]) == ("clothes", "no head warm-up")]
    [note] = [note for note in row["notes"] if "linear accuracy of h" in note]
    before, after = note.partition("went from ")[2].split(" (")[0].split(" to ")
    numbers = {"before": f"{float(before):.3f}", "after": f"{float(after):.3f}", "verdict": "worse"}
    return "interval −" in note and "to −" in note and row["verdict"] == "Verdict: worse.", numbers


def shares(found: dict) -> Found:
    return max(row["share"] for row in found["rows"] if row["callback"] == "SpectrumCallback") < 0.01, {}


def alarms(found: dict) -> Found:
    rang = {row["training"]: row["alarm"]["causes"][0]["name"] for row in found["runs"] if row["alarm"]}
    expected = {row["training"]: row["expected"] for row in found["runs"] if row["expected"]}
    return rang == expected and (len(expected), len(found["runs"])) == (4, 8), {}


def pixels(found: dict) -> Found:
    largest = {name: max(sizes.values()) for name, sizes in found["largest"].items()}
    one = largest.pop("DINOv3")
    return max(largest.values()) == 0 and round(one) == 1, {}


def unit_length(found: dict) -> Found:
    rows = [row for row in found["digits"]["orbits"]["rows"] if row["model"] == "untrained"]
    raw, unit = ([row[name] for row in rows] for name in ("compression", "compression_unit_input"))
    return len(rows) == 3 and max(raw) < 1 < min(unit), {}


def worse_than_h(found: Mapping[str, Autopsy]) -> Found:
    ends = [score.over_h for one in found.values() for score in one.layers[-1].scores.values()]
    return len(found) == 3 and all(side(Interval(*gap)) == -1 for gap in ends), {}


def headline(found: Results) -> Found:
    return True, {"headline": str(findings(found)[0]).partition(": ")[2], "what": findings(found)[0].headline}


JUDGES: dict[str, Callable[[Any], Found]] = {
    judge.__name__: judge
    for judge in (
        agreement, alarms, blocks, class_alike, clothes_fell, headline, kept_by_a_head, longer_training,
        lost_for_neighbours, mild_views, never_stopped, on_features, pixels, ranked, shares, shift_of_domain,
        teachers, unit_length, with_lora, worse_than_h, z_below_h,
    )
}  # fmt: skip


def claims() -> list[Claim]:
    """Return all claims."""
    return [Claim(**row) for row in json.loads(LIST.read_text(encoding="utf-8"))]


def load(name: str) -> Any:
    """Return what results hold: JSON, the `Results` of a card, or the autopsies of a folder."""
    path = ROOT / name
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if (path / "results.json").is_file():
        return Results.load(path)
    return {file.stem: Autopsy.from_dict(json.loads(file.read_text(encoding="utf-8"))) for file in path.glob("*.json")}


def said(claim: Claim) -> str:
    """Return a claim's words with the numbers of its results.

    Raises:
        UsageError: If it does not hold, or its page says something else.
    """
    holds, numbers = JUDGES[claim.judge](load(claim.results))
    words = claim.words.format(**numbers)
    if not holds:
        raise UsageError(f"Expected what {claim.page} says to hold by {claim.results}, got another verdict: {words!r}.")
    if words not in " ".join((ROOT / claim.page).read_text(encoding="utf-8").split()):
        raise UsageError(f"Expected {claim.page} to say {words!r}, as {claim.results} does; got other words there.")
    return words


def document() -> str:
    """Return the page that lists all claims."""
    head = (
        "# Claims\n\nWhat these documents say of measured numbers, each with its results and its rule. Written by "
        "`recipes/benchmarks/claims.py`,\nwhich works out every verdict and number again; a test fails where a page "
        "says something else. Verdicts of\n[the geometry of heads](geometry_study.md) stand in its tables, by the rule "
        "at its top, and follow from its results in the same way.\n"
    )
    lines = [head, "| claim | page | results | holds by |", "|---|---|---|---|"]
    for claim in claims():
        words = re.sub(r"\[([^\[\]]*[a-z])\](\([^)]*\))?", r"\1", said(claim)).replace("**", "").replace("|", "\\|")
        words = words if len(words) < 240 else words[: words.rindex(" ", 0, 240)] + " …"
        lines.append(f"| {words} | [{claim.page}](../{claim.page}) | `{claim.results}` | {claim.rule} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a claim or the page is another.")
    options, text = parser.parse_args(), document()
    if options.check and (not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text):
        raise UsageError(f"{PAGE} is not what the claims say; run this recipe without --check.")
    if not options.check:
        write_atomic(PAGE, text.encode())
    print(f"{len(claims())} claims hold.")


if __name__ == "__main__":
    cli.run(main)
