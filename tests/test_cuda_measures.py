"""Diagnostics, geometry and probes of tensors and models on a GPU: the numbers of the CPU."""

import math

import pytest
import torch
from cases import make_backbone, make_config, perturb
from cuda_device import CUDA, assert_on_device, assert_same, on
from cuda_device import DEVICE as device
from diagnostics.features import KINDS, MEASURES, numbers
from geometry.geometry_cases import double, two_layers
from peft import get_peft_model
from probes.knn_cases import CASES as BANKS
from probes.probe_cases import CASES, training_set
from probes.test_finetune import PIXELS, images, probe

import hfproj
from hfproj import diagnostics as d
from hfproj import features
from hfproj import geometry as g
from hfproj import probes as p
from hfproj.diagnostics import SpectrumState, ViewState
from hfproj.probes import PROBES

SHAPE = (40, 12)  # rows, dimensions
# Of the other kinds some measures are a quotient of roundings, which differ from machine to machine.
SMOOTH = ("decaying", "fewer rows than dimensions", "heavy-tailed", "zero rows")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MEASURES)
def test_diagnostics(kind, name):
    """Direct, and from a state that takes in parts; where rows have no spectrum both refuse, or both do not."""
    f, measure = KINDS[kind](*SHAPE), MEASURES[name]
    found = {}
    for place in (device, "cpu"):
        rows = on(f, place)
        state = SpectrumState(normalize=measure.normalize)
        for part in rows.split(9):
            state.update(part)
        found[str(place)] = [
            numbers(lambda rows=rows: measure.direct(rows)).cpu(),
            numbers(lambda state=state: measure.streamed(state)).cpu(),
        ]
    own, expected = found[str(device)], found["cpu"]
    assert [x.shape for x in own] == [x.shape for x in expected]
    if kind in SMOOTH:
        for x, y in zip(own, expected):
            scale = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9 * max(scale, 1e-3), equal_nan=True)


FUNCTIONS = {
    "uniformity": lambda f: d.uniformity(f),
    "coherence": lambda f: d.coherence(f),
    "lidar": lambda f: d.lidar(f[:36].reshape(12, 3, -1), ridge=1e-4),
    "clusters, prequential": lambda f: d.cluster_learnability(f, clusters=4),
    "clusters, split": lambda f: d.cluster_learnability(f, clusters=4, protocol="split"),
    "clid": lambda f: d.clid(f),
    "mutual information": lambda f: d.matrix_mutual_information(f, f[:, :5]),
    "feature weights": lambda f: d.feature_weights(f, f[:, :3]),
    "layers": lambda f: d.layer_inequality({"h": f, "z": f[:, :4]}),
    "cka": lambda f: features.linear_cka(f, f[:, :5]),
    "cka, unbiased": lambda f: features.linear_cka(f, f[:, :5], unbiased=True),
    "mutual knn": lambda f: features.mutual_knn(f, f[:, :5], k=4),
}
VIEWS = {
    "alignment": lambda z: d.alignment(z),
    "positive cosine": lambda z: d.positive_cosine(z),
    "lidar of views": lambda z: d.lidar_of_views(z),
    "information": lambda z: d.information_bounds(z, z[..., :3]),
}


@pytest.mark.filterwarnings("ignore:.*LiDAR.*:UserWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_features(name):
    f = KINDS["decaying"](*SHAPE)
    assert_same(FUNCTIONS[name](on(f)), FUNCTIONS[name](f), rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*LiDAR.*:UserWarning")
@pytest.mark.parametrize("name", VIEWS)
def test_functions_of_views(name):
    z = double(3, 30, 6) + 2 * double(30, 6, seed=1)
    assert_same(VIEWS[name](on(z)), VIEWS[name](z), rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*LiDAR.*:UserWarning")
def test_states_move_between_devices():
    """A state of the GPU is saved, loaded and merged with one of the CPU, and the other way about."""
    f, z = KINDS["decaying"](*SHAPE), double(3, 30, 6) + 2 * double(30, 6, seed=1)
    whole, of_views = SpectrumState().update(f), ViewState().update(z)
    for first, second in ((device, "cpu"), ("cpu", device)):
        state = SpectrumState().update(on(f[:25], first))
        again = SpectrumState()
        again.load_state_dict({n: t.cpu() for n, t in state.state_dict().items()})
        again.update(on(f[25:], second))
        merged = state + SpectrumState().update(on(f[25:], second))
        for found in (again, merged):
            assert_same(found.singular_values(), whole.singular_values(), rtol=1e-8, atol=1e-9)
        views = ViewState().update(on(z[:, :20], first)) + ViewState().update(on(z[:, 20:], second))
        assert_same([views.lidar(), views.alignment()], [of_views.lidar(), of_views.alignment()], rtol=1e-8, atol=1e-9)
        assert state.reduce().count == 25


def losses(z):
    return (z.square().sum(1) - 1).square() + z[:, 0]


GEOMETRY = {
    "jacobian": lambda head, h: g.jacobian(head, h),
    "pullback": lambda head, h: g.pullback_metric(head, h).J,
    "metric spectrum": lambda head, h: g.metric_spectrum(head, h),
    "metric condition": lambda head, h: g.metric_condition_number(head, h),
    "layers": lambda head, h: g.layerwise_condition_number(head, h),
    "metric variation": lambda head, h: g.metric_variation(head, h),
    "degeneracy": lambda head, h: g.metric_degeneracy(head, h, h.flip(0)),
    "overlap": lambda head, h: g.bottom_overlap(head, h, h.flip(0)),
    "effective hessian": lambda head, h: g.effective_hessian(head, losses, h),
    "effective hessian of a joint loss": lambda head, h: g.effective_hessian(head, lambda z: losses(z).mean(), h[:3]),
    "report": lambda head, h: g.collapse_report(head, losses, h),
    "orbits": lambda head, h: g.orbit_metrics(g.head_orbits(head, h.view(2, 3, 2, -1))),
    "orbits of one class": lambda head, h: g.orbit_metrics(h.view(1, 3, 4, -1)),
    "curvature": lambda head, h: g.local_curvature(h.view(2, 6, -1)),
    "whitening": lambda head, h: g.whitening_score(h.T @ h),
    "invariants": lambda head, h: g.linear_invariant(head.hidden[0].linear.weight.detach(), head.last.linear.weight),
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name):
    head, h = two_layers("silu", 6, 8, 3), double(12, 6)
    assert_same(GEOMETRY[name](on(head), on(h)), GEOMETRY[name](head, h), rtol=1e-8, atol=1e-9)


def test_constructed_equilibrium():
    head, h = on(two_layers("silu", 6, 12, 9)), on(double(12, 6))
    found = g.constructed_equilibrium(head, h)  # which of the residuals without effect depends on the SVD's routine
    assert_on_device(*found)
    assert (found.J.mT @ found.rho.unsqueeze(2)).abs().max() < 1e-12
    torch.testing.assert_close(found.rho.norm(dim=1).cpu(), torch.ones(12, dtype=torch.float64))


def products(place):
    head, h = on(two_layers("silu", 6, 8, 3), place), on(double(12, 6), place)
    operators = [
        g.EffectiveHessianOperator(head, lambda z: losses(z).mean(), h),
        g.HessianOperator(lambda: losses(head(h)).mean(), head),
    ]
    found = []
    for operator in operators:
        v = on(double(operator.dim, seed=3), place)
        found += [operator.loss, operator.gradient, operator.matvec(v), operator.dense()]
        for options in ({"vectors": True}, {"basis": 20}, {"method": "power", "steps": 5}):
            ends = g.extreme_eigenvalues(operator.matvec, operator.dim, device=place, **options)
            found += [ends.min, ends.max]
    return found


def test_hessian_products_and_lanczos():
    found = products(device)
    assert_on_device(*(value for value in found if isinstance(value, torch.Tensor)))
    assert_same(found, products("cpu"), rtol=1e-6, atol=1e-8)  # Lanczos stops at 1e-6 of the spectral radius


def test_gradient_flow():
    def end(place):
        head, h = on(two_layers("tanh", 6, 8, 3), place), on(double(12, 6), place)
        flow = g.gradient_flow(lambda z: losses(z).mean(), h[:, :3].clone(), time=1.0)
        assert next(head.parameters()).device.type == torch.device(place).type
        return flow.params

    found = end(device)
    assert_on_device(found)
    assert_same(found, end("cpu"), rtol=1e-5, atol=1e-6)  # of its own steps' tolerance


@pytest.mark.parametrize("name", BANKS)
def test_nearest_neighbours(name):
    bank, labels, queries = BANKS[name]()
    found = p.KNNProbe(k=(5, 20)).fit(on(bank), on(labels))
    expected = p.KNNProbe(k=(5, 20)).fit(bank, labels)
    near, its = found.neighbours(on(queries)), expected.neighbours(queries)
    torch.testing.assert_close(near.cosines, its.cosines, rtol=0, atol=1e-12)
    differ = near.rows != its.rows  # only where two rows are equally near up to float64's rounding
    assert (its.cosines - near.cosines)[differ].abs().le(1e-12).all()
    if name in ("random", "float64", "offset", "labels are any integers", "unbalanced", "one a class", "one row"):
        assert not differ.any()
        assert found.predict(on(queries)).equal(expected.predict(queries))
        assert len(bank) == 1 or found.score_leave_one_out() == expected.score_leave_one_out()


ROWS_PROBES = {
    **{n: {"name": n, **o} for n, o in CASES.items() if getattr(PROBES.get(n), "on", "features") != "model"},
    "linear, chosen strength": {"name": "linear"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROWS_PROBES)
def test_probes(name, dtype):
    """Features and labels on the GPU; the draws are those of the CPU."""
    row = ROWS_PROBES[name]
    f, y = training_set(getattr(PROBES.get(row["name"]), "on", "features"))
    f = f.to(dtype)
    found, expected = (p.create_probe(**row).fit(part, labels) for part, labels in ((on(f), on(y)), (f, y)))
    pairs = ((found, on(f)), (expected, f)) if hasattr(found, "predict") else ()
    predicted = [part.predict(rows) for part, rows in pairs]
    assert all(part.device.type == "cpu" for part in predicted)
    score, its_score = found.score(on(f), on(y)), expected.score(f, y)
    if dtype == torch.float64:
        assert score == pytest.approx(its_score, abs=1e-9)
        assert not predicted or predicted[0].equal(predicted[1])
    else:  # a label may differ where two classes are as likely
        assert score == pytest.approx(its_score, abs=2 / len(f))
    assert math.isfinite(found.results_["value"])


def test_group_robust_probe():
    f, y = training_set()
    groups = torch.arange(len(f)) % 2
    scores = [
        p.GroupRobustProbe(draws=2).fit(rows, labels, parts).score(rows, labels, parts)
        for rows, labels, parts in (on((f.double(), y, groups)), (f.double(), y, groups))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
def test_fine_tuning(precision):
    model = get_peft_model(make_backbone("vit"), make_config("vit", "lora"))
    perturb(model)
    model = on(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.cuda.get_rng_state() if CUDA else torch.get_rng_state()
    tuned = probe(precision=precision, augmentation=None, epochs=20).fit(model, images(18))
    assert tuned.score(images(9, seed=1)) > 0.8  # by chance: a third
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.cuda.get_rng_state() if CUDA else torch.get_rng_state())


@pytest.mark.parametrize("name", ["vit", "timm_vit", "timm_cnn", "dinov2_registers"])
def test_extracted_features(name, tmp_path):
    """float32 as on the CPU, bfloat16 near it; all on the CPU, and the same again from the cache."""
    model = get_peft_model(make_backbone(name), make_config(name, "lora"))
    perturb(model)
    data, collator = images(11), hfproj.EvalImages(**PIXELS)
    options = {"batch_size": 4, "collator": collator, "layers": "all" if "cnn" not in name else (), "tokens": True}
    expected = hfproj.extract_features(model, data, **options)
    moved = on(model)
    found = hfproj.extract_features(moved, data, **options)
    assert found.h.device.type == found.z.device.type == found.tokens.device.type == "cpu"
    for part, its in ((found.h, expected.h), (found.z, expected.z), (found.tokens, expected.tokens)):
        torch.testing.assert_close(part, its, rtol=1e-3, atol=1e-4 * its.abs().max().item())
    assert found.labels.equal(expected.labels)
    mixed = hfproj.extract_features(moved, data, **options, autocast=torch.bfloat16)
    assert (mixed.h - expected.h).norm() < 0.05 * expected.h.norm()
    cached = [hfproj.extract_features(moved, data, **options, cache_dir=tmp_path) for _ in range(2)]
    assert cached[0].h.equal(cached[1].h)
    torch.testing.assert_close(cached[0].h, found.h, rtol=1e-5, atol=1e-5 * found.h.abs().max().item())


def test_evaluate_and_watched_measures():
    model = on(get_peft_model(make_backbone("vit"), make_config("vit", "lora")))
    results = hfproj.evaluate(
        model, probes=[p.KNNProbe(k=3), p.LinearProbe(l2=1e-2)], train=images(18), test=images(9, seed=1),
        collator=hfproj.EvalImages(**PIXELS), views=hfproj.ImageViews(**PIXELS), dataset="squares",
    )  # fmt: skip
    assert all(math.isfinite(found.value) for found in results.measurements)
    assert next(model.parameters()).device.type == device.type
