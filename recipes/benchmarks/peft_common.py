"""PEFT's own common tests, run against projection heads: which hold, and why the others can't.

    pip download --no-binary :all: --no-deps peft==0.21.2 && tar xzf peft-0.21.2.tar.gz
    python recipes/benchmarks/peft_common.py peft-0.21.2

The tests are those of PEFT's source distribution (`tests/testing_common.py`), nothing of which is kept here. They run
on small random ViT, DINOv2 and BERT models with a head alone, with LoRA beside it, with two trained blocks and with the
whole backbone. They take the first output for the adapter's; here that is z (`ProjectionOutput` begins with h, which
does not depend on the head). Exits with 1 where a test fails for a reason that is not listed in `REASONS`, or where a
reason there is no longer needed.

Writes peft_common.json and peft_common.md below recipes/benchmarks/results.
"""

import argparse
import importlib.util
import inspect
import os
import re
import sys
import traceback
import types
import unittest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared CPU spinning threads cost more than they save
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModel, BertConfig, BertModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

import hfproj
from hfproj.errors import one_line
from hfproj.files import installed_versions, write_atomic, write_json
from hfproj.tuner.layer import ProjectionOutput

OUT = Path(__file__).resolve().parent / "results"
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
IMAGES = SMALL | {"image_size": 32, "patch_size": 8}
MODELS: dict[str, Any] = {
    "ViT": lambda: ViTModel(ViTConfig(**IMAGES, intermediate_size=32)),
    "DINOv2": lambda: Dinov2Model(Dinov2Config(**IMAGES, mlp_ratio=2)),
    "BERT": lambda: BertModel(BertConfig(**SMALL, intermediate_size=32, vocab_size=100)),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "head": {"trainable": "head"},
    "LoRA": {"backbone_adapter": LoraConfig(r=2, lora_alpha=64, init_lora_weights=False)},
    "blocks": {"trainable": 2},
    "full": {"trainable": "full"},
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "_test_add_adapter_no_autocast_adapter_dtype": [{"dtype": torch.float16}, {"dtype": torch.bfloat16}],
    "_test_training_gradient_checkpointing": [{"use_reentrant": True}, {"use_reentrant": False}],
    "_test_save_pretrained": [{"safe_serialization": True}, {"safe_serialization": False}],
    "_test_save_pretrained_selected_adapters": [{"safe_serialization": True}, {"safe_serialization": False}],
    "_test_generate_pos_args": [{"raises_err": False}],
}
# Patterns of the test with its options, of the model with its adapter and of what the failure says; why it can't hold.
REASONS: list[tuple[str, str, str, str]] = [
    (
        "_test_(safe_)?merge_layers.*", ".*", "UsageError: A projection head can't be merged.*",
        "A head follows the backbone and has no weights that could be merged into it; it is refused with these words.",
    ),
    (
        "_test_(safe_merge|unload_adapter)", ".*", "RuntimeError: The size of tensor.*",
        "The test compares the outputs with and without the adapter, which are z and the backbone's own: other shapes.",
    ),
    (
        "_test_(generate.*|disable_adapter)", ".*", "AttributeError: '.*' object has no attribute 'generate'",
        "The test generates text, which an encoder doesn't; tests/tuner compares disabled adapters bit for bit.",
    ),
    (
        "_test_(generate.*|prepare_for_training|passing_input_embeds_works)", "(ViT|DINOv2) .*",
        "KeyError: 'input_ids'|UsageError: .* reads images as pixel_values, got input_ids.*",
        "The test passes input_ids, which image backbones don't take.",
    ),
    (
        "_test_prepare_for_training", "BERT full", "AssertionError.*",
        "The test wants frozen embeddings, which trainable='full' trains.",
    ),
    (
        "_test_training(_gradient_checkpointing.*)?", ".* (LoRA|blocks|full)", "AssertionError in the last line",
        "The test's last line wants no gradient outside the head's own prefix, where this adapter has its LoRA or "
        "blocks; what is before it holds.",
    ),
    (
        "_test_add_adapter_no_autocast_adapter_dtype.*", ".*", "AssertionError.*",
        "Heads are kept in float32 or better in any case: BatchNorm statistics and normalized prototypes need it.",
    ),
]  # fmt: skip


class FirstIsZ(ProjectionOutput):
    """An output whose first element is z."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Return z, h and the backbone's output."""
        return (self.projection, self.representation, self.backbone_output)


def common_tests(folder: Path) -> Any:
    """Return PEFT's module of common tests; what it imports and these tests have no use for need not be installed."""
    if importlib.util.find_spec("diffusers") is None:
        stub: Any = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stub
    package = types.ModuleType("peft_tests")
    package.__path__ = [str(folder / "tests")]
    sys.modules["peft_tests"] = package
    return importlib.import_module("peft_tests.testing_common")


def calls(tester: type) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield every test of the class with each of its options: its name, the function, the options."""
    for name, function in inspect.getmembers(tester, inspect.isfunction):
        if {"model_id", "config_cls", "config_kwargs"} <= set(inspect.signature(function).parameters):
            for options in OPTIONS.get(name, [{}]):
                shown = ", ".join(f"{n}={str(v).removeprefix('torch.')}" for n, v in options.items())
                yield f"{name}({shown})" if shown else name, function, options


def outcome(tester: Any, function: Any, model: str, config: dict[str, Any], options: dict[str, Any]) -> tuple[str, str]:
    """Return "passed", "skipped" or "failed", with the reason that the test or the error gives."""
    if "test_name" in inspect.signature(function).parameters:
        options = {"test_name": function.__name__, **options}
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(tester, model_id=model, config_cls=hfproj.ProjectionHeadConfig, config_kwargs=config, **options)
    except (pytest.skip.Exception, unittest.SkipTest) as skipped:
        return "skipped", str(skipped)
    except AssertionError as error:
        return "failed", f"AssertionError in {place_of(error, inspect.unwrap(function))}"
    except (Exception, pytest.fail.Exception) as error:
        return "failed", f"{type(error).__name__}: {one_line(error)}"
    return "passed", ""


def place_of(error: AssertionError, test: Any) -> str:
    """Return which line of a test an assertion is in."""
    lines, first = inspect.getsourcelines(test)
    own = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.name == test.__name__]
    if not own:
        return "no line of the test itself"
    at = own[-1] - first + 1
    return "the last line" if at == len(lines) else f"line {at} of {len(lines)}"


def reason_of(row: dict[str, str]) -> str:
    """Return why a test can't hold for an adapter, or an empty text where no reason is listed."""
    found = (row["test"], f"{row['model']} {row['adapter']}", row["said"])
    return next((r[3] for r in REASONS if all(map(re.fullmatch, r[:3], found))), "")


def measured(folder: Path, only: str = "") -> list[dict[str, str]]:
    """Run all tests and return a row for each: model, adapter, test, outcome, what was said, the reason listed."""
    common, rows = common_tests(folder), []
    hfproj.tuner.layer.ProjectionOutput = FirstIsZ  # type: ignore[misc]
    images = {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    texts = {"input_ids": torch.tensor([[2, 5, 7, 9], [2, 8, 1, 3]]), "attention_mask": torch.ones(2, 4).long()}
    with tempfile.TemporaryDirectory() as place:
        for model, make in MODELS.items():
            torch.manual_seed(3)
            make().save_pretrained(Path(place) / model)
            inputs = texts if model == "BERT" else images

            class Tester(common.PeftCommonTester):  # type: ignore[misc, name-defined]
                transformers_class = AutoModel
                torch_device = "cpu"

                def prepare_inputs_for_testing(self, _inputs: dict[str, torch.Tensor] = inputs) -> dict[str, Any]:
                    return {name: tensor.to(self.torch_device) for name, tensor in _inputs.items()}

            for adapter, changes in CONFIGS.items():
                config = {"head": "mlp", "head_options": {"hidden_dim": 8}, "out_dim": 6, **changes}
                for test, function, options in calls(Tester):
                    if only in test:
                        found, said = outcome(Tester(), function, str(Path(place) / model), config, options)
                        said = said.replace(place, "…")
                        row = {"model": model, "adapter": adapter, "test": test, "outcome": found, "said": said}
                        rows.append(row | {"reason": reason_of(row) if found == "failed" else ""})
    return rows


def table(found: dict[str, Any]) -> str:
    """Return the outcomes in Markdown: a line for each test, with what can't hold and why."""
    rows = found["rows"]
    counts = {o: sum(row["outcome"] == o for row in rows) for o in ("passed", "skipped", "failed")}
    listed = sum(bool(row["reason"]) for row in rows)
    lines = [
        "# PEFT's common tests",
        "",
        f"PEFT {found['versions']['peft']}, {len(rows)} runs of its common tests on {', '.join(MODELS)}, each with "
        f"{', '.join(CONFIGS)}: {counts['passed']} passed, {counts['skipped']} are skipped by PEFT itself, "
        f"{counts['failed']} failed, of which {listed} for a reason that is listed.",
        "", "| test | passed | skipped | failed | why it can't hold |", "| --- | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    for test in dict.fromkeys(row["test"] for row in rows):
        own = [row for row in rows if row["test"] == test]
        each = [sum(row["outcome"] == o for row in own) for o in counts]
        reasons = dict.fromkeys(
            row["reason"] or f"not listed: {row['said']}" for row in own if row["outcome"] == "failed"
        )
        lines.append(f"| `{test.removeprefix('_test_')}` | {' | '.join(map(str, each))} | {' '.join(reasons)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="PEFT's unpacked source distribution")
    parser.add_argument("--only", default="", help="run the tests with this in their name, and write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(arguments.folder, arguments.only)
    text = table(everything := {"versions": installed_versions(), "rows": found})
    if not arguments.only:
        write_json(OUT / "peft_common.json", everything)
        write_atomic(OUT / "peft_common.md", text.encode())
    print(text)
    wrong = [
        f"not listed: {row['model']}, {row['adapter']}: {row['test']}: {row['said']}"
        for row in found
        if row["outcome"] == "failed" and not row["reason"]
    ]
    used = {row["reason"] for row in found}
    wrong += [f"no longer needed: {reason[3]}" for reason in REASONS if reason[3] not in used and not arguments.only]
    print("\n".join(wrong))
    sys.exit(1 if wrong else 0)
