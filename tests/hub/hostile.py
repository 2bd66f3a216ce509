"""An adapter for the tests of hostile ones to damage, and what they do to it."""

import json
import os

from cases import assert_refused, make_backbone, make_config, perturb
from peft import get_peft_model

import hfproj
from hfproj import filenames

PARTS = {"predictor": {"head": "mlp", "hidden_dim": 4}, "prototypes": {"count": 5, "learn_norm": True}}
REFUSED = (hfproj.AdapterFileError, hfproj.UsageError)
MARK = "/tmp/hfproj-was-here"


class Boom:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


def save_adapter(folder):
    """Save a head with everything that one can have, and a LoRA, both trained."""
    model = get_peft_model(make_backbone("vit"), make_config("vit", "lora", **PARTS, scales={"t": 1.0}))
    perturb(model)
    model.eval().save_pretrained(folder)
    (folder / "README.md").unlink()
    return folder


def config_of(folder):
    return json.loads((folder / filenames.ADAPTER_CONFIG).read_text())


def write_config(folder, values):
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    (folder / filenames.ADAPTER_CONFIG).write_bytes(text)


def changed(values, path, value):
    """A copy of nested dictionaries with one entry replaced."""
    name, *rest = path
    return {**values, name: changed(values.get(name) or {}, rest, value) if rest else value}


def refusal(call, *said):
    message = assert_refused(call, *said, error=REFUSED)
    assert len(message) < 900
    return message
