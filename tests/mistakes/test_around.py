"""What must go on around the mistakes: how PEFT reads files, signatures, copies, and calls that only look wrong."""

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mistakes.things import HEAD, backbone, bert, config, head_model, model, text_model, tokenizer, x
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import RobertaConfig, RobertaModel

import hfproj
from hfproj.backbones import wrong_inputs
from hfproj.checking import call_error, explained
from hfproj.errors import CallError, unknown
from hfproj.hints import nearest

ROOT = Path(__file__).resolve().parents[2]


def test_a_config_of_a_later_version_is_read_as_peft_reads_its_own(tmp_path):
    head_model(lora=False).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("{", '{"of_a_later_version": 1,', 1))
    with pytest.warns(UserWarning, match="of_a_later_version"):
        assert PeftConfig.from_pretrained(str(tmp_path)).head == "mlp"


def test_an_explained_class_stays_what_it_was():
    made = config()
    assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made
    names = list(inspect.signature(hfproj.ProjectionHeadConfig).parameters)
    assert names[:2] == ["task_type", "peft_type"]
    assert set(HEAD) <= set(names)
    assert hfproj.ProjectionHeadConfig(None).head == "mlp"  # as before, task_type by position


def test_an_error_in_a_constructor_is_no_wrong_call():
    @explained
    class Broken:
        def __init__(self, a):
            raise TypeError("its own")

    with pytest.raises(TypeError, match="its own") as caught:
        Broken(1)
    assert not isinstance(caught.value, CallError)
    with pytest.raises(CallError, match="Broken needs a=…"):
        Broken()


def test_wrong_calls_in_words():
    def fit(f, y, *, steps=1, **options): ...

    def said(*args, **kwargs):
        return str(call_error("fit", inspect.signature(fit), args, kwargs))

    assert said(1, 2, 3) == (
        "fit takes 2 arguments by position (f, y), got 3; give the others by name: fit(f, y, steps=…, **options)."
    )
    assert said(1) == "fit needs y=…."
    assert said(1, 2, y=3) == "fit got y twice, by position and by name; give it once."


@pytest.mark.parametrize(
    ("name", "names", "meant"),
    [
        ("simclr", ["simcse", "nt_xent"], "nt_xent"),
        ("simclr", ["simclr", "nt_xent"], "simclr"),  # a list that has it
        ("simcs", ["simcse", "nt_xent"], "simcse"),
        ("NT-Xent", ["nt_xent"], "nt_xent"),
        ("VICRegLoss", ["vicreg"], "vicreg"),
        ("lr", ["learning_rate"], "learning_rate"),
        ("zebra", ["nt_xent"], None),
        (None, ["knn"], None),
        (3, ["a"], None),
    ],
)
def test_the_nearest_name(name, names, meant):
    assert nearest(name, names) == meant


def test_long_lists_are_cut():
    said = str(unknown("preset", "b12", [f"b{i}" for i in range(100)]))
    assert "Did you mean 'b12'?" in said
    assert "and 90 more" in said


def test_calls_that_work_are_not_explained():
    with pytest.raises(ZeroDivisionError):
        wrong_inputs.run_explained(lambda: 1 / 0, backbone(), [x()], {})
    assert wrong_inputs.what_is_wrong(backbone(), [x()], {}) is None
    assert wrong_inputs.what_is_wrong(bert(), [], {"input_ids": torch.ones(2, 5, dtype=torch.long)}) is None
    out = text_model()(inputs_embeds=torch.zeros(2, 3, 16))
    assert out.projection.shape == (2, 6)
    plain = get_peft_model(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), hfproj.ProjectionHeadConfig(in_dim=3, out_dim=2)
    )
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # of a module that nothing is known of
        plain(torch.zeros(2, 5))
    with model().disable_adapter(), pytest.raises(AttributeError):  # PEFT enters no context then
        model()("a path")


def test_a_module_of_the_users_own_may_take_bytes():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x.float().mean((2, 3)) / 255)

    made = get_peft_model(Scaled(), hfproj.ProjectionHeadConfig(in_dim=4, out_dim=2))
    assert made(x(dtype=torch.uint8)).projection.shape == (4, 2)


def test_positions():
    sizes = {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    roberta = RobertaModel(RobertaConfig(**sizes, max_position_embeddings=12), add_pooling_layer=False)
    assert wrong_inputs.positions_of(roberta) == 10  # the first two are of padding
    assert wrong_inputs.positions_of(backbone()) is None
    for length in (10, 11):
        ids = torch.full((1, length), 5)
        fits = wrong_inputs.wrong_tokens(roberta, ids) is None
        assert fits == (length == 10)
        if fits:
            roberta(input_ids=ids)


def test_texts_are_cut_at_the_last_position(tmp_path):
    bert(positions=16).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    made = hfproj.load_backbone(str(tmp_path))
    assert hfproj.EvalText.for_model(made).max_length == hfproj.TextViews.for_model(made).max_length == 16
    assert hfproj.EvalText.for_model(made, max_length=4).max_length == 4
    assert hfproj.EvalText(tokenizer()).max_length == 128


@pytest.mark.parametrize(
    "flags", [["--help"], *(pytest.param([flag], marks=pytest.mark.long) for flag in ("--check", "--no_such_flag"))]
)
def test_the_geometry_table_writes_only_when_asked(flags):
    recipe, document = ROOT / "recipes" / "geometry_table.py", ROOT / "docs" / "geometry_study.md"
    before = document.stat().st_mtime_ns
    done = subprocess.run([sys.executable, str(recipe), *flags], capture_output=True, text=True)
    assert document.stat().st_mtime_ns == before
    assert done.returncode == (2 if "--no_such_flag" in flags else 0), done.stderr
