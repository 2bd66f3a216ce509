"""Committed tables say what the committed results.json beside them holds."""

import importlib.util
import json
from pathlib import Path

import pytest

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
