"""What documents say of measured numbers is what the results say: words, numbers and verdicts."""

import copy
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hfproj.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("recipe_claims", ROOT / "recipes" / "benchmarks" / "claims.py")
recipe = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = recipe
SPEC.loader.exec_module(recipe)
CLAIMS = recipe.claims()
OWN_TESTS = {  # written whole from their results, or owned by another test
    "docs/claims.md", "docs/geometry_study.md", "docs/autopsy.md", "docs/regularizers.md",
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.page}: {claim.words[:30]}")
def test_a_claim_stands_on_its_page_and_holds(claim):
    assert recipe.said(claim)
    assert set(re.findall(r"`(hfproj\.[a-z.]+)`", claim.rule)) <= {"hfproj.studies.pooled"}


def test_every_rule_is_used_and_the_page_lists_all_claims():
    assert {claim.judge for claim in CLAIMS} == set(recipe.JUDGES)
    assert recipe.PAGE.read_text(encoding="utf-8") == recipe.document()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.page}: {claim.words[:30]}")
def test_other_words_on_the_page_are_seen(claim, monkeypatch):
    words = recipe.said(claim)
    read = Path.read_text

    def rewritten(path, **options):
        text = " ".join(read(path, **options).split())
        return text.replace(words, words[:-4]) if path == ROOT / claim.page else text

    monkeypatch.setattr(Path, "read_text", rewritten)
    with pytest.raises(UsageError, match="got other words there"):
        recipe.said(claim)


def turned(found, name):
    """Return the same results with the sign of what a rule looks at turned round."""
    found = copy.deepcopy(found)
    match name:
        case "shift_of_domain":
            for row in found["final"]:
                row["gain_h"] |= {"low": -row["gain_h"]["high"], "high": -row["gain_h"]["low"]}
        case "kept_by_a_head" | "lost_for_neighbours":
            for row in found["runs"]:
                for key in [key for key in row if "digit of h" in key]:
                    row[key] = 1 - row[key]
            found["before"] = {key: 1 - value for key, value in found["before"].items()}
        case "ranked":
            for row in found["ranking"]:
                row["low"] = -row["low"]
        case "with_lora" | "on_features":
            for row in found["lora"] + found["features"]:
                for layer in {"h", "z"} & row.keys():
                    row[layer]["knn"] += 0.2 * (row["objective"] == "dcl") + 0.2 * (row["objective"] == "byol")
        case "mild_views":
            for row in found["tune"]:
                row["knn_h_after"] = 1 - row["knn_h_after"]
        case "teachers":
            for row in found["images"]:
                row["cpu_seconds_per_step"] = 1 / row["cpu_seconds_per_step"]
        case "blocks":
            for row in found["measurements"]:
                row["value"] = 1 - row["value"]
        case "class_alike":
            for row in found["runs"]:
                row["linear: class of h"] -= 0.1 * (row["head"] == "MLP")
        case "longer_training":
            for row in found["final"]:
                row["rankme_h"]["after"] = [-rank for rank in row["rankme_h"]["after"]]
        case "alarms":
            found["runs"][-1]["alarm"] = found["runs"][0]["alarm"]
        case "never_stopped":
            found["runs"][-1]["stopped by"] = "overlap"
        case "clothes_fell":
            for row in found["runs"]:
                row["verdict"] = "Verdict: better."
        case "shares":
            found["rows"][0]["share"] = 0.02
        case "pixels":
            found["largest"]["ViT"]["31 x 57"] = 1.0
        case "z_below_h":
            other = {"h": "z", "z": "h"}
            found.measurements[:] = [replace(m, layer=other.get(m.layer, m.layer)) for m in found.measurements]
        case "agreement":
            found["rows"][0]["gradient"] = 1e-3
        case "unit_length":
            for row in found["digits"]["orbits"]["rows"]:
                row["compression_unit_input"] = 0.5
    return found


@pytest.mark.parametrize("name", sorted(set(recipe.JUDGES) - {"headline", "worse_than_h"}))  # those have own tests
def test_results_turned_round_end_in_another_verdict(name, monkeypatch):
    claim = next(claim for claim in CLAIMS if claim.judge == name)
    found = turned(recipe.load(claim.results), name)
    monkeypatch.setattr(recipe, "load", lambda _: found)
    with pytest.raises(UsageError, match="got another verdict"):
        recipe.said(claim)


def prose(text):
    """Return the sentences of a page: no code, no tables, no headings, no parts that a command writes."""
    text = re.sub(
        r"^```.*?^```|^---.*?^---|<!-- table.*?end of table -->|<!-- cost.*?/cost -->",
        "",
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n|^\|.*$", text, flags=re.MULTILINE)]


def test_no_measured_number_stands_in_prose_without_a_claim():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    unlisted = []
    for page in pages:
        name = page.relative_to(ROOT).as_posix()
        if name in OWN_TESTS:
            continue
        listed = [recipe.said(claim) for claim in CLAIMS if claim.page == name]
        for part in prose(page.read_text(encoding="utf-8")):
            for words in listed:
                part = part.replace(words, "")
            part = re.sub(r"`[^`]*`", "", part)
            unlisted += [f"{name}: {number}" for number in re.findall(r"(?<![\w.])[+−]?\d\.\d{3,}(?![\d.])", part)]
    assert not unlisted
