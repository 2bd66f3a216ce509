"""Where the tests of `test_cuda*.py` run, and what all of them do: compare results on the device with the CPU's.

They run on CUDA. `HFPROJ_TEST_DEVICE=cpu` compares the CPU with itself: it shows that the tests run, not that a GPU
gives the same.
"""

import copy
import os
from typing import Any

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # float32 is compared, which cuDNN otherwise rounds in convolutions

import pytest
import torch
from distributed.methods import IN_DIM, given, make
from objectives.objective_cases import OUT_DIM, Case
from torch import Tensor, nn

from hfproj.objectives import create_objective
from hfproj.objectives.base import Step

DEVICE = torch.device(os.environ.get("HFPROJ_TEST_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64, another order of summation

if CUDA and not torch.cuda.is_available():
    pytest.skip("needs a GPU with CUDA", allow_module_level=True)  # of the module that imports this one


def on(value: Any, device: torch.device | str = DEVICE) -> Any:
    """Return a copy of tensors, modules, and containers of them on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True).requires_grad_(value.requires_grad)
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device)
    if isinstance(value, dict):
        return {name: on(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on(part, device) for part in value)
    return value


def flat(value: Any, name: str = "value") -> dict[str, Any]:
    """Return the numbers and tensors of a result by path, tensors on the CPU."""
    if isinstance(value, Tensor):
        return {name: value.detach().cpu()}
    if isinstance(value, bool | int | float | None):
        return {name: value}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: part for key, child in items for path, part in flat(child, f"{name}.{key}").items()}


def assert_same(found: Any, expected: Any, **tolerance: float) -> None:
    """Assert that two results hold the same numbers, wherever their tensors lie."""
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor | float):
            named = lambda text, name=name: f"{name}: {text}"  # noqa: E731
            torch.testing.assert_close(found[name], value, **(tolerance or EXACT), equal_nan=True, msg=named)
        else:
            assert found[name] == value, name


def assert_on_device(*tensors: Tensor) -> None:
    assert {tensor.device.type for tensor in tensors} == {DEVICE.type}


def keywords(case: Case, objective: nn.Module, z: Tensor, step: Step) -> dict[str, Any]:
    """Return what an objective is given beside z; all of it is made of z, in its type."""
    rows = torch.arange(z.shape[1], device=z.device)
    generator = torch.Generator().manual_seed(0)
    count = case.prototypes["count"] if isinstance(case.prototypes, dict) else case.prototypes
    prototypes = nn.functional.normalize(torch.randn(count or 2, z.shape[-1], generator=generator), dim=-1).to(z.device)
    scores = (nn.functional.normalize(z.detach().float(), dim=-1) @ prototypes.T).to(z.dtype)
    targets = scores if getattr(objective, "target_of", "projection") == "scores" else z
    scales = getattr(objective, "scales", {})
    return {
        "labels": rows % 3,
        "index": rows,
        "prediction": z + 0,
        "scores": scores + 0 * z.sum(),
        "prototypes": prototypes,
        "scales": {name: torch.tensor(value, device=z.device) for name, value in scales.items()},
        "target": targets.detach()[: getattr(objective, "target_views", None)],
        "step": step,
    }


def trained(case: Case, device: torch.device | str, steps: int = 2) -> dict[str, Tensor]:
    """Return losses, terms, gradients, parameters and buffers of a few steps in float64 from one and the same start."""
    torch.manual_seed(0)
    network, objective, target = make(case)
    x = torch.randn(steps, case.views, case.rows or 8, IN_DIM, dtype=torch.float64).to(device)
    network, objective, target = (None if part is None else part.to(device) for part in (network, objective, target))
    rows = torch.arange(x.shape[2], device=device)
    result = {}
    for i in range(steps):
        step = Step.at(0, i, i / 2)  # its generator lies on the CPU, so that both draw the same numbers
        if hasattr(objective, "on_epoch_start"):
            objective.on_epoch_start(step)
        out, teacher = network(x[i]), None
        if target is not None:
            seen = target(x[i][: getattr(objective, "target_views", None)])
            teacher = seen["scores" if getattr(objective, "target_of", "") == "scores" else "projection"]
        more = given(
            objective, out, teacher, labels=rows % 3, index=rows, step=step, prototypes=network.modules_.prototypes
        )
        network.zero_grad()
        loss, terms = objective(out["projection"], **more)
        loss.backward()
        result |= {f"loss {i}": loss, **{f"{name} {i}": value for name, value in terms.items()}}
        result |= {f"{name}.grad {i}": p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for p in network.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    return {**result, **network.state_dict(), **{f"objective.{n}": b for n, b in objective.state_dict().items()}}


def projections(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(case.views, case.rows or 9, OUT_DIM).to(dtype)


def loss_of(
    case: Case, z: Tensor, step: Step, autocast: torch.dtype | None = None, full: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of a new objective and its gradient by z: under autocast, or of `full` float32."""
    leaf = z.detach().requires_grad_()
    objective = on(create_objective(case.name, **case.options), leaf.device)
    more = {"z": leaf, **keywords(case, objective, leaf, step)}
    if full:
        more = {n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in more.items()}
    with torch.autocast(leaf.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        loss = objective(more.pop("z"), **more).loss
    return loss, torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else None
