"""Attentive probe: its function against torch's attention, what it learns that a mean cannot, and its invariances."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from hfproj.errors import NonFiniteLossError, UsageError
from hfproj.probes import attentive
from hfproj.probes.attentive import AttentiveProbe, check_tokens

SHORT = {"heads": 2, "epochs": 3, "min_steps": 1, "batch_size": 8}


def presence(rows, seed, tokens=6, dim=16, classes=4):
    """Return rows whose class says which of several pairs ±u is among the tokens; all other tokens cancel, too."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, dim, generator=torch.Generator().manual_seed(77))
    labels = torch.randint(classes, (rows,), generator=generator)
    noise = torch.randn(rows, tokens // 2 - 1, dim, generator=generator)
    marks = 2 * directions[labels, None]
    return torch.cat([marks, -marks, noise, -noise], 1), labels


def trained(rows=40, dtype=torch.float64, **options):
    x, y = presence(rows, 0)
    return AttentiveProbe(**{**SHORT, **options}).fit(x.to(dtype), y), x.to(dtype), y


def logits(probe, x):
    return attentive._logits(probe._weights, attentive._normal(x, torch.float64))


@pytest.mark.parametrize("queries", [1, 3])
def test_function_is_that_of_multi_head_attention(queries):
    probe, x, _ = trained(queries=queries)
    w, dim = probe._weights, x.shape[2]
    peer = nn.MultiheadAttention(dim, 2, batch_first=True).double()
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([torch.eye(dim), w["key"].reshape(dim, dim), w["value"].reshape(dim, dim)]))
        peer.in_proj_bias.copy_(torch.cat([torch.zeros(2 * dim), w["value_bias"].flatten()]))
        peer.out_proj.weight.copy_(torch.eye(dim))
        peer.out_proj.bias.zero_()
        normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        query = w["query"].reshape(1, queries, dim).expand(len(x), -1, -1)
        pooled = peer(query, normal, normal)[0].mean(1)
    torch.testing.assert_close(logits(probe, x), pooled @ w["classifier"].T + w["bias"], rtol=1e-10, atol=1e-12)
    assert probe.predict(x).equal(probe.classes_[(pooled @ w["classifier"].T + w["bias"]).argmax(1)])


def test_training_is_that_of_modules_that_form_keys_and_values():
    x, y = presence(30, 0)
    x = x.double()
    options = {"epochs": 4, "min_steps": 16, "batch_size": 8, "learning_rate": 0.01, "weight_decay": 0.1}
    probe = AttentiveProbe(heads=2, **options, seed=5).fit(x, y)

    dim, classes = x.shape[2], 4
    generator = torch.Generator().manual_seed(5)
    draw = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in (
        ("query", (dim,)), ("key", (dim, dim)), ("value", (dim, dim)))}  # fmt: skip
    query = nn.Parameter(0.02 * draw["query"])
    key, value = nn.Linear(dim, dim, bias=False).double(), nn.Linear(dim, dim).double()
    classifier = nn.Linear(dim, classes).double()
    with torch.no_grad():
        key.weight.copy_(draw["key"] / dim**0.5)
        value.weight.copy_(draw["value"] / dim**0.5)
        for parameter in (value.bias, classifier.weight, classifier.bias):
            parameter.zero_()
    decayed, plain = [key.weight, value.weight, classifier.weight], [query, value.bias, classifier.bias]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=0.01
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
    for _ in range(4):
        order = torch.randperm(30, generator=generator)
        for rows in order.split(8):
            tokens = F.layer_norm(x[rows], (dim,))
            k, v = (layer(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (key, value))
            q = query.view(1, 2, 1, -1).expand(len(rows), -1, -1, -1)
            pooled = F.scaled_dot_product_attention(q, k, v).flatten(1)
            optimizer.zero_grad()
            F.cross_entropy(classifier(pooled), y[rows]).backward()
            optimizer.step()
            schedule.step()
    for name, expected in (("query", query), ("key", key.weight), ("value", value.weight),
                           ("classifier", classifier.weight), ("bias", classifier.bias)):  # fmt: skip
        found = probe._weights[name]
        torch.testing.assert_close(found, expected.detach().view_as(found), rtol=1e-6, atol=1e-8)


def test_learns_which_token_is_present_where_the_mean_says_nothing():
    (x, y), (test, truth) = presence(600, 0), presence(300, 1)
    for pooled, held_out in (
        (x.mean(1), test.mean(1)),
        (F.layer_norm(x, x.shape[2:]).mean(1), F.layer_norm(test, x.shape[2:]).mean(1)),
    ):
        assert pooled.abs().max() < 1e-5
        mean_pooled = LogisticRegression(C=1e6, max_iter=200).fit(pooled.numpy(), y.numpy())
        assert mean_pooled.score(held_out.numpy(), truth.numpy()) < 0.4
    probe = AttentiveProbe(heads=4, batch_size=64, learning_rate=3e-3)
    assert probe.fit(x, y).score(test, truth) > 0.98
    assert probe.correct_.double().mean().item() == probe.results_["value"]


def test_order_of_the_tokens_does_not_matter():
    probe, x, y = trained()
    shuffled = torch.stack([row[torch.randperm(len(row))] for row in x])
    torch.testing.assert_close(logits(probe, shuffled), logits(probe, x))
    again = AttentiveProbe(**SHORT).fit(shuffled, y)
    for name, weight in probe._weights.items():
        torch.testing.assert_close(again._weights[name], weight, rtol=1e-6, atol=1e-9)


def test_copies_of_one_token_are_one_token():
    probe, x, _ = trained()
    torch.testing.assert_close(logits(probe, x[:, :1].expand(-1, 9, -1)), logits(probe, x[:, :1]))


def test_one_token_is_a_linear_classifier_of_the_normalised_token():
    x, y = presence(40, 0)
    x = x[:, :1].double()
    probe = AttentiveProbe(**SHORT).fit(x, y)
    w, dim = probe._weights, x.shape[2]
    matrix = w["classifier"] @ w["value"].reshape(dim, dim)
    offset = w["classifier"] @ w["value_bias"].flatten() + w["bias"]
    torch.testing.assert_close(logits(probe, x), F.layer_norm(x[:, 0], (dim,)) @ matrix.T + offset)
    # No gradient reached what only the attention needs: the query is as it was drawn, the keys only decayed.
    start = attentive._initial(4, 2, 1, dim, torch.Generator().manual_seed(0), torch.float64, torch.device("cpu"))
    torch.testing.assert_close(w["query"], start["query"], rtol=0, atol=1e-12)
    torch.testing.assert_close(w["key"] / start["key"], (w["key"] / start["key"]).mean().expand_as(w["key"]))


def test_memory_mapped_tokens_give_the_same(tmp_path):
    probe, x, y = trained(dtype=torch.float32)
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.float32, mode="w+", shape=tuple(x.shape))
    mapped[:] = x.numpy()
    mapped.flush()
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.float32, mode="r", shape=tuple(x.shape))
    again = AttentiveProbe(**SHORT).fit(mapped, y.numpy())
    for name, weight in probe._weights.items():
        assert again._weights[name].equal(weight)
    assert again.score(mapped, y) == probe.score(x, y)


def test_parts_change_nothing(monkeypatch):
    probe, x, _ = trained()
    expected = probe.predict(x)
    monkeypatch.setattr(attentive, "_READ_ELEMENTS", 3 * x[0].numel())
    assert probe.predict(x).equal(expected)
    bad = x.clone()
    bad[7, 2, 3], bad[20, 0, 0] = float("nan"), float("inf")
    with pytest.raises(UsageError, match=r"2 of 40 rows of the tokens are NaN or infinite: rows 7, 20"):
        probe.predict(bad)


def test_deterministic_and_alone_with_its_random_numbers():
    x, y = presence(40, 0)
    before = torch.get_rng_state()
    one = AttentiveProbe(**SHORT).fit(x, y)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(99)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        two = AttentiveProbe(**SHORT).fit(x.clone(), y)
        assert two.predict(x).equal(one.predict(x))
    other = AttentiveProbe(**SHORT, seed=1).fit(x, y)
    for name, weight in one._weights.items():
        assert two._weights[name].equal(weight)
        assert weight.dtype == torch.float32
    assert not other._weights["key"].equal(one._weights["key"])
    fitted = copy.deepcopy(one)
    assert fitted.predict(x).equal(one.predict(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_trained_in_float32(dtype):
    x, y = presence(40, 0)
    half, full = AttentiveProbe(**SHORT).fit(x.to(dtype), y), AttentiveProbe(**SHORT).fit(x.to(dtype).float(), y)
    for name, weight in full._weights.items():
        assert half._weights[name].equal(weight)


def test_results_carry_the_protocol():
    x, y = presence(40, 0)
    probe = AttentiveProbe(
        heads=4, queries=2, epochs=1, min_steps=5, batch_size=1000, learning_rate=2e-3, weight_decay=0.0, seed=3
    )
    value = probe.fit(x, y).score(x[:10], y[:10].tolist())
    assert value == probe.results_["value"]
    assert probe.results_["protocol"] == {
        "heads": 4, "queries": 2, "epochs": 1, "min_steps": 5, "batch_size": 1000, "learning_rate": 2e-3,
        "weight_decay": 0.0, "seed": 3, "train_rows": 40, "test_rows": 10, "tokens": 6, "dim": 16,
        "classes": 4, "steps": 5,
    }  # fmt: skip
    assert probe.correct_.shape == (10,)
    assert repr(probe).startswith("AttentiveProbe(heads=4, queries=2, ")


def test_labels_are_any_integers_and_unseen_classes_are_wrong():
    x, y = presence(200, 0)
    plain = AttentiveProbe(**SHORT).fit(x, y).predict(x)
    probe = AttentiveProbe(**SHORT).fit(x, y * 1000 - 7)
    assert probe.predict(x).equal(plain * 1000 - 7)
    truth = (plain * 1000 - 7).index_fill(0, torch.arange(50), 12345)
    assert probe.score(x, truth) == 0.75
    assert not probe.correct_[:50].any()


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(5, 3, 4),
        torch.ones(5, 3, 4) * 1e30,
        torch.randn(5, 3, 4) * 1e-30,
        torch.randn(1, 1, 4).expand(5, 3, 4),
    ],
    ids=["zero", "huge", "tiny", "repeated"],
)
def test_degenerate_tokens(x):
    assert set(AttentiveProbe(**SHORT).fit(x, [4, 4, 4, 4, 9]).predict(x).tolist()) <= {4, 9}


def test_one_class_one_row_a_class_and_one_row():
    x = torch.randn(6, 3, 4)
    assert AttentiveProbe(**SHORT).fit(x, [5] * 6).score(x, [5] * 6) == 1.0
    fitted = AttentiveProbe(heads=1, epochs=200, learning_rate=0.02).fit(x, range(6))
    assert fitted.score(x, torch.arange(6)) == 1.0
    assert AttentiveProbe(**SHORT).fit(x[:1], [2]).predict(x).tolist() == [2] * 6


def test_refusals():
    for options in ({"heads": 0}, {"queries": 0}, {"epochs": 0}, {"min_steps": 0}, {"batch_size": 0},
                    {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"weight_decay": -1.0}):  # fmt: skip
        with pytest.raises(UsageError):
            AttentiveProbe(**options)
    x = torch.randn(6, 3, 4)
    with pytest.raises(UsageError, match="heads=3 must divide the width of the tokens, got 4"):
        AttentiveProbe(heads=3).fit(x, range(6))
    with pytest.raises(UsageError, match="call fit"):
        AttentiveProbe().predict(x)
    with pytest.raises(UsageError, match="integer label for each of 6 rows"):
        AttentiveProbe(heads=1).fit(x, [1, 2])
    for wrong in (torch.randn(6, 4), torch.zeros(6, 3, 4, dtype=torch.int64), torch.randn(6, 0, 4)):
        with pytest.raises(
            UsageError, match=r"tokens as floating-point numbers of shape \[rows, tokens, dim\].*tokens="
        ):
            check_tokens(wrong)
    probe = AttentiveProbe(**SHORT).fit(x, [0, 1, 0, 1, 0, 1])
    with pytest.raises(UsageError, match="fitted on 4 columns, these features have 5"):
        probe.predict(torch.randn(2, 3, 5))
    assert probe.predict(torch.randn(2, 7, 4)).shape == (2,)


def test_a_loss_that_is_not_finite_is_said(monkeypatch):
    monkeypatch.setattr(attentive, "_logits", lambda w, x: w["classifier"].sum() * x.new_full((len(x), 2), torch.nan))
    with pytest.raises(NonFiniteLossError, match=r"became nan at step 1; lower learning_rate \(0\.001 now\)"):
        AttentiveProbe(**SHORT).fit(torch.randn(6, 3, 4), [0, 1, 0, 1, 0, 1])
