"""Private names of transformers, PEFT and torch that the package overrides or calls: upstream may move them any day.

Each row names who holds the name and the parameters that are relied on. The second test finds private methods that are
overridden without a row here.
"""

import inspect

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from transformers import Trainer
from transformers.utils import hub

import hfproj
from hfproj.tuner.layer import ProjectionLayer
from hfproj.tuner.model import ProjectionHeadModel

TABLE = [
    # called by transformers with these arguments, or called by us
    (Trainer, "_get_train_sampler", ["train_dataset"]),
    (Trainer, "_get_grad_norm", ["model", "grad_norm"]),
    (Trainer, "_save", ["output_dir", "state_dict"]),
    (Trainer, "_load_from_checkpoint", ["resume_from_checkpoint", "model"]),
    (Trainer, "_load_best_model", []),
    (Trainer, "_load_optimizer_and_scheduler", ["checkpoint"]),
    (Trainer, "_save_checkpoint", ["model", "trial"]),
    (Trainer, "_get_output_dir", ["trial"]),
    (Trainer, "_maybe_log_save_evaluate", None),
    (Trainer, "_push_from_checkpoint", ["checkpoint_folder"]),
    (Trainer, "_finish_current_push", []),
    (Trainer, "_prepare_inputs", ["inputs"]),
    (BaseTuner, "_pre_injection_hook", ["model", "config", "adapter_name"]),
    (BaseTuner, "_create_and_replace", None),
    (BaseTuner, "_mark_only_adapters_as_trainable", ["model"]),
    (BaseTuner, "_enable_adapter_layers", ["enabled"]),
    (BaseTuner, "_check_target_module_compatiblity", ["peft_config", "model", "target_name"]),
    (
        BaseTuner,
        "_get_adapter_state_dict",
        ["model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"],
    ),
    (BaseTuner, "_remove_adapter_name_from_key", ["key", "adapter_name"]),
    (BaseTuner, "_remap_adapter_state_dict_for_load", ["model", "config", "adapter_name", "state_dict"]),
    (BaseTunerLayer, "_all_available_adapter_names", []),
    (BaseTunerLayer, "_move_adapter_to_device_of_base_layer", ["adapter_name", "device"]),
]
# Later than the oldest transformers that is allowed; without it `AroundSteps` computes the norm.
ADDED_LATER = {"_get_grad_norm"}


@pytest.mark.parametrize(("holder", "name", "parameters"), TABLE, ids=lambda v: v if isinstance(v, str) else "")
def test_private_methods_are_where_they_were(holder, name, parameters):
    if name in ADDED_LATER and not hasattr(holder, name):
        assert Version(transformers.__version__) < Version("5.23")
        return
    found = [n for n in inspect.signature(getattr(holder, name)).parameters if n not in ("self", "cls")]
    assert parameters is None or found == parameters


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(hfproj.ProjectionTrainer, Trainer), (ProjectionHeadModel, BaseTuner), (ProjectionLayer, BaseTunerLayer)],
)
def test_every_private_method_that_is_overridden_has_a_row(ours, theirs):
    listed = {name for holder, name, _ in TABLE if holder is theirs}
    own = {name for cls in ours.__mro__ if cls.__module__.startswith("hfproj.") for name in vars(cls)}
    private = {n for n in own if n.startswith("_") and not n.startswith("__") and callable(getattr(theirs, n, None))}
    assert private <= listed
    assert private  # else the search finds nothing


def test_private_attributes():
    assert BaseTuner.uses_shared_state is False  # through it PEFT refuses doors that would lose a LoRA
    assert {"_member_names_", "_member_map_", "_value2member_map_"} <= set(dir(PeftType)) | set(vars(PeftType))
    module = torch.nn.Linear(1, 1)
    assert {"_modules", "_non_persistent_buffers_set"} <= set(vars(module))
    assert issubclass(torch.nn.BatchNorm1d, torch.nn.modules.batchnorm._BatchNorm)
    parameters = inspect.signature(hub.cached_files).parameters
    for kind in ("missing_entries", "gated_repo", "connection_errors"):
        assert f"_raise_exceptions_for_{kind}" in parameters
