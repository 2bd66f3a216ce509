"""`ProjectionTrainingArguments`: defaults, refusals, and what of them goes into the results."""

import dataclasses
import json

import pytest
from transformers import TrainingArguments

import hfproj
from hfproj import cli
from hfproj.redaction import redact


def arguments(tmp_path, **options):
    return hfproj.ProjectionTrainingArguments(output_dir=str(tmp_path), **options)


def test_defaults(tmp_path):
    args = arguments(tmp_path)
    assert isinstance(args, TrainingArguments)
    assert (args.learning_rate, args.weight_decay, args.lr_scheduler_type) == (1e-3, 0.05, "cosine")
    assert args.get_warmup_steps(200) == 20
    assert args.dataloader_drop_last
    assert not args.remove_unused_columns
    assert args.ddp_find_unused_parameters is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hub_strategy": "checkpoint"},
            "hub_strategy='checkpoint' would push.*pickled.*Use 'every_save'.*continue_from=",
        ),
        ({"hub_strategy": "all_checkpoints"}, "hub_strategy='all_checkpoints' would push.*pickled"),
        ({"patch_dropout": 1.0}, r"Expected patch_dropout to be a fraction in \[0, 1\)"),
        ({"head_learning_rate": -1.0}, "Expected head_learning_rate to be 0 or more"),
        ({"eval_knn_k": 0}, "eval_knn_k to be 1 or more, got 0"),
        ({"eval_knn_temperature": 0.0}, "eval_knn_temperature to be.*above 0, got 0.0"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True would drop the images"),
    ],
)
def test_refused(tmp_path, options, message):
    with pytest.raises(hfproj.UsageError, match=message):
        arguments(tmp_path, **options)


def test_what_was_chosen(tmp_path):
    somewhere = {"resume_from_checkpoint": "/a/path", "push_to_hub": True, "hub_model_id": "me/x", "hub_token": "hf_x"}
    chosen = arguments(tmp_path, learning_rate=3e-4, patch_dropout=0.5, **somewhere).chosen()
    assert chosen["learning_rate"] == 3e-4
    assert chosen["patch_dropout"] == 0.5
    assert "save_steps" not in chosen
    assert not {"output_dir", *somewhere} & set(chosen)
    assert json.loads(json.dumps(chosen)) == chosen


@dataclasses.dataclass
class Flags:
    """What a recipe asks for."""

    rate: float = 0.5
    hub_token: str | None = None

    def __post_init__(self):
        if self.rate > 2:
            raise ValueError("a value that\ntransformers refuses")
        if self.rate > 1:
            raise hfproj.UsageError(f"Expected rate to be 1 or less, got {self.rate}.")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--rat3 3 --typo", "Unknown arguments: --rat3 (did you mean --rate?), --typo. See --help."),
        ("--rat 1", "Unknown arguments: --rat (did you mean --rate?). See --help."),
        ("--hub_tok=enterprise-xyz", "Unknown arguments: --hub_tok (did you mean --hub_token?). See --help."),
        ("stray", "Unknown arguments: 'stray'. See --help."),
        ("--rate 1.5", "Expected rate to be 1 or less, got 1.5."),
        ("--rate 3", "a value that transformers refuses"),
    ],
)
def test_command_line_errors(monkeypatch, capsys, line, message):
    monkeypatch.setattr("sys.argv", ["recipe", *line.split()])
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: cli.parse(Flags))
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_token_that_was_parsed_is_kept_nowhere(monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe", "--hub_token", "enterprise-value-9"])
    cli.parse(Flags)
    monkeypatch.setattr("sys.argv", ["another"])
    assert redact("with enterprise-value-9 in it") == "with $HF_TOKEN in it"


def test_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe", "--rate", "0.25"])
    assert cli.parse(Flags) == (Flags(rate=0.25),)


def test_errors_of_loader_workers_are_one_line(capsys):
    def main():
        raise hfproj.UsageError(
            "Caught UsageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "  File \"a.py\", line 1, in b\nhfproj.errors.UsageError: Column 'x' holds no image: use another.\n"
        )

    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err == "error: Column 'x' holds no image: use another.\n"


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"max_steps": -5}, {"dataloader_num_workers": 10_000}], ids=str)
def test_numbers_that_no_run_can_have(tmp_path, options):
    [(name, value)] = options.items()
    with pytest.raises(hfproj.UsageError, match=rf"Expected {name} .*, got {value}"):
        hfproj.ProjectionTrainingArguments(output_dir=str(tmp_path), **options)
