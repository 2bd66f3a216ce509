"""Every objective and regularizer trains a head on cached vit_nano features through the trainer."""

import copy
import math

import pytest
import torch
from objectives.objective_cases import CASES, TRAINED_DIM
from peft import PeftModel, get_peft_model
from regularizers.regularizer_cases import CASES as REGULARIZERS
from thinned import thinned

import hfproj
from hfproj.data import split_off
from hfproj.diagnostics import positive_cosine, rankme

IMAGES, STEPS, BATCH = 512, 30, 64


@pytest.fixture(scope="module")
def cached():
    """Two passes of two augmented views of 512 digits through vit_nano."""
    model = get_peft_model(hfproj.load_backbone("vit_nano"), hfproj.ProjectionHeadConfig(trainable="head"))
    digits, _ = split_off(hfproj.load_image_dataset("digits", split="train"), IMAGES, seed=0)[::-1]
    views = hfproj.ImageViews.for_model(model, flip_probability=0.0)
    return hfproj.cache_features(model, digits, views, passes=2), hfproj.FeatureBackbone.of(model)


class Encoder(torch.nn.Module):
    """A backbone that can be trained, for regularizers that act on it or on h: the identity at first."""

    def __init__(self, dim):
        super().__init__()
        self.linear = torch.nn.Linear(dim, dim)
        torch.nn.init.eye_(self.linear.weight)

    def forward(self, x):
        return self.linear(x)


def train(cached, folder, case, objective, regularizers=None):
    data, backbone = cached
    torch.manual_seed(0)
    if regularizers is not None:
        backbone = Encoder(backbone.in_dim)
    config = hfproj.ProjectionHeadConfig(
        head=case.head,
        head_options=case.head_options,
        out_dim=TRAINED_DIM,
        predictor=case.predictor,
        prototypes=case.prototypes,
        scales=getattr(objective, "scales", None) or None,
        trainable="adapter" if regularizers is None else "full",
        in_dim=data.features.shape[-1],
    )
    run = hfproj.ProjectionTrainer(
        get_peft_model(copy.deepcopy(backbone), config),
        hfproj.ProjectionTrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-3,
            ema_momentum=0.9,
            logging_steps=1.0,
            log_representation=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        objective=objective,
        regularizers=regularizers,
        train_dataset=data,
        data_collator=hfproj.FeatureViews(case.views),
        eval_collator=hfproj.EvalFeatures(),
    )
    before = cosine_and_rank(run.model, data, case.views)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, before, cosine_and_rank(run.model, data, case.views), run


@torch.no_grad()
def cosine_and_rank(model, data, views):
    """Positive-pair cosine and RankMe of z, with BatchNorm statistics of the batch as in training."""
    batch = hfproj.FeatureViews(max(views, 2))([{**data[i], "index": i} for i in range(256)])
    head = model.get_base_model().hfproj.projection_head_modules["default"].head
    state = {n: b.clone() for n, b in head.named_buffers()}
    z = head(torch.stack(batch["views"]))
    for name, buffer in head.named_buffers():
        buffer.copy_(state[name])
    return positive_cosine(z), rankme(z.flatten(0, 1))


@pytest.mark.parametrize("name", thinned([name for name, case in CASES.items() if case.trained]))
def test_every_objective_trains_a_head(cached, tmp_path, name):
    case = CASES[name]
    options = case.options if case.training_options is None else case.training_options
    if case.training_options is None and "out_dim" in options:
        options = {**options, "out_dim": TRAINED_DIM}
    losses, before, after, run = train(cached, tmp_path, case, hfproj.create_objective(case.name, **options))
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    if case.stationary:
        assert sum(losses[-5:]) < sum(losses[:5])
    else:
        assert after[0] > before[0]
    assert after[1] > 1.5
    assert run.model.peft_config["default"].objective == {"name": case.name, **options}


def test_options_that_the_data_decide_are_found_anew(cached, tmp_path):
    """An adapter that is trained further on another number of images gets an objective for that number."""
    data, backbone = cached
    model = get_peft_model(copy.deepcopy(backbone), hfproj.ProjectionHeadConfig(out_dim=TRAINED_DIM))
    args = hfproj.ProjectionTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    views = hfproj.FeatureViews()
    objective = {"name": "deepcluster_v2", "prototypes": 4}
    first = hfproj.ProjectionTrainer(model, args, objective=objective, train_dataset=data, data_collator=views)
    assert len(first.objective.filled) == IMAGES
    assert model.peft_config["default"].objective == objective
    fewer = hfproj.CachedFeatures(data.features[:100], data.labels[:100])
    again = hfproj.ProjectionTrainer(model, args, train_dataset=fewer, data_collator=views)
    assert len(again.objective.filled) == 100


@torch.no_grad()
def test_saved_adapters_say_what_they_were_trained_on(cached, tmp_path):
    """Every objective with what its adapter needs, and a regularizer: saved, loaded, and trained further."""
    data, backbone = cached
    h = torch.randn(4, backbone.in_dim)
    for name, case in CASES.items():
        if not case.trained:
            continue
        options = case.options if case.training_options is None else case.training_options
        config = hfproj.ProjectionHeadConfig.for_objective(
            {"name": case.name, **options}, head=case.head, head_options=case.head_options, out_dim=TRAINED_DIM,
            predictor=case.predictor, prototypes=case.prototypes,
        )  # fmt: skip
        model = get_peft_model(copy.deepcopy(backbone), config)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        args = hfproj.ProjectionTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        given = {"train_dataset": data, "data_collator": hfproj.FeatureViews(case.views)}
        if "out_dim" in options:
            options = {**options, "out_dim": TRAINED_DIM}
        objective = {"name": case.name, **options}
        first = hfproj.ProjectionTrainer(model, args, objective=objective, regularizers={"orthogonality": 0.1}, **given)
        first.save_model(str(tmp_path / name))
        loaded = PeftModel.from_pretrained(copy.deepcopy(backbone), str(tmp_path / name), is_trainable=True)
        expected, found = model.eval()(h), loaded.eval()(h)
        for output in ("projection", "prediction", "scores"):
            a, b = getattr(expected, output), getattr(found, output)
            assert (a is None and b is None) or torch.equal(a, b)
        again = hfproj.ProjectionTrainer(loaded, args, **given)
        assert again.objective.created == first.objective.created
        assert again.regularizers["orthogonality"].describe() == {"weight": 0.1}


@pytest.mark.parametrize("name", thinned(REGULARIZERS, 3))
def test_every_regularizer_trains_with_an_objective(cached, tmp_path, name):
    key, options = REGULARIZERS[name]
    regularizers = {key: {"weight": 1e-2, "schedule": "linear", **options}}
    objective = hfproj.create_objective("nt_xent")
    losses, _, after, run = train(cached, tmp_path, CASES["nt_xent"], objective, regularizers)
    assert all(math.isfinite(loss) for loss in losses)
    assert after[1] > 1.5
    terms = [entry[key] for entry in run.state.log_history if key in entry]
    assert len(terms) == STEPS
    assert all(math.isfinite(value) for value in terms)
    saved = run.model.peft_config["default"].regularizers[key]
    assert saved == {"weight": 1e-2, "schedule": "linear", "end_weight": 0.0, **options}
