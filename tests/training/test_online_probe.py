"""Online probe: its classifiers against autograd, its records against the same by hand, and what it leaves alone."""

import shutil

import forked
import pytest
import torch
import torch.nn.functional as F
from processes import train
from small import adapter, assert_equal, differs, head_model, images, plain, trainer, views
from torch import nn
from transformers import TrainerState

import hfproj
from hfproj import distributed
from hfproj.training.callbacks.online_probe import STATE_FILE, OnlineClassifier, OnlineProbeCallback


def run(folder, callback, model=None, resume=None, cls=None, extra=None, **args):
    callbacks = [callback] if callback is not None else []
    given = {"callbacks": callbacks, "eval_dataset": images(9, seed=1), **(extra or {})}
    made = trainer(folder, model, images(24), extra=given, cls=cls, **{"max_steps": 5, **args})
    made.train(resume_from_checkpoint=resume)
    return made


class Kept(hfproj.ProjectionTrainer):
    """Keeps h, z and labels of each training batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            if not hasattr(self, "kept"):
                self.kept = []
            self.kept.append({**self.last_batch, "labels": inputs["labels"]})
        return loss


# --- the classifier ---


def test_steps_are_those_of_autograd_and_torchs_sgd():
    torch.manual_seed(0)
    peer = nn.Linear(6, 5).double()
    nn.init.zeros_(peer.weight)
    nn.init.zeros_(peer.bias)
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.3, momentum=0.8)
    classifier = OnlineClassifier(learning_rate=0.3, momentum=0.8)
    for step in range(7):
        f, y = torch.randn(11, 6).double(), torch.randint(5, (11,)).index_fill(0, torch.tensor([0]), 4)
        logits = peer(f)
        right = (logits.argmax(1) == y).sum().item()
        optimizer.zero_grad()
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        assert classifier.learn(f, y) == (right, 11)
        torch.testing.assert_close(classifier.weight[:, :-1], peer.weight.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(classifier.weight[:, -1], peer.bias.detach(), rtol=1e-10, atol=1e-12)
    assert classifier.accuracy(f, y) == (peer(f).argmax(1) == y).double().mean().item()


def test_classes_join_when_they_come():
    classifier = OnlineClassifier()
    f = torch.randn(4, 3)
    classifier.learn(f, torch.tensor([0, 1, 1, 0]))
    before, velocity = classifier.weight.clone(), classifier.velocity.clone()
    assert before.shape == (2, 4)
    classifier.learning_rate = 0.0
    classifier.learn(f, torch.tensor([0, 3, 1, 0]))
    assert classifier.weight[:2].equal(before)
    assert not classifier.weight[2:].any()
    assert not classifier.velocity[:2].equal(velocity)
    assert classifier.accuracy(f, torch.full((4,), 7)) == 0.0


@pytest.mark.parametrize("labels", [[-2, 0], [0, 2**40]])
def test_labels_that_are_no_class_numbers_are_refused(labels):
    with pytest.raises(hfproj.UsageError, match=r"needs class numbers from 0, got labels from .* Encode them"):
        OnlineClassifier().learn(torch.randn(2, 3), torch.tensor(labels))


def test_the_largest_stable_rate_is_where_the_docstring_says():
    """On equal rows of two classes, the curvature is its bound: (scale² + 1)/2."""
    for share, stable in ((0.98, True), (1.02, False)):
        scale = (76 * share - 1) ** 0.5
        f = torch.tensor([[scale], [scale]], dtype=torch.float64)
        classifier = OnlineClassifier()
        classifier.learn(f[:1], torch.tensor([1]))  # leaves the optimum, where it would stay
        classifier.weight.mul_(1e-9), classifier.velocity.zero_()
        start = classifier.weight.norm()
        for _ in range(400):
            classifier.learn(f, torch.tensor([0, 1]))
        assert (classifier.weight.norm() < start) == stable


# --- what is recorded ---


def test_what_is_recorded_is_that_by_hand(tmp_path):
    watch = OnlineProbeCallback(every=2, images=7, bank=10, k=3, temperature=0.5)
    made = run(tmp_path, watch, cls=Kept, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    rows = [row for row in made.history if "online_train_h" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert len(made.kept) == 10
    subset = [images(9, seed=1)[i * 9 // 7] for i in range(7)]
    held_out = hfproj.extract_features(made.model, subset, collator=plain())
    for layer in "hz":
        peer = OnlineClassifier()
        right = []
        for batch in made.kept:
            f = F.normalize(batch[layer].flatten(0, 1), dim=-1) * 4
            right.append(peer.learn(f, batch["labels"].repeat(2))[0])
        shares = [sum(part) / (8 * len(part)) for part in (right[:4], right[4:8], right[8:])]
        assert [row[f"online_train_{layer}"] for row in rows] == shares
        torch.testing.assert_close(watch.classifiers[layer].weight, peer.weight)
        f = getattr(held_out, layer)
        expected = peer.accuracy(F.normalize(f, dim=-1) * 4, held_out.labels)
        assert rows[-1][f"online_linear_{layer}"] == expected
        bank = torch.cat([batch[layer][0] for batch in made.kept])[-10:]
        labels = torch.cat([batch["labels"] for batch in made.kept])[-10:]
        knn = hfproj.KNNProbe(k=3, temperature=0.5).fit(bank, labels)
        assert rows[-1][f"online_knn_{layer}"] == knn.score(f, held_out.labels)
    logged = [entry for entry in made.state.log_history if "probe_online_linear_h" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 5]


def test_rows_as_they_are(tmp_path):
    watch = OnlineProbeCallback(scale=None, learning_rate=0.01, momentum=0.0)
    made = run(tmp_path, watch, cls=Kept)
    peer = OnlineClassifier(learning_rate=0.01, momentum=0.0)
    for batch in made.kept:
        peer.learn(batch["h"].flatten(0, 1), batch["labels"].repeat(2))
    torch.testing.assert_close(watch.classifiers["h"].weight, peer.weight)


def test_without_held_out_images_or_neighbours(tmp_path):
    made = run(tmp_path, OnlineProbeCallback(every=5), extra={"eval_dataset": None})
    assert {n for row in made.history for n in row if "online" in n} == {"online_train_h", "online_train_z"}
    made = run(tmp_path, OnlineProbeCallback(every=5, k=0), extra={"eval_dataset": {"a": images(4), "b": images(5)}})
    names = {n for row in made.history for n in row if "online" in n}
    assert names == {f"online_{what}_{layer}" for what in ("train", "linear") for layer in "hz"}


def test_views_of_several_sizes(tmp_path):
    watch = OnlineProbeCallback(every=5)
    made = trainer(
        tmp_path,
        head_model(prototypes=8),
        images(24),
        collator=views(local_views=2, local_size=8),
        extra={"callbacks": [watch], "objective": {"name": "dino", "prototypes": 8}},
        cls=Kept,
        max_steps=2,
    )
    made.train()
    peer = OnlineClassifier()
    for batch in made.kept:
        peer.learn(F.normalize(torch.cat(list(batch["h"])), dim=-1) * 4, batch["labels"].repeat(4))
    torch.testing.assert_close(watch.classifiers["h"].weight, peer.weight)


def test_the_default_takes_a_hundredth_of_the_time(tmp_path):
    watch = OnlineProbeCallback(images=512)
    trainer(tmp_path, None, images(24), gradient_accumulation_steps=2, extra={"callbacks": [watch]})
    assert watch.steps_between == 60 * 512 // 8


# --- what is left alone ---


@pytest.mark.parametrize("options", [{"patch_dropout": 0.5}, {"gradient_accumulation_steps": 2, "bf16": True}])
def test_it_changes_nothing(tmp_path, options):
    runs = []
    for name, watch in (("alone", None), ("watched", OnlineProbeCallback(every=1))):
        made = run(tmp_path / name, watch, model=head_model(dropout=0.2), **options)
        runs.append(adapter(made.model))
    assert_equal(*runs)
    assert watch.classifiers["h"].weight.any()
    assert not any(tensor.requires_grad for c in watch.classifiers.values() for tensor in (c.weight, c.velocity))


# --- checkpoints ---


def test_a_resumed_run_goes_on_with_its_classifiers_and_bank(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    watch = OnlineProbeCallback(every=3, bank=5, k=2)
    whole = run(tmp_path / "whole", watch, **saving)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    again = OnlineProbeCallback(every=3, bank=5, k=2)
    resumed = run(tmp_path / "resumed", again, model=head_model(seed=7), resume=True, **saving)
    assert resumed.history == whole.history
    for layer in "hz":
        assert again.classifiers[layer].weight.equal(watch.classifiers[layer].weight)
        assert again.classifiers[layer].velocity.equal(watch.classifiers[layer].velocity)
    assert again._bank["h"].equal(watch._bank["h"])
    assert len(again._bank["labels"]) == 5
    with pytest.warns(UserWarning, match=r"starts anew: .* holds no online_probe\.safetensors"):
        run(tmp_path / "elsewhere", OnlineProbeCallback(every=3), resume=tmp_path / "whole" / "checkpoint-2", **saving)
    file = tmp_path / "resumed" / "checkpoint-4" / STATE_FILE
    file.write_bytes(file.read_bytes()[:50])
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-5", ignore_errors=True)
    with pytest.warns(UserWarning, match=r"starts anew: .*SafetensorError"):
        run(tmp_path / "resumed", OnlineProbeCallback(every=3), resume=True, **saving)


def test_a_second_training_starts_anew(tmp_path):
    watch = OnlineProbeCallback(every=5)
    made = run(tmp_path, watch, model=head_model(dropout=0.0), learning_rate=0.0)
    first = watch.classifiers["h"].weight.clone()
    made.train()
    torch.testing.assert_close(watch.classifiers["h"].weight, first)


# --- refusals ---


def test_batches_without_labels_are_refused_before_the_first_step(tmp_path):
    made = trainer(tmp_path, None, images(24, labels=False), extra={"callbacks": [OnlineProbeCallback()]})
    before = adapter(made.model)
    with pytest.raises(hfproj.UsageError, match=r"learns from labels, but the batches have none.*label_column="):
        made.train()
    assert_equal(adapter(made.model), before)


def test_after_its_removal_labels_are_not_needed(tmp_path):
    made = trainer(tmp_path, None, images(8, labels=False), extra={"callbacks": [OnlineProbeCallback()]})
    made.remove_callback(OnlineProbeCallback)
    before = adapter(made.model)
    made.train()
    assert "compute_loss" not in vars(made)  # nothing of the trainer was replaced
    assert made.last_batch["labels"] is None
    assert not any("online" in name for row in made.history for name in row)
    assert differs(before, adapter(made.model))


def test_held_out_images_have_to_be_there_and_labelled(tmp_path):
    unlabelled = OnlineProbeCallback(every=1, dataset=images(4, labels=False))
    with pytest.raises(hfproj.UsageError, match="held-out images of OnlineProbeCallback have no labels"):
        run(tmp_path, unlabelled)
    with pytest.raises(hfproj.UsageError, match="fixed images, and a stream has none: pass dataset="):
        run(tmp_path, OnlineProbeCallback(dataset=iter(images(4))))


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.0}, {"momentum": 1.0}, {"scale": 0.0}, {"k": -1}, {"bank": 0}, {"images": 0},
     {"temperature": 0.0}, {"every": 0}],
)  # fmt: skip
def test_wrong_options(options):
    with pytest.raises(hfproj.UsageError, match=r"[Ee]xpected"):
        OnlineProbeCallback(**options)


def test_another_trainer_is_refused():
    with pytest.raises(hfproj.UsageError, match=r"works in hfproj\.ProjectionTrainer"):
        OnlineProbeCallback().on_train_begin(None, TrainerState(), None)


# --- several processes ---


def joint(folder):
    """Train in float64 on global batches of 8, from the start and from a checkpoint; return what can differ."""
    found = {}
    for name, resume in (("whole", None), ("resumed", folder / "run" / "checkpoint-2")):
        watch = OnlineProbeCallback(every=1, images=5, bank=20, k=3)
        if resume is not None and distributed.rank() == 0:
            shutil.rmtree(folder / "run" / "checkpoint-4", ignore_errors=True)
        distributed.barrier()
        result = train(folder / "run", resume=resume, extra={"callbacks": [watch]}, eval_strategy="no",
                       save_strategy="steps", save_steps=2)  # fmt: skip
        weights = {f"{n}.weight": c.weight for n, c in watch.classifiers.items()}
        found[name] = {"weights": {**weights, **watch._bank}, "history": result["history"]}
    return found


def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    both = forked.returned(joint, tmp_path / "two", world=2)
    one = joint(tmp_path / "one")
    assert one["whole"]["weights"]["h.weight"].dtype == torch.float64
    for name, result in one["resumed"]["weights"].items():
        assert result.equal(one["whole"]["weights"][name])
    for rank in range(2):
        two = both[rank]
        for name in ("whole", "resumed"):
            for key, expected in one[name]["weights"].items():
                tolerance = 1e-9 if "weight" in key else 1e-6  # the bank is kept in float32
                torch.testing.assert_close(
                    two[name]["weights"][key],
                    expected,
                    rtol=tolerance,
                    atol=tolerance,
                    msg=lambda m, k=key: f"{k}: {m}",
                )
            assert [row.keys() for row in two[name]["history"]] == [row.keys() for row in one[name]["history"]]
            for row, expected in zip(two[name]["history"], one[name]["history"]):
                assert row == pytest.approx(expected, rel=1e-5)
    assert {"online_train_h", "online_linear_z", "online_knn_h"} <= one["whole"]["history"][-1].keys()
