"""Committed tables say what the committed results.json beside them holds."""

import importlib.util
import json
from pathlib import Path

import pytest

from hfproj.results.verdict import paired_interval
from hfproj.studies import dropped_digits

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
RESULTS = RECIPES / "benchmarks" / "results"


def recipe(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{Path(name).name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_transfer(found):
    return recipe("benchmarks/transfer").tables(found)


def of_dropped_digits(found):
    return dropped_digits.document(found["before"], found["runs"])


def of_gpu(found):
    return recipe("benchmarks/gpu").markdown(found)


def of_fingerprint(found):
    assert (found["false_alarms"], found["misses"], found["other_mistakes"]) == (0, 0, 0)
    return recipe("benchmarks/fingerprint").table(found)


def of_peft_common(found):
    assert all(row["reason"] for row in found["rows"] if row["outcome"] == "failed")
    return recipe("benchmarks/peft_common").table(found)


def of_preprocessing(found):
    assert max(value for row in found["largest"].values() for value in row.values()) <= 2
    return recipe("benchmarks/preprocessing").table(found)


def of_objectives(found):
    return recipe("benchmarks/objectives").document(found)


def of_lora_study(found):
    return recipe("benchmarks/lora_study").markdown(found)


TABLES = [
    ("objectives", of_objectives), ("lora_study", of_lora_study),
    ("transfer", of_transfer), ("dropped_digits", of_dropped_digits), ("gpu", of_gpu), ("fingerprint", of_fingerprint),
    ("peft_common", of_peft_common), ("preprocessing", of_preprocessing),
]  # fmt: skip


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_a_table_is_that_of_its_results(name, table):
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert table(found) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def test_regularizers_by_target_are_those_of_their_results():
    """The tables of docs/regularizers.md, and what is said of them: targets are reached."""
    found = json.loads((RESULTS / "sparsity.json").read_text(encoding="utf-8"))
    text = (RECIPES.parent / "docs" / "regularizers.md").read_text(encoding="utf-8")
    made = recipe("benchmarks/sparsity")
    for name in ("targets", "nats", "nats_bound", "nats_head", "sweep", "compare"):
        lines = "\n".join(getattr(made, f"of_{name.split('_')[0]}")(found[name]))
        assert f"<!-- {name} -->\n{lines}\n<!-- /{name} -->" in text
    for row in found["targets"]:
        reached, wanted = row["end"]["sparse_head_sparsity"], row["regularizers"]["sparse_head"]["sparsity"]
        assert abs(reached - wanted) <= 0.02
    assert len(found["targets"]) == 3 * 2 * 5 * 3


def test_what_is_said_of_sparsity_is_what_was_measured():
    found = json.loads((RESULTS / "sparsity.json").read_text(encoding="utf-8"))

    def of(objective, norm, target):
        wanted = (objective, norm, {"sparse_head": {"sparsity": target}})
        return [r for r in found["targets"] if (r["objective"], r["norm"], r["regularizers"]) == wanted]

    def mean(rows, name):
        return sum(row[name] for row in rows) / len(rows)

    beyond, falls = [], []
    for objective in ("nt_xent", "byol", "barlow_twins"):
        for norm in ("BatchNorm", "none"):
            plain = of(objective, norm, 0.0)
            for target in (0.25, 0.5, 0.75, 0.9):
                rows = of(objective, norm, target)
                assert abs(mean(rows, "rankme_h") - mean(plain, "rankme_h")) < 1
                gap = paired_interval(*([[int(c) for c in r["correct"]] for r in group] for group in (rows, plain)))
                beyond += [(objective, norm, gap.high < 0)] if gap.low > 0 or gap.high < 0 else []
            falls += [mean(plain, "rankme_z") - mean(rows, "rankme_z")] if norm == "BatchNorm" else []
    assert beyond == [("byol", "BatchNorm", True)] * 3
    assert (round(min(falls), 1), round(max(falls), 1)) == (1.7, 3.1)

    sweep = {
        (r["norm"], o["method"], o["weight"]): r for r in found["sweep"] if (o := r["regularizers"]["sparse_head"])
    }
    plain = sweep["none", "subgradient", 0.0]
    for weight in (0.1, 0.32, 1.0, 3.2):
        row = sweep["none", "subgradient", weight]
        assert row["end"]["sparse_head_sparsity"] == 0
        assert row["rankme_h"] > plain["rankme_h"] + 1
        assert row["rankme_z"] < plain["rankme_z"] - 1
    proximal = [sweep["none", "proximal", w]["end"]["sparse_head_sparsity"] for w in (3.2, 10.0, 32.0)]
    assert proximal[0] == 0 < proximal[1] < proximal[2] == 1


def test_what_is_said_of_nats_is_what_was_measured():
    found = json.loads((RESULTS / "sparsity.json").read_text(encoding="utf-8"))

    def ratios(what):
        """Return objective and first weight → reached over target, the mean of seeds."""
        by_start = {}
        for row in found[what]:
            options = row["regularizers"]["bottleneck"]
            if options != 1e-9:
                options = options.copy()
                case = (row["objective"], options.pop("weight"))
                (target,) = options.values()
                by_start.setdefault(case, []).append(row["bottleneck"] / target)
        return {case: sum(values) / len(values) for case, values in by_start.items()}

    head, bound, kept = (ratios(what) for what in ("nats_head", "nats_bound", "nats"))
    assert len(head) == 2
    assert all(abs(ratio - 1) <= 0.1 for ratio in head.values())
    assert len(kept) == 9
    assert all(abs(ratio - 1) <= 0.025 for (_, start), ratio in kept.items() if start == 0.001)
    assert {case for case, ratio in kept.items() if abs(ratio - 1) > 0.1} == {
        ("barlow_twins", 0.1),
        ("barlow_twins", 1.0),
    }
    assert len(bound) == 6
    assert abs(bound["nt_xent", 0.001] - 1) < 0.1 > abs(bound["barlow_twins", 0.001] - 1)
    assert bound["byol", 0.001] < 0.75
    assert max(ratio for (_, start), ratio in bound.items() if start == 10) < 0.8


def test_what_is_said_of_strengths_is_what_was_measured():
    found, made = json.loads((RESULTS / "sparsity.json").read_text(encoding="utf-8")), recipe("benchmarks/sparsity")
    header, _, plain, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in made.of_compare(found["compare"])
    )
    assert len(rows) == 10
    ranks = [header.index("RankMe h"), header.index("RankMe z")]
    for row in rows:
        moved = max(abs(float(row[i].split()[0]) - float(plain[i].split()[0])) for i in ranks)
        low, high = (float(x) for x in row[-1].split("[")[1].rstrip("]").split(","))
        assert moved > 1
        assert (low > 0 or high < 0) == (row[0] == "koleo")
