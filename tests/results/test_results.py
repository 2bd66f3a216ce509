import enum
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hfproj import limits
from hfproj.errors import AdapterFileError, UsageError
from hfproj.results import Measurement, Missing, Results, pack_outcomes, unpack_outcomes


def knn(layer, when, value, seed=0, **protocol):
    return Measurement("knn", layer, when, value, "digits", "accuracy", {"k": 20, "seed": seed, **protocol})


def a_result(**changes):
    settings = {
        "config": {"base_model": "./vit_nano"},
        "seeds": [0],
        "command": "python simclr.py",
        "measurements": [knn("h", "before", 0.838), knn("h", "after", 0.9), Measurement("rankme", "z", "after", 18.71)],
        "spectra": {"h after": [2.0, 1.0]},
        "log": [{"loss": 3.2, "step": 1}],
        "notes": ["a note"],
    }
    return Results(**{**settings, **changes})


def test_a_path_without_json_is_a_folder(tmp_path):
    assert a_result().save(tmp_path / "out2") == tmp_path / "out2" / "results.json"
    assert Results.load(tmp_path / "out2") == a_result()
    assert a_result().save(tmp_path / "v1.5.json") == tmp_path / "v1.5.json"
    (tmp_path / "old").write_bytes((tmp_path / "v1.5.json").read_bytes())
    assert Results.load(tmp_path / "old") == a_result()


def test_round_trip(tmp_path):
    result = a_result()
    path = result.save(tmp_path)
    assert path == tmp_path / "results.json"
    assert Results.load(path) == Results.load(tmp_path) == result
    first = path.read_bytes()
    Results.load(path).save(path)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["results.json"]


def test_strict_json_without_paths(tmp_path):
    class Kind(str, enum.Enum):
        LORA = "LORA"

    config = {"targets": {"b", "a"}, "kind": Kind.LORA, "file": Path("/home/someone/x/model"), "lr": np.float32(0.5)}
    log = [{"loss": float("nan"), "grad_norm": float("inf"), "step": np.int64(3)}]
    result = a_result(
        config=config, log=log, spectra={"h after": torch.tensor([2.0, float("nan")])}, command="x --d /srv/data/c"
    )
    path = result.save(tmp_path / "results.json")
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["config"] == {"targets": ["a", "b"], "kind": "LORA", "file": "./model", "lr": 0.5}
    assert content["log"] == [{"loss": None, "grad_norm": None, "step": 3}]
    assert content["spectra"] == {"h after": [2.0, None]}
    assert content["command"] == "x --d ./c"
    assert "/home" not in path.read_text()


def test_what_json_cannot_hold_is_refused_and_leaves_the_old_file(tmp_path):
    path = a_result().save(tmp_path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="object"):
        a_result(config={"x": object()}).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.5", True])
def test_a_measurement_is_a_finite_number(value):
    with pytest.raises(Exception, match=r"finite|value"):
        Measurement("knn", "h", "after", value)


def test_layer_and_when_are_checked():
    for layer, when in (("", "after"), ("block 3", "after"), ("h", "now")):
        with pytest.raises(UsageError, match="layer's name"):
            Measurement("knn", layer, when, 1.0)


def damaged(tmp_path, change):
    path = a_result().save(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("format"),
        lambda c: c.update(format=99),
        lambda c: c.pop("measurements"),
        lambda c: c.update(measurements=3),
        lambda c: c["measurements"][0].pop("value"),
        lambda c: c["measurements"][0].update(value=None),
        lambda c: c["measurements"][0].update(layer="q r"),
        lambda c: c.update(spectra=[]),
        lambda c: c.update(extra=1),
        lambda c: c["log"].append(float("nan")),
    ],
)
def test_damage_is_named(tmp_path, change):
    with pytest.raises(AdapterFileError, match=r"results\.json is damaged"):
        Results.load(damaged(tmp_path, change))


def test_a_cut_file_a_list_and_a_missing_one(tmp_path):
    path = a_result().save(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(AdapterFileError):
        Results.load(path)
    path.write_text("[1]")
    with pytest.raises(AdapterFileError):
        Results.load(path)
    with pytest.raises(UsageError, match="no file"):
        Results.load(tmp_path / "other.json")


def test_merge_of_before_and_after_and_of_seeds():
    before = a_result(measurements=[knn("h", "before", 0.8)], spectra={"h before": [1.0]}, notes=[])
    after = a_result(measurements=[knn("h", "after", 0.9)])
    other = a_result(measurements=[knn("h", "after", 0.7, seed=1)], seeds=[1])
    merged = before.merge(after, other)
    assert merged.value("knn", "h", "after") == pytest.approx(0.8)
    assert merged.value("knn", "h", "after", seed=1) == 0.7
    assert merged.seeds == [0, 1]
    assert sorted(merged.spectra) == ["h after", "h before"]
    assert merged.log == before.log
    assert "0.8000 ± 0.1414" in merged.table()
    assert len(before.measurements) == 1
    assert merged.merge(after).measurements == merged.measurements


def test_merge_refuses_what_belongs_to_different_models():
    with pytest.raises(UsageError, match="Two values of 20-NN accuracy"):
        a_result().merge(a_result(measurements=[knn("h", "after", 0.5)]))
    with pytest.raises(UsageError, match="base_model"):
        a_result().merge(a_result(config={"base_model": "other"}))


def test_value_says_what_there_is():
    result = a_result()
    assert result.value("rankme", "z", "after") == 18.71
    with pytest.raises(UsageError, match="Available: knn h after, knn h before, rankme z after"):
        result.value("knn", "z", "after")
    two = a_result(measurements=[knn("h", "after", 0.9), knn("h", "after", 0.8, k=5)])
    with pytest.raises(UsageError, match="several protocols"):
        two.value("knn", "h", "after")
    assert two.value("knn", "h", "after", k=5) == 0.8


def test_outcomes_survive_the_file(tmp_path):
    correct = np.arange(11) % 3 == 0
    m = Measurement("knn", "h", "after", 0.4, outcomes=pack_outcomes(correct))
    result = Results.load(a_result(measurements=[m]).save(tmp_path))
    assert (result.outcomes("knn", "h", "after") == correct[None]).all()
    assert unpack_outcomes(pack_outcomes([])).size == 0
    with pytest.raises(UsageError, match="not kept"):
        a_result().outcomes("knn", "h", "after")


def test_tables():
    measurements = [
        Measurement("positive_cosine", "h", "after", 0.5),
        Measurement("representation_std", "h", "after", 0.0512),
        Measurement("rankme", "h", "before", 12.84),
        Measurement("rankme", "h", "after", 18.71),
        Measurement("knn", "h", "before", 0.838, protocol={"k": 20}),
        Measurement("knn", "z", "after", 0.5, protocol={"k": 20}),
    ]
    result = a_result(measurements=measurements)
    lines = result.table().splitlines()
    assert lines[0].split() == ["h", "before", "h", "after", "z", "before", "z", "after"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "20-NN accuracy",
        "RankMe",
        "representation std",
        "positive cosine",
    ]
    assert lines[1].split()[2:] == ["0.8380", "–", "–", "0.5000"]
    assert lines[2].split()[1:] == ["12.8", "18.7", "–", "–"]
    assert len({len(line) for line in lines[:2]}) == 1
    markdown = result.to_markdown().splitlines()
    assert markdown[0] == "|  | h before | h after | z before | z after |"
    assert markdown[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert markdown[3] == "| RankMe | 12.8 | 18.7 | – | – |"
    assert Results().table()


def test_history_and_geometry_survive_the_file_and_are_left_out_while_empty(tmp_path):
    plain = json.loads(a_result().save(tmp_path).read_text())
    assert not {"history", "geometry"} & set(plain)
    assert Results.load(tmp_path) == a_result()
    history = [{"step": 0, "rankme_h": 3.0}, {"step": 10, "rankme_h": None}]
    geometry = {"orbits": {"h": [[[0.0, 1.0]]]}, "collapse": {"step": 10, "cause": "temperature"}}
    a_result(history=history, geometry=geometry).save(tmp_path)
    loaded = Results.load(tmp_path)
    assert loaded.history == history
    assert loaded.geometry == geometry
    a_result(history=[{"step": 0, "std_z": float("nan")}], geometry={"covariance": {"h": np.eye(1)}}).save(tmp_path)
    assert Results.load(tmp_path).history == [{"step": 0, "std_z": None}]
    assert Results.load(tmp_path).geometry == {"covariance": {"h": [[1.0]]}}


@pytest.mark.parametrize("entry", [{"history": {}}, {"history": [{"rankme_h": 1}]}, {"history": [3]}, {"geometry": []}])
def test_damage_of_history_and_geometry_is_named(tmp_path, entry):
    with pytest.raises(AdapterFileError, match=r"results\.json is damaged"):
        Results.load(damaged(tmp_path, lambda content: content.update(entry)))


def adapter(**changed):
    return {
        "head": "mlp",
        "head_options": {"depth": 2},
        "backbone_adapter": {"r": 4, "inference_mode": False},
        **changed,
    }


def measured(when, **changed):
    return Results(config={"base_model": "me/vit", "adapter": adapter(**changed)}, measurements=[knn("h", when, 0.5)])


def test_merge_takes_what_training_sets_from_the_later_evaluation():
    trained = measured("after", objective={"name": "byol"}, regularizers={"koleo": {"weight": 0.1}})
    planned = measured("before", objective={"name": "nt_xent"})
    for merged in (measured("before").merge(trained), trained.merge(measured("before")), planned.merge(trained)):
        assert merged.config == trained.config
    reloaded = measured(
        "after", inference_mode=True, backbone_adapter={"r": 4, "inference_mode": True, "revision": None}
    )
    assert measured("before", fingerprint={"shapes": "ab"}, inference_mode=False).merge(
        measured("after", fingerprint={"shapes": "ab", "sha256": "cd"}, **{})
    )
    assert measured("before").merge(reloaded).config["adapter"]["inference_mode"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"head_options": {"depth": 3}}, r"config\['adapter'\]\['head_options'\]\['depth'\] is 2 and 3\."),
        ({"backbone_adapter": {"r": 8}}, r"\['backbone_adapter'\]\['r'\] is 4 and 8\."),
        ({"predictor": {"head": "mlp"}}, r"config\['adapter'\]\['predictor'\] is nothing and"),
        ({"head": "x" * 5000}, r"\['head'\] is mlp and x+"),
        ({"objective": {"name": "byol"}}, r"\['objective'\]\['name'\] is nt_xent and byol"),
        ({"fingerprint": {"shapes": "other"}}, r"\['fingerprint'\]\['shapes'\] is ab and other"),
    ],
)
def test_merge_names_the_one_setting_that_differs(changed, said):
    kept = {"objective": {"name": "nt_xent"}, "fingerprint": {"shapes": "ab"}}
    with pytest.raises(UsageError, match=said) as refusal:
        measured("after", **kept).merge(measured("after", **{**kept, **changed}))
    assert len(str(refusal.value)) < 250


def test_missing_measures_are_kept_and_old_files_have_none(tmp_path):
    results = a_result(missing=[Missing("lidar", layer, "after", "one view", "digits") for layer in ("h", "z")])
    path = results.save(tmp_path)
    loaded = Results.load(path)
    assert loaded.missing == results.missing
    assert "Not measured: LiDAR of h and z after training on digits: one view." in loaded.to_markdown()
    assert a_result().merge(loaded, loaded).missing == results.missing
    content = json.loads(path.read_text())
    content["missing"][0]["reason"] = None
    path.write_text(json.dumps(content))
    with pytest.raises(AdapterFileError, match="reason"):
        Results.load(path)
    del content["missing"]
    path.write_text(json.dumps(content))
    assert Results.load(path).missing == []


def test_merge_keeps_histories_of_seeds_apart_and_each_step_of_one_seed_once():
    rows = [{"step": 0, "rankme_h": 3.0}, {"step": 10, "rankme_h": 4.0}]
    one = a_result(history=rows)
    assert a_result().merge(one).history == one.merge(a_result()).history == one.merge(one).history == rows
    later = a_result(history=[{"step": 10, "rankme_h": 5.0}, {"step": 20, "rankme_h": 6.0}])
    assert one.merge(later).history == [*rows, {"step": 20, "rankme_h": 6.0}]
    other = a_result(seeds=[1], measurements=[], history=[{"step": 0, "rankme_h": 7.0}])
    third = a_result(seeds=[2], measurements=[], history=[{"step": 0, "rankme_h": 8.0}])
    tagged = [(row["seed"], row["step"], row["rankme_h"]) for row in one.merge(other, third).history]
    assert tagged == [(0, 0, 3.0), (0, 10, 4.0), (1, 0, 7.0), (2, 0, 8.0)]
    assert "seed" not in rows[0]
    before = a_result(seeds=[0, 1], measurements=[])
    assert [row["seed"] for row in before.merge(one, other).history] == [0, 0, 1]


def test_merge_of_geometry_takes_the_first_and_joins_scalars():
    first = a_result(geometry={"orbits": {"h": 1}, "scalars": {"nullity": 3}})
    second = a_result(geometry={"orbits": {"z": 2}, "collapse": {"step": 3}, "scalars": {"nullity": 4, "gap": 0.1}})
    merged = first.merge(second)
    assert merged.geometry == {"orbits": {"h": 1}, "collapse": {"step": 3}, "scalars": {"nullity": 3, "gap": 0.1}}
    assert first.geometry["scalars"] == {"nullity": 3}
    assert a_result().merge(a_result()).geometry == {}


def test_intermediate_layers_have_a_table_of_their_own():
    inner = [knn(f"block_{i}", when, i / 10) for when in ("before", "after") for i in (2, 10)]
    result = a_result()
    plain = result.table()
    result.measurements = [*inner, *result.measurements, Measurement("rankme", "block_2", "after", 7.0)]
    assert result.layers == ["block_2", "block_10", "h", "z"]
    main, layers, verdicts = result.table().split("\n\n")
    assert f"{main}\n\n{verdicts}" == plain
    assert verdicts.startswith(
        "The representation got better: 20-NN accuracy of h on digits went from 0.8380 to 0.9000 ("
    )
    assert [line.split() for line in layers.splitlines()[1:]] == [
        ["block_2", "0.2000", "0.2000", "7.0"],
        ["block_10", "1.0000", "1.0000", "–"],
        ["h", "0.8380", "0.9000", "–"],
        ["z", "–", "–", "18.7"],
    ]
    assert result.to_markdown().split("\n\n")[1].splitlines()[-1] == "| z | – | – | 18.7 |"


def test_what_a_probe_chose_does_not_part_before_from_after():
    before, after = (
        Measurement("linear", "h", when, value, "digits", "accuracy", {"seed": 0, "chosen": {"l2": l2}, "rows": 10})
        for when, value, l2 in (("before", 0.8, 0.1), ("after", 0.9, 0.01))
    )
    assert before.key == after.key
    assert before.settings == {"rows": 10}
    assert [row[:3] for row in Results(measurements=[before, after]).cells()[1:]] == [
        ["linear accuracy", "0.8000", "0.9000"]
    ]


@pytest.mark.parametrize("damage", ["200:zz", "9999999999999:ff", "x:ff"])
def test_damaged_outcomes_are_refused(damage):
    result = a_result(measurements=[Measurement("knn", "h", "after", 0.4, outcomes=damage)])
    with pytest.raises(UsageError, match="not kept, or are damaged"):
        result.outcomes("knn", "h", "after")


@pytest.mark.parametrize(
    ("limit", "most", "content", "message"),
    [
        ("RESULTS_TEXT", 10, {"config": {"a": [{"b": "x" * 11}]}}, "a text of 11 letters, more than 10: 'xxxxxxxxxxx'"),
        ("RESULTS_TEXTS", 200, {"notes": [f"note {i}" for i in range(30)]}, "letters, more than 200"),
        ("RESULTS_ROWS", 8, {"measurements": [{"outcomes": "8:ff"}] * 2}, "answers of 32 rows, more than 8"),
        ("RESULTS_VALUES", 30, {"seeds": [1] * 30}, "values, more than 30"),
    ],
)  # fmt: skip
def test_what_costs_when_it_is_shown_is_bounded(tmp_path, monkeypatch, limit, most, content, message):
    path = Results(versions={}).save(tmp_path)
    assert Results.load(path).notes == []
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    monkeypatch.setattr(limits, limit, most)
    with pytest.raises(AdapterFileError, match=message):
        Results.load(path)
