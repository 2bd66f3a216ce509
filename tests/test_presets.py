"""Every preset builds; one of each objective and each regularizer trains; recipes take them as flags."""

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from torch import nn

import hfproj
from hfproj import cli
from hfproj.features import CachedFeatures
from hfproj.heads import HEADS, create_head
from hfproj.objectives import OBJECTIVES
from hfproj.presets import all_presets

PRESETS = all_presets()
from hfproj.regularizers import create_regularizer, weighted

WIDTH, NARROW, OUT, BATCH = 32, 16, 8, 16
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "simclr_vit.py"
PIXELS = {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
every_preset = pytest.mark.parametrize("name", PRESETS)

PUBLISHED = {
    "simclr", "simclr_v2", "moco_v2", "moco_v3", "byol", "simsiam", "barlow_twins", "vicreg",
    "swav", "dino", "nnclr", "w_mse", "zero_cl", "zero_cl_instance", "directclr", "simcse_unsupervised",
    "simcse_supervised", "supcon", "siglip", "lejepa", "deepcluster_v2", "dcl", "dclw", "align_uniform",
}  # fmt: skip
# the published tables: hidden and output width, learning rate and weight decay at a batch of 256
CIFAR = {
    "simclr": (2048, 256, 0.4, 1e-4),
    "byol": (4096, 256, 1.0, 1e-5),
    "simsiam": (2048, 2048, 0.5, 1e-5),
    "barlow_twins": (2048, 2048, 0.3, 1e-4),
    "vicreg": (2048, 2048, 0.3, 1e-4),
    "moco_v2_plus": (2048, 256, 0.3, 1e-4),
    "swav": (2048, 128, 0.6, 1e-6),
    "w_mse": (1024, 64, 2e-3, 1e-6),
    "supcon": (2048, 256, 0.4, 1e-5),
    "nnclr": (2048, 256, 0.4, 1e-5),
    "moco_v3": (4096, 256, 0.3, 1e-6),
    "dino": (2048, 256, 0.3, 1e-6),
    "zero_cl": (2048, 2048, 0.3, 1e-4),  # its official script's
}
PAPER_3 = [f"inside_projector_{head}{added}" for head in ("simclr", "no_projector", "directclr", "constant_subvector")
           for added in ("", "_werank", "_last_layer")]  # fmt: skip
PAPER_3 += [f"inside_projector_constant_{d0}_{c}" for d0 in (200, 400, 480) for c in ("zero", "inverse_sqrt", "one")]
PAPER_4 = [f"bottleneck_{method}{changed}{data}" for method in ("simclr", "barlow_twins")
           for changed in ("", "_bottleneck", "_discretised", "_sparse") for data in ("", "_imagenet100")]  # fmt: skip


def narrow(head, options, out_dim=None):
    """Return the options and the output width of `head` with everything wide made narrow."""
    known, options = HEADS.options(head), {**options}

    def is_wide(name, value=None):
        value = options.get(name, known[name].default if name in known else None) if value is None else value
        return isinstance(value, int) and value > NARROW

    options |= {name: NARROW for name in ("hidden_dim", "width") if is_wide(name)}
    for inner, its in (("head", "head_options"), ("stem", "stem_options")):
        name = options.get(inner, known[inner].default if inner in known else None)
        if name is not None:
            options[its], width = narrow(name, options.get(its) or {}, out_dim)
            out_dim = out_dim or width
    if is_wide("out_dim", out_dim) or is_wide("out_dim"):
        options.pop("out_dim", None)
        out_dim = OUT
    return options, out_dim


def small_model(preset, backbone=None, **config):
    """Return a preset's adapter on a backbone of 32 features, with narrow layers and few prototypes."""
    options, out_dim = narrow(preset.head, preset.head_options, preset.out_dim)
    changes = {"head_options": options, "out_dim": out_dim}
    if preset.predictor:
        own = {**preset.predictor}
        name = own.pop("head")
        classes = {"out_dim": own["out_dim"]} if preset.objective["name"] == "cross_entropy" else {}
        changes["predictor"] = {"head": name, **narrow(name, own)[0], **classes}
    if isinstance(preset.prototypes, dict):
        changes["prototypes"] = {**preset.prototypes, "count": 20}
    elif preset.prototypes:
        changes["prototypes"] = 20
    return get_peft_model(backbone or hfproj.FeatureBackbone(WIDTH), preset.config(**changes, **config))


def small_objective(preset):
    few = {"queue_size": 2 * BATCH, "w_size": BATCH, "slices": 16}
    objective = {name: few.get(name, value) for name, value in preset.objective.items()}
    if preset.objective["name"] == "deepcluster_v2":
        objective["prototypes"] = [4, 4]
    return objective


def first_of_each(kind):
    """Return a preset's name for each objective or regularizer that presets have."""
    found = {}
    for name, preset in PRESETS.items():
        for key in [preset.objective["name"]] if kind == "objective" else preset.regularizers:
            found.setdefault(key, name)
    return found


def test_every_published_setting_is_there():
    assert set(PRESETS) >= PUBLISHED
    assert {f"{name}_cifar" for name in CIFAR} == {name for name in PRESETS if name.endswith("_cifar")}
    assert {*PAPER_3, *PAPER_4, "werank_last_layer", "sparsehead_simclr", "sparsehead_byol"} <= set(PRESETS)
    kappas = {n: p.head_options["kappa"] for n, p in PRESETS.items() if p.head == "reweight"}
    assert kappas == {
        "reweighting_supcon_reweight": 1.5, "reweighting_supervised_reweight": 1.2, "reweighting_simclr_reweight": 1.05,
    }  # fmt: skip
    heads = [PRESETS[name].head_options for name in PRESETS if name.startswith("geometry_collapse")]
    assert sorted((head["activation"], "norm" not in head) for head in heads) == [
        ("gelu", False), ("identity", False), ("relu", False), ("relu", True), ("silu", False), ("silu", True),
    ]  # fmt: skip
    tracked = [PRESETS[f"geometry_hessian_{name}"] for name in ("normal_silu", "collapsed_silu", "collapsed_relu")]
    assert [run.head_options["activation"] for run in tracked] == ["silu", "silu", "relu"]
    assert ["--init normal" in run.source for run in tracked] == [True, False, False]
    grid = [PRESETS[name].head_options for name in PAPER_3 if name.startswith("inside_projector_constant_4")]
    constants = (0.0, "inverse_sqrt", 1.0)
    assert [(o["d0"], o["constant"]) for o in grid] == [(d0 / 512, c) for d0 in (400, 480) for c in constants]
    assert [PRESETS[f"geometry_depth_{d}"].head_options["depth"] for d in (1, 2, 3)] == [1, 2, 3]


@every_preset
def test_names_and_options_exist(name, tmp_path):
    preset = hfproj.get_preset(name)
    config = preset.config()
    options = {**preset.objective}
    objective_name = options.pop("name")
    if "num_images" in OBJECTIVES.options(objective_name):
        options["num_images"] = 3000
    objective = hfproj.create_objective(objective_name, **options)
    parts = {"prediction": config.predictor, "scores": config.prototypes, "scales": config.scales}
    for part, given in parts.items():
        classifier = part == "prediction" and objective_name == "cross_entropy"  # it may have one, and need not
        assert (part in objective.needs) == (given is not None and not classifier)
    for regularizer, value in preset.regularizers.items():
        weighted(regularizer, value)
    views = hfproj.ImageViews(**PIXELS, **preset.views)
    fewest, most = objective.views
    if not name.startswith("simcse"):  # sentences
        assert fewest <= views.num_views + views.local_views <= (most or math.inf)
    arguments = hfproj.ProjectionTrainingArguments(output_dir=str(tmp_path), report_to="none", **preset.training)
    assert arguments.lars or arguments.optim in ("adamw_torch_fused", "adamw_torch", "sgd")
    assert preset.source.strip().endswith(".")
    assert "\n" not in preset.line + preset.source


@every_preset
def test_heads_of_published_width(name):
    """Built without memory, for a representation of 2048."""
    config = hfproj.get_preset(name).config()
    with torch.device("meta"):
        width = {} if config.out_dim is None else {"out_dim": config.out_dim}
        head = create_head(config.head, in_dim=2048, **config.head_options, **width)
        if config.predictor:
            options = {"out_dim": head.out_dim, **config.predictor}
            predicted = create_head(options.pop("head"), in_dim=head.out_dim, **options).out_dim
            assert predicted == (20 if name.startswith("reweighting_supervised") else head.out_dim)
    if name.removesuffix("_cifar") in CIFAR and name.endswith("_cifar"):
        hidden, out, learning_rate, weight_decay = CIFAR[name.removesuffix("_cifar")]
        assert (head.hidden[0].linear.out_features, head.out_dim) == (hidden, out)
        training = hfproj.get_preset(name).training
        assert (training["learning_rate"], training["weight_decay"]) == (learning_rate, weight_decay)


@every_preset
def test_small_models_are_built(name):
    model = small_model(PRESETS[name])
    out = model(torch.randn(4, WIDTH))
    assert out.projection.shape[0] == 4
    assert out.projection.isfinite().all()


def small_images(labels):
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=20)})
    pixels = [Image.fromarray(one) for one in rng.integers(0, 256, (BATCH, 16, 16, 3), dtype=np.uint8)]
    return datasets.Dataset.from_dict({"image": pixels, "label": labels}, features=features)


@every_preset
def test_a_step_of_training(name, tmp_path):
    """With its own optimizer, views, head, predictor and regularizers, on a narrow ResNet; texts as cached features."""
    preset = PRESETS[name]
    own = {**preset.training, "max_steps": 1, "warmup_steps": 0.0, "per_device_train_batch_size": BATCH}
    own = {"learning_rate": 1e-3, **own, "logging_steps": 1.0, "log_representation": False, "use_cpu": True}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = hfproj.ProjectionTrainingArguments(output_dir=str(tmp_path), **own, **quiet)
    of_texts = name.startswith("simcse")
    if of_texts:
        model = small_model(preset)
        data = CachedFeatures(torch.randn(BATCH, 4, WIDTH), torch.arange(BATCH) % 4)
        views = hfproj.FeatureViews(3 if preset.objective.get("hard_negatives") else 2)
    else:
        backbone = hfproj.load_backbone("timm/resnet18", pretrained=False, stem="cifar", width=1 / 16)
        model = small_model(preset, backbone, trainable="full", keep_original=False)
        data = small_images([i % 4 for i in range(BATCH)])
        small = {"size": 16, **({"local_size": 8} if preset.views.get("local_views") else {})}
        views = hfproj.ImageViews.for_model(model, **{**preset.views, **small})
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    run = hfproj.ProjectionTrainer(
        model, arguments, objective=small_objective(preset), regularizers=preset.regularizers, train_dataset=data,
        data_collator=views, eval_collator=hfproj.EvalFeatures() if of_texts else None,
    )  # fmt: skip
    run.train()
    assert math.isfinite(run.state.log_history[0]["loss"])
    changed = [not torch.equal(a, b) for a, b in zip(before, (p for p in model.parameters() if p.requires_grad))]
    assert sum(changed) > len(changed) / 4  # what lies before a BatchNorm that begins at 0 has no gradient yet


FROM_SCRATCH = [name for name, preset in PRESETS.items() if (preset.backbone or {}).get("pretrained") is False]


def test_the_backbone_that_a_preset_was_published_for():
    on_cifar = [name for name in FROM_SCRATCH if PRESETS[name].backbone.get("stem") == "cifar"]
    assert len(on_cifar) > 62
    model = PRESETS["simclr_cifar"].load_backbone(width=0.125)
    assert (model.conv1.kernel_size, model.conv1.stride, model.num_features) == ((3, 3), (1, 1), 64)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 64)
    assert isinstance(model.maxpool, nn.Identity)
    with pytest.raises(hfproj.UsageError, match="published for none with a name"):
        PRESETS["siglip"].load_backbone()
    with torch.device("meta"):
        for backbone in {json.dumps(PRESETS[name].backbone): PRESETS[name].backbone for name in FROM_SCRATCH}.values():
            assert hfproj.load_backbone(**backbone).num_features in (384, 512, 2048)


def test_an_adapter_on_it_comes_back_with_its_backbone(tmp_path):
    torch.manual_seed(0)
    preset = PRESETS["simclr_cifar"]
    model = small_model(preset, preset.load_backbone(width=0.125), trainable="full", keep_original=False)
    x = torch.randn(4, 3, 16, 16)
    model.train()(x)  # BatchNorm's statistics move
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again = hfproj.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(x).projection, model.eval()(x).projection)


def test_werank_on_the_last_layer_is_the_orthogonality_of_that_layer():
    head = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    values, gradients = [], []
    for preset in ("werank_last_layer", "inside_projector_simclr_last_layer"):
        ((name, options),) = hfproj.get_preset(preset).regularizers.items()
        options = {**options}
        assert options.pop("weight") == 1.0
        h = torch.randn(2, 3, 6)
        values.append(create_regularizer(name, **options)(head, h, head(h)))
        gradients.append(torch.autograd.grad(values[-1], head[2].weight)[0])
    w = head[2].weight.detach()
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], (w @ w.T - torch.eye(4)).square().sum())
    torch.testing.assert_close(gradients[0], 4 * (w @ w.T - torch.eye(4)) @ w)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_list_is_sorted_with_a_line_each():
    listed = hfproj.list_presets()
    assert list(listed) == sorted(PRESETS)
    assert all(listed.values())
    assert len(set(listed.values())) == len(listed)


def test_unknown_names_suggest():
    with pytest.raises(hfproj.UsageError, match=r"Unknown preset 'simclr_cifr'\. Did you mean 'simclr_cifar'"):
        hfproj.get_preset("simclr_cifr")


def test_a_preset_is_not_changed_through_its_config():
    config = PRESETS["bottleneck_simclr_discretised"].config(out_dim=4)
    config.head_options["head_options"]["depth"] = 7
    assert PRESETS["bottleneck_simclr_discretised"].head_options["head_options"] == {}


# As flags of the recipe


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_of_presets", RECIPE)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def parse(recipe, patch, *flags):
    patch.setattr("sys.argv", ["recipe.py", *map(str, flags)])
    return cli.parse(recipe.Recipe, recipe.Training, defaults=cli.preset_flags)


@every_preset
def test_flags_say_what_the_preset_says(name, recipe):
    preset, flags = PRESETS[name], cli.preset_flags(["--preset", name])
    known = {field.name for cls in (recipe.Recipe, recipe.Training) for field in dataclasses.fields(cls) if field.init}
    assert set(flags) <= known
    options = cli.options(flags["objective_options"])
    temperature = {"temperature": flags["temperature"]} if "temperature" in flags else {}
    as_json = json.loads(json.dumps(preset.objective))
    assert {"name": flags["objective"], **options, **temperature} == as_json
    assert cli.options(flags["regularizers"]) == preset.regularizers
    assert {**flags, **preset.training} == flags
    crop = cli.options(flags["views"]).get("scale", (flags.get("crop_scale"), 1.0))
    assert tuple(crop) == preset.views.get("scale", (0.08, 1.0))


def test_a_flag_replaces_a_value_of_the_preset(recipe, monkeypatch):
    given, training = parse(recipe, monkeypatch, "--preset", "simclr_cifar", "--temperature", 0.5, "--lars", "false")
    assert (given.temperature, given.objective_options) == (0.5, "{}")
    assert (training.lars, training.learning_rate, training.patch_dropout) == (False, 0.4, 0.0)
    given, _ = parse(recipe, monkeypatch, "--preset=reweighting_supcon_waterbirds", "--hidden_dim", 64)
    assert (given.hidden_dim, given.head_depth, given.out_dim) == (64, 2, 2048)


def test_another_objective_or_head_leaves_the_options_of_the_presets_own_out(recipe, monkeypatch):
    given, _ = parse(recipe, monkeypatch, "--preset", "nnclr_cifar", "--objective", "vicreg")
    assert (given.objective, given.objective_options, given.predictor, given.head) == ("vicreg", None, None, "nnclr")
    given, _ = parse(recipe, monkeypatch, "--preset", "directclr", "--head", "mlp")
    assert (given.objective, given.head, given.head_options) == ("info_nce", "mlp", None)
