"""What every objective promises, from the table of cases: finite values at the edges, half precision, saved buffers."""

import copy

import pytest
import torch
from distributed.methods import IN_DIM, given, make
from objectives.objective_cases import CASES, OUT_DIM

from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.objectives import OBJECTIVES, create_objective, list_objectives
from hfproj.objectives.base import Step, check_call
from hfproj.objectives.buffers import load_buffers, save_buffers

every_case = pytest.mark.parametrize("name", CASES)


def rows_of(case):
    return case.rows or 9


def call(case, objective, z, without=None):
    """Call an objective on projections alone: predictions, targets and scores are made from z."""
    batch = z.shape[1]
    generator = torch.Generator().manual_seed(0)
    count = case.prototypes["count"] if isinstance(case.prototypes, dict) else case.prototypes
    prototypes = torch.nn.functional.normalize(torch.randn(count or 2, z.shape[-1], generator=generator), dim=-1)
    scores = torch.nn.functional.normalize(z.float(), dim=-1) @ prototypes.T
    targets = scores if getattr(objective, "target_of", "projection") == "scores" else z
    keywords = {
        "labels": torch.arange(batch) % 3,
        "index": torch.arange(batch),
        "prediction": z + 0,
        "scores": scores,
        "prototypes": prototypes,
        "scales": {name: torch.tensor(value) for name, value in getattr(objective, "scales", {}).items()},
        "target": targets.detach()[: getattr(objective, "target_views", None)],
        "step": Step.at(0, 1, 0.5),
    }
    return objective(z, **{n: v for n, v in keywords.items() if n != without})


def test_the_table_has_every_objective():
    assert {case.name for case in CASES.values()} == set(list_objectives())


@every_case
@pytest.mark.parametrize("kind", ["collapsed", "duplicated", "zero", "huge", "tiny"])
def test_edges_are_finite_in_value_and_gradient(name, kind):
    case = CASES[name]
    objective = create_objective(case.name, **case.options)
    z = torch.randn(case.views, rows_of(case), OUT_DIM)
    if kind == "collapsed":
        z = torch.ones_like(z)
    elif kind == "duplicated":
        z[:, 1::2] = z[:, ::2][:, : z[:, 1::2].shape[1]]
    elif kind == "zero":
        z = torch.zeros_like(z)
    else:
        z = z * (1e4 if kind == "huge" else 1e-4)
    z.requires_grad_()
    if name == "w_mse" and kind in ("collapsed", "zero"):  # a covariance without an inverse: no whitening exists
        with pytest.raises(UsageError, match="singular"):
            call(case, objective, z)
        return
    loss, terms = call(case, objective, z)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value) for value in terms.values())
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, z)
        assert gradient.isfinite().all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_what_their_values_give_in_float32(name, dtype):
    case = CASES[name]
    z = torch.randn(case.views, rows_of(case), OUT_DIM).to(dtype)
    found = call(case, create_objective(case.name, **case.options), z)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = call(case, create_objective(case.name, **case.options), z.float())
    expected = call(case, create_objective(case.name, **case.options), z.float())
    assert found.loss.dtype == under_autocast.loss.dtype == torch.float32
    # The scores of a half-precision z are made outside the objective; what it computes itself is float32.
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-4)
    if "scores" not in getattr(create_objective(case.name, **case.options), "needs", ()):
        torch.testing.assert_close(under_autocast.loss, expected.loss, rtol=1e-5, atol=1e-5)


@every_case
@pytest.mark.parametrize("batch", [7, 12])
def test_other_batch_sizes_and_widths(name, batch):
    case = CASES[name]
    options = dict(case.options)
    if case.rows:  # sub-batches and inverted covariances have sizes of their own
        batch = case.rows
    changes = {"out_dim": 3, "queue_size": 2 * batch, "num_images": 24}
    options |= {option: value for option, value in changes.items() if options.get(option)}
    loss, _ = call(case, create_objective(case.name, **options), torch.randn(case.views, batch, 3))
    assert torch.isfinite(loss)


@every_case
def test_buffers_are_saved_and_loaded(name, tmp_path):
    """Two batches with the buffers that were saved after the first equal two batches without a stop."""
    case = CASES[name]
    torch.manual_seed(1)
    network, objective, _ = make(case)
    batches = torch.randn(3, case.views, rows_of(case), IN_DIM, dtype=torch.float64)

    def loss_of(objective, x, i):
        out = network(x)
        target = out["scores"] if getattr(objective, "target_of", "") == "scores" else out["projection"]
        step = Step.at(0, i, float(i))
        if hasattr(objective, "on_epoch_start"):
            objective.on_epoch_start(step)
        keywords = given(
            objective, out, target.detach()[: getattr(objective, "target_views", None)],
            labels=torch.arange(x.shape[1]) % 3, index=torch.arange(x.shape[1]), step=step,
            prototypes=network.modules_.prototypes,
        )  # fmt: skip
        return objective(out["projection"], **keywords).loss

    network.eval()  # so that only the objective has a memory
    loss_of(objective, batches[0], 0)
    save_buffers(objective, tmp_path)
    again = create_objective(case.name, **case.options).double()
    load_buffers(again, tmp_path, hint="")
    for i in (1, 2):
        assert torch.equal(loss_of(objective, batches[i], i), loss_of(again, batches[i], i))
    assert all(torch.equal(b, dict(again.named_buffers())[n]) for n, b in objective.named_buffers())


@every_case
def test_what_it_needs_is_asked_for(name):
    case = CASES[name]
    objective = create_objective(case.name, **case.options)
    z = torch.randn(case.views, rows_of(case), OUT_DIM)
    for missing in sorted(objective.needs):
        with pytest.raises(UsageError, match=rf"needs '{missing}', which is missing: .*"):
            call(case, objective, z, without=missing)


@every_case
def test_the_number_of_views_is_checked(name):
    case = CASES[name]
    objective = create_objective(case.name, **case.options)
    fewest, most = objective.views
    for count in {fewest - 1, fewest if most is None else most + 1} - {0, fewest}:
        with pytest.raises(UsageError, match=rf"needs .* views of each image, got {count}"):
            call(case, objective, torch.randn(count, rows_of(case), OUT_DIM))


@every_case
def test_it_has_buffers_only_and_is_copied_whole(name):
    case = CASES[name]
    objective = create_objective(case.name, **case.options)
    assert not list(objective.parameters())
    assert objective.created == {"name": case.name, **case.options}
    assert copy.deepcopy(objective).state_dict().keys() == objective.state_dict().keys()
    assert distributed.world_size() == 1


@pytest.mark.parametrize("name", list_objectives())
def test_options_that_it_does_not_have(name):
    """Also where an objective has no options at all: nn.Module's own constructor takes any."""
    options = {"num_images": 3000} if name == "deepcluster_v2" else {}
    with pytest.raises(UsageError, match=f"Unknown option of objective '{name}': 'temprature'"):
        create_objective(name, temprature=0.1, **options)


@pytest.mark.parametrize("name", list_objectives())
def test_its_docstring_says_when_to_use_it(name):
    said = [line.strip() for line in (OBJECTIVES.get(name).__doc__ or "").splitlines()]
    assert sum(line.startswith("When to use: ") for line in said) == 1


def test_projections_of_another_shape_are_refused():
    objective = create_objective("nt_xent")
    with pytest.raises(UsageError, match=r"\[views, batch, dim\], got \[9, 4\]"):
        check_call(objective, torch.randn(9, 4))
    with pytest.raises(UsageError, match=r"got list\. .*torch\.stack"):
        check_call(objective, [torch.randn(9, 4)] * 2)


@pytest.mark.parametrize("temperature", [0.01, 10.0])
@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "dcl", "dclw", "supcon", "simcse", "moco", "moco_v3", "nnclr"])
def test_extreme_temperatures(name, temperature):
    case = next(case for case in CASES.values() if case.name == name)
    options = {**case.options, "temperature": temperature}
    z = torch.randn(case.views, 9, OUT_DIM, requires_grad=True)
    loss, _ = call(case, create_objective(name, **options), z)
    exact, _ = call(case, create_objective(name, **options).double(), z.detach().double().requires_grad_())
    torch.testing.assert_close(loss.double(), exact.double(), rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(loss, z)[0].isfinite().all()
