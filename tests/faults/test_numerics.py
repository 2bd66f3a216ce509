"""A finite loss has a finite gradient or is refused, for every objective and regularizer; NaN stays out of memories."""

import functools

import pytest
import torch
from faults import feature_inputs, numeric_inputs
from faults.numeric_inputs import BROKEN, call_objective, leaf, parts_of
from faults.test_bad_images import tried
from objectives.objective_cases import CASES, OUT_DIM
from small import Counting, adapter, head_model, images, trainer
from torch import nn

import hfproj
from hfproj.functional.matrices import eigh, eigvalsh
from hfproj.functional.rows import without_steep_rows
from hfproj.objectives import create_objective
from hfproj.objectives.queue import Queue
from hfproj.tuner.layer import Prototypes

SHARE = 43  # every so many of the tries; all of them with -m long


def test_a_share_of_all_objectives_and_regularizers():
    assert tried(list(numeric_inputs.all_tries())[::SHARE]) == {}


def test_a_share_of_heads_diagnostics_and_probes():
    assert tried(list(feature_inputs.all_tries())[::SHARE]) == {}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["zero_cl", "zero_cl of features and images", "deepcluster_v2", "w_mse", "dino"])
def test_broken_projections_give_no_finite_loss(name, kind):
    case = CASES[name]
    objective = create_objective(case.name, **case.options)
    z = leaf(kind, "float32", case.views, case.rows or 9, OUT_DIM)
    try:
        loss, _ = call_objective(case, objective, parts_of(case, objective), z)
    except hfproj.HfprojError:
        return
    assert not loss.isfinite()
    assert numeric_inputs.unsound(objective) is None


def test_eigenvalues_of_what_has_none_are_nan():
    """LAPACK raises for some, and for others returns finite numbers, such as for one NaN on the diagonal."""
    for value, place in ((torch.nan, (0, 0)), (torch.nan, (0, 1)), (torch.inf, (2, 2)), (torch.inf, (0, 1))):
        matrix = torch.eye(3)
        matrix[place] = matrix.T[place] = value
        assert eigvalsh(matrix).isnan().all()
        assert eigh(matrix)[0].isnan().all()
        assert eigvalsh(torch.stack([torch.eye(3), matrix]))[1].isnan().all()
    assert torch.equal(eigvalsh(torch.eye(3)), torch.ones(3))
    assert torch.equal(eigvalsh(torch.eye(2).expand(4, 2, 2)), torch.ones(4, 2))


@pytest.mark.parametrize("name", ["moco", "moco_v3", "nnclr", "dino", "swav", "byol", "nt_xent", "simsiam"])
def test_float16_has_no_infinite_gradient_of_short_rows(name):
    for kind in ("1e-8", "zeros", "one tiny row"):
        assert numeric_inputs.try_objective(name, kind, "float16") is None


@pytest.mark.parametrize(("name", "scale"), [("w_mse", 1e-6), ("vicreg", 1e3), ("spectral", 1e2)])
def test_a_gradient_beyond_float16_is_refused_unless_a_loss_scaler_asks(name, scale):
    case = CASES[name]
    objective = create_objective(case.name, **case.options)
    z = (numeric_inputs.rows_of("normal", 2, case.rows or 9, OUT_DIM) * scale).half().requires_grad_()
    loss = call_objective(case, objective, parts_of(case, objective), z).loss
    assert loss.isfinite()
    with pytest.raises(hfproj.NonFiniteLossError, match=f"gradient of {type(objective).__name__} is beyond float16"):
        torch.autograd.grad(loss, z, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 65536, z, retain_graph=True)  # which a loss scaler skips
    assert not scaled.isfinite().all()
    (small,) = torch.autograd.grad(loss * 2**-30, z)
    assert small.isfinite().all()


def test_the_guard_changes_no_value_and_watches_one_loss_only():
    z = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    objective = create_objective("vicreg")
    loss, (plain, _) = objective(z).loss, objective.compute(z)
    assert torch.equal(loss, plain)
    (gradient,), (expected,) = torch.autograd.grad(loss, z), torch.autograd.grad(plain, z)
    assert torch.equal(gradient, expected)
    (other,) = torch.autograd.grad((z.float() * 1e30).sum(), z)  # not the objective's
    assert not other.isfinite().any()
    weight = nn.Linear(4, 4).half()
    nn.init.constant_(weight.weight, 100.0)
    steep = hfproj.create_regularizer("orthogonality")(nn.Sequential(weight), None, None)
    with pytest.raises(hfproj.NonFiniteLossError, match="Orthogonality"):
        steep.backward()


def test_short_rows_keep_their_value_and_lose_their_gradient_only():
    """Of rows that are longer nothing changes, to the last bit."""
    x = torch.tensor([[3e-4, 4e-4], [3e-9, 4e-9], [3e-2, 4e-2], [0.0, 0.0]])
    for dtype, kept in (
        (torch.float32, [0, 2]),
        (torch.float64, [0, 2]),
        (torch.float16, [2]),
        (torch.bfloat16, [0, 2]),
    ):
        rows = x.to(dtype).requires_grad_()
        found = without_steep_rows(rows)
        assert torch.equal(found, rows)
        (gradient,) = torch.autograd.grad(found.sum(), rows)
        assert gradient.any(1).nonzero().flatten().tolist() == kept


def test_prototype_logits_of_zero_rows_have_no_gradient():
    """It was 1e11: that of the division by the smallest length that torch divides by."""
    prototypes, z = Prototypes(4, 3), torch.randn(5, 4)
    z[1] = 0
    z.requires_grad_()
    scores = prototypes(z)
    expected = torch.nn.functional.normalize(z, dim=-1) @ torch.nn.functional.normalize(prototypes.weight, dim=-1).T
    assert torch.equal(scores, expected)
    (gradient,) = torch.autograd.grad(scores.square().sum() + scores.sum(), z)
    (other,) = torch.autograd.grad(expected.square().sum() + expected.sum(), z)
    assert not gradient[1].any()
    assert other[1].abs().max() > 1e10
    rest = [0, 2, 3, 4]
    assert torch.equal(gradient[rest], other[rest])


def test_nan_does_not_enter_a_queue():
    queue = Queue(6, 2)
    before = queue.rows.clone()
    queue.push(torch.tensor([[1.0, torch.nan]]))
    assert torch.equal(queue.rows, before)
    assert (queue.pointer.item(), queue.filled.item()) == (0, 0)
    queue.push(torch.ones(2, 2))
    assert (queue.pointer.item(), queue.filled.item()) == (2, 2)
    assert torch.equal(queue.rows[:2], torch.ones(2, 2))


class Poisoned(nn.Module):
    """The views of one step are NaN, as those of a backbone that overflows."""

    def __init__(self, head, step):
        super().__init__()
        self.head, self.step, self.calls = head, step, 0

    def forward(self, h):
        self.calls += 1
        return self.head(h * torch.nan if self.calls == self.step else h)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["a step", "two micro-batches"])
@pytest.mark.parametrize("objective", ["vicreg", "byol"])
def test_running_statistics_in_memory_are_those_before_the_step(tmp_path, objective, options):
    parts = {"predictor": {"head": "mlp", "hidden_dim": 8}} if objective == "byol" else {}
    run = trainer(tmp_path, head_model(**parts), images(16), extra={"objective": objective}, max_steps=3, **options)
    modules = run.model.get_base_model().hfproj.projection_head_modules["default"]
    per_step = options.get("gradient_accumulation_steps", 1)
    modules.head = Poisoned(modules.head, 2 * per_step)
    seen = []
    forward = functools.partial(run.compute_loss)

    def watching(model, inputs, *args, **kwargs):
        if (model.training and len(seen) % per_step == 0) or per_step == 1:
            seen.append({n: b.clone() for n, b in model.named_buffers() if "running" in n})
        else:
            seen.append(seen[-1])
        return forward(model, inputs, *args, **kwargs)

    run.compute_loss = watching
    with pytest.raises(hfproj.NonFiniteLossError, match="step 2"):
        run.train()
    after = {n: b for n, b in run.model.named_buffers() if "running" in n}
    assert after
    assert all(torch.equal(after[n], seen[-1][n]) for n in after)
    assert all(t.isfinite().all() for t in adapter(run.model).values())
    if run.ema is not None:
        assert all(b.isfinite().all() for b in run.ema.module.buffers())


def test_an_infinite_gradient_of_a_finite_loss_is_refused(tmp_path):
    class Steep(Counting):
        def forward(self, z, **others):
            loss, terms = super().forward(z, **others)
            return loss + (z - z.detach()).abs().sum().sqrt(), terms

    with pytest.raises(hfproj.NonFiniteLossError, match="gradient became"):
        trainer(tmp_path, extra={"objective": Steep()}).train()


@pytest.mark.long
def test_all_of_them():
    assert tried(numeric_inputs.all_tries()) == {}
    assert tried(feature_inputs.all_tries()) == {}
