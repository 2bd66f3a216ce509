"""Shared settings: quiet OpenMP, checked shapes, one seed per test, paths of optional real data."""

import gc
import importlib.metadata
import json
import os
import platform
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import type_checks

type_checks.install()

import torch

torch.set_num_threads(1)  # one core for each of pytest's processes, and sums that do not depend on the machine's cores

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


RECORDED = ("torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "timm", "pytest")


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="write what passed, on which versions, as JSON")


class Seed:
    """One seed for each test; as a plugin, for the examples in the package's docstrings, too."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self):
        if torch.cuda.is_available():
            torch.manual_seed(0)
        else:  # manual_seed would write down the stack three times, for devices that are not there
            torch.default_generator.manual_seed(0)


def pytest_configure(config):
    config.started = time.time()
    config.pluginmanager.register(Seed())


def pytest_terminal_summary(terminalreporter, config):
    if config.option.record:
        counts = {outcome: len(terminalreporter.stats.get(outcome, [])) for outcome in ("passed", "failed", "skipped")}
        counts["errors"] = len(terminalreporter.stats.get("error", []))
        record = {
            **counts,
            "seconds": round(time.time() - config.started),
            "selected": config.option.markexpr,
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in RECORDED},
        }
        Path(config.option.record).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def pytest_collection_finish():
    gc.freeze()  # else each full collection, and a trainer asks for some, goes through a million objects of pytest's


@pytest.fixture
def data_folder():
    if not DATA.is_dir():
        pytest.skip("the real data sets lie outside this repository and are absent")
    return DATA
