"""Files of arguments, and the arguments.yaml that a run leaves."""

import argparse
import json
from dataclasses import dataclass, field

import pytest
import yaml

from hfproj import UsageError, cli
from hfproj.commands.arguments import read_arguments


@dataclass
class Flags:
    """Flags of these tests."""

    name: str | None = field(default="a", metadata={"help": "A name."})
    learning_rate: float = field(default=0.1, metadata={"help": "A rate."})
    quiet: bool = field(default=False, metadata={"help": "A switch."})
    loud: bool = field(default=True, metadata={"help": "Another."})
    options: str | None = field(default=None, metadata={"help": "Options."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Several."})
    hub_token: str | None = field(default=None, metadata={"help": "A secret."})
    steps: int = field(default=1, metadata={"help": "A number."})


@pytest.fixture
def parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words, **options):
        monkeypatch.setattr("sys.argv", ["mine.py", *words])
        (found,) = cli.parse(Flags, **options)
        return found

    return call


def positional():
    parser = argparse.ArgumentParser(description="Words.")
    parser.add_argument("what", choices=("one", "two"))
    parser.add_argument("--several", nargs="*", type=int, default=[1])
    parser.add_argument("--switch", action="store_true")
    return parser


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_file_of_each_kind_of_value(parse, tmp_path):
    text = "name: null\nlearning-rate: 1e-3\nquiet: true\nloud: no\noptions: {a: 1, b: [x, y]}\nseeds: [-1, 2]\n"
    found = parse(write(tmp_path / "run.yaml", text + "steps: -3\n"))
    assert (found.name, found.learning_rate, found.quiet, found.loud) == (None, 1e-3, True, False)
    assert (json.loads(found.options), found.seeds, found.steps) == ({"a": 1, "b": ["x", "y"]}, [-1, 2], -3)
    write(tmp_path / "run.json", json.dumps({"learning_rate": 0.5, "options": ["x=1", "y=2"]}))
    found = parse("run.json")
    assert (found.learning_rate, found.options, found.name) == (0.5, "x=1,y=2", "a")


def test_flags_win_over_files_and_later_files_over_earlier_ones(parse, tmp_path):
    write(tmp_path / "a.yaml", "steps: 2\nname: b\nseeds: [4]")
    write(tmp_path / "b.yml", "steps: 3\n")
    found = parse("a.yaml", "b.yml", "--name", "c")
    assert (found.steps, found.name, found.seeds) == (3, "c", [4])


def test_defaults_see_what_files_hold(parse, tmp_path):
    write(tmp_path / "a.yaml", "name: preset\n")
    seen = []
    found = parse("a.yaml", defaults=lambda words: seen.extend(words) or {"steps": 7})
    assert (found.steps, found.name) == (7, "preset")
    assert seen == ["--name=preset"]


def test_positional_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.yaml", "what: one\nseveral: [3, 4]\nswitch: true\n")
    for words, expected in ((["a.yaml"], "one"), (["two", "a.yaml"], "two"), (["a.yaml", "two"], "two")):
        monkeypatch.setattr("sys.argv", ["mine.py", *words])
        found = cli.arguments(positional())
        assert (found.what, found.several, found.switch) == (expected, [3, 4], True)
    cli.write_arguments("out")
    monkeypatch.setattr("sys.argv", ["mine.py", "out/arguments.yaml"])
    assert cli.arguments(positional()) == found


def test_what_a_run_leaves_gives_the_same_run(parse, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-a-test-1234")
    words = ("--learning_rate", "1e-3", "--quiet", "--options", "a=1", "--seeds", "1", "2", "--loud", "0")
    first = parse(*words, "--hub_token", "secret-of-a-test-1234", shown="name steps")
    path = cli.write_arguments("out")
    text = path.read_text()
    given = {"learning_rate": 0.001, "quiet": True, "loud": False, "options": "a=1", "seeds": [1, 2]}
    assert yaml.safe_load(text) == {**given, "hub_token": "$HF_TOKEN"}
    assert text.splitlines()[0].startswith("# python mine.py --learning_rate 1e-3 --quiet")
    assert text.splitlines()[-3:] == ["# As they were by default:", "# name: a", "# steps: 1"]
    assert "secret-of-a-test" not in text
    assert parse(str(path)) == first
    monkeypatch.delenv("HF_TOKEN")
    assert parse(str(path)).hub_token is None  # the one that is logged in


def test_what_was_set_to_null_stays_so(parse, tmp_path):
    write(tmp_path / "a.yaml", "name: null\n")
    assert parse("a.yaml").name is None
    assert parse(str(cli.write_arguments("out"))).name is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\n", r"'run.yaml' can't be read: .*line 2, column 1"),
        ("- a\n- b\n", "Expected 'run.yaml' to hold flags and values.*got a list"),
        ("1: a\n", "got a name that is no text"),
        ("\x00", "can't be read"),
        ("lerning_rate: 1\n", "run.yaml: Unknown flag 'lerning_rate'. Did you mean 'learning_rate'?"),
        ("steps: many\n", "Expected --steps to be a whole number, got 'many'"),
        ("quiet: 7\n", "Expected --quiet to be true or false, got '7'"),
        ("steps: 1\nname: b\nsteps: 2\n", "'run.yaml' can't be read: 'steps' stands twice"),
        ("options: {a: 1, a: 2}\n", "'a' stands twice"),
        ("options: [[1]]\n", "run.yaml: expected options to be one value or a list of values"),
        ("a: " + "x" * 2**20, "more than 1 MB"),
    ],
)
def test_mistakes_in_files(parse, tmp_path, text, said):
    write(tmp_path / "run.yaml", text)
    with pytest.raises(UsageError, match=said) as caught:
        parse("run.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{a",
            r"'run.json' can't be read: .*\. Expected flags and values in braces, such as {\"learning_rate\": 0.001}",
        ),
        ('{"steps": 1, "steps": 2}', "'run.json' can't be read: 'steps' stands twice"),
    ],
)
def test_mistakes_in_files_of_json(parse, tmp_path, text, said):
    write(tmp_path / "run.json", text)
    with pytest.raises(UsageError, match=said):
        parse("run.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lerning_rate", "1"], "Unknown arguments: --lerning_rate (did you mean --learning_rate?)"),
        (
            ["--learn", "1"],
            "Unknown arguments: --learn (did you mean --learning_rate?)",
        ),  # no abbreviations: presets would not see them
        (["--name", "x", "run.yaml"], "A file of arguments stands before the flags"),
        (["--steps"], "Expected a value behind --steps, got none"),
        (["--steps", "1.5"], "Expected --steps to be a whole number, got '1.5'"),
        (["."], "Unknown arguments: '.'"),
    ],
)
def test_mistakes_in_flags(parse, words, said):
    with pytest.raises(UsageError) as caught:
        parse(*words)
    assert said in str(caught.value)


def test_a_folder_is_no_file_of_arguments(tmp_path):
    (tmp_path / "a.yaml").mkdir()
    with pytest.raises(UsageError, match="Is a directory"):
        read_arguments(tmp_path / "a.yaml")
