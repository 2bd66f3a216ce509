"""The EMA teacher follows by its formula, shares what is frozen, and survives a checkpoint."""

import pytest
import torch
from small import adapter, assert_equal, differs, head_model, trainable, trainer
from torch import nn

from hfproj.errors import AdapterFileError, UsageError
from hfproj.training.ema import EMA


class Follow(nn.Module):
    """A toy objective that pulls z to the target of the other view."""

    views = (2, None)
    needs = frozenset({"target"})
    target_of = "projection"
    target_views = 2
    ema_momentum = (0.5, 1.0)

    def forward(self, z, *, target=None, **given):
        assert target.shape == z.shape
        assert not target.requires_grad
        return (z - target.flip(0)).square().mean(), {}


def test_it_is_the_weighted_sum_of_all_past_parameters():
    model = head_model()
    ema = EMA(model, (0.9, 0.9))
    start = {n: p.clone() for n, p in trainable(model).items()}
    expected = dict(start)
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
        ema.update(model, 0.5)
        expected = {n: 0.9 * e + 0.1 * p for (n, e), p in zip(expected.items(), trainable(model).values())}
    for name, value in trainable(ema.module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_momentum_goes_along_a_cosine():
    """At a quarter 1 − 0.1·(1 + √½)/2, at three quarters 1 − 0.1·(1 − √½)/2, where a straight line differs by 0.01."""
    ema = EMA(head_model(), (0.9, 1.0))
    quarter = 0.1 * (1 + 0.5**0.5) / 2
    expected = [0.9, 1 - quarter, 0.95, 0.9 + quarter, 1.0]
    assert [ema.momentum(t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UsageError, match=r"\[0, 1\], got 0.9 to 1.5"):
        EMA(head_model(), (0.9, 1.5))


@pytest.mark.parametrize("config", [{}, {"trainable": "full"}, {"lora": False}], ids=str)
def test_it_shares_what_is_frozen_and_nothing_else(config):
    model = head_model(**config)
    ema = EMA(model, (0.9, 1.0))
    for copied, parameter in zip(ema.module.parameters(), model.parameters(), strict=True):
        assert (copied is parameter) == (not parameter.requires_grad)
    buffers = dict(model.named_buffers())
    assert all(b is not buffers[n] for n, b in ema.module.named_buffers())


def test_its_batch_norm_has_statistics_of_its_own():
    model = head_model()
    ema = EMA(model, (0.9, 1.0))
    before = adapter(model)
    target = ema.targets([torch.randn(4, 3, 16, 16)] * 3, "projection", 2)
    assert target.shape == (2, 4, 6)
    assert_equal(before, adapter(model))
    assert differs(before, adapter(ema.module))


def test_the_trainer_keeps_it_and_resumes_it_bit_for_bit(tmp_path):
    def run(folder, **options):
        made = trainer(
            folder, max_steps=4, save_strategy="steps", save_steps=2, extra={"objective": Follow()}, **options
        )
        return made

    whole = run(tmp_path / "whole")
    whole.train()
    assert whole.ema.momentum(0.0) == 0.5
    assert differs(adapter(whole.model), adapter(whole.ema.module))
    resumed = run(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(adapter(whole.model), adapter(resumed.model))
    assert_equal(adapter(whole.ema.module), adapter(resumed.ema.module))


def test_arguments_override_the_momentum_of_the_objective(tmp_path):
    run = trainer(tmp_path, max_steps=1, ema_momentum=0.25, extra={"objective": Follow()})
    run.train()
    assert (run.ema.start, run.ema.end) == (0.25, 1.0)


def test_a_checkpoint_without_it_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, extra={"objective": Follow()})
    run.train()
    (tmp_path / "checkpoint-1" / "ema.safetensors").unlink()
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()  # else the checkpoint isn't whole, which is said instead
    again = trainer(tmp_path, max_steps=2, extra={"objective": Follow()})
    with pytest.raises(AdapterFileError, match="no EMA teacher of this model"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
