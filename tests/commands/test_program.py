"""The command `hfproj`: help, ls and cp without torch, recipes by name, and mistakes in one line."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hfproj
from hfproj.commands import program, recipes, tables

TABLE = tables.read()
ROOT = Path(hfproj.__file__).resolve().parents[1]


def command(monkeypatch, *words):
    """Run the command in this process, which has imported everything already."""
    monkeypatch.setattr("sys.argv", ["hfproj", *map(str, words)])
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delenv("HFPROJ_RECIPE", raising=False)
    monkeypatch.setattr("os.environ", dict(os.environ))
    program.main()


def mistake(monkeypatch, capsys, *words):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *words)
    assert end.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    return last


def test_what_answers_without_torch(tmp_path):
    """One process runs all of them; torch, transformers and PEFT never come."""
    answered = [
        ["--help"], ["--version"], ["ls"], *(["ls", kind] for kind in recipes.KINDS), ["cp", "simclr_vit", "mine.py"],
        ["run"], *(["run", name, "--help"] for name in TABLE["recipes"]), ["run", "simclr_vit", "--help-all"],
        ["run", "mine.py", "--help"],
        *([name, "--help"] for name in ("embed", "push", "report", "probe", "convert", "autopsy")),
    ]  # fmt: skip
    beside = [[str(recipes.folder() / f"{name}.py"), "--help"] for name in TABLE["recipes"]]
    code = (
        "import contextlib, io, json, runpy, sys\n"
        "from hfproj.commands import program\n"
        "def answer(call):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "        call()\n"
        "    large = [n for n in ('torch', 'transformers', 'peft') if n in sys.modules]\n"
        "    return len(out.getvalue().splitlines()), large\n"
        "found = []\n"
        f"for words in {answered!r}:\n"
        "    sys.argv = ['hfproj', *words]\n"
        "    found.append(answer(program.main))\n"
        f"for words in {beside!r}:\n"
        "    sys.argv = words\n"
        "    found.append(answer(lambda: runpy.run_path(words[0], run_name='__main__')))\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    imported = {" ".join(words): modules for words, (_, modules) in zip(answered + beside, found) if modules}
    assert not imported
    lines = {" ".join(words): count for words, (count, _) in zip(answered, found)}
    assert min(lines.values()) >= 1
    assert lines["run simclr_vit --help"] == lines["run mine.py --help"] < 80 < lines["run simclr_vit --help-all"]
    assert (tmp_path / "mine.py").read_bytes() == (recipes.folder() / "simclr_vit.py").read_bytes()


def test_the_table_is_that_of_the_code():
    """After a change: python -m hfproj.commands.tables"""
    made = tables.made(ROOT / "recipes")
    assert made["names"] == TABLE["names"]
    assert list(made["recipes"]) == list(TABLE["recipes"])
    version = importlib.metadata.version("transformers")
    for name, recipe in json.loads(json.dumps(made["recipes"])).items():
        known = TABLE["recipes"][name]
        if known["transformers"] not in ("", version):  # what transformers brings is another version's
            recipe["flags"] = [flag for flag in recipe["flags"] if flag[0].lstrip("-") in known["shown"]]
            known = known | {"flags": [flag for flag in known["flags"] if flag[0].lstrip("-") in known["shown"]]}
            recipe["transformers"] = known["transformers"]
        assert recipe == known, name


def test_what_ls_lists_is_what_python_lists(monkeypatch, capsys):
    for kind in ("heads", "objectives", "regularizers", "probes", "presets"):
        command(monkeypatch, "ls", kind)
        listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert listed == {name: line.strip() for name, line in getattr(hfproj, f"list_{kind}")().items()}


def test_the_help_of_a_recipe(monkeypatch, capsys):
    command(monkeypatch, "run", "simclr_vit", "--help")
    text = capsys.readouterr().out
    shown = TABLE["recipes"]["simclr_vit"]["shown"]
    assert 25 <= len(shown) <= 35
    assert all(f"  --{name} " in text for name in shown)
    assert "hfproj run simclr_vit --objective vicreg --regularizers werank=0.01" in text
    assert "recipes/simclr_vit.py" not in text  # which a wheel has not there
    assert "hfproj run simclr_vit --num_processes 2 " in text
    command(monkeypatch, "run", "simclr_vit", "--help-all")
    text = capsys.readouterr().out
    assert "  --head_options " in text
    for refused in (
        "label_smoothing_factor",
        "auto_find_batch_size",
        "remove_unused_columns",
        "include_for_metrics",
        "do_eval",
    ):
        assert f"--{refused}" not in text


def test_a_changed_copy_answers_for_itself(tmp_path, monkeypatch, capsys):
    copy = recipes.copy("accelerate_loop", str(tmp_path / "mine.py"))
    copy.write_text(copy.read_text().replace('"--epochs", type=int', '"--passes", type=int'))
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "run", copy, "--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "--passes INT" in text
    assert "--epochs" not in text


def test_run_and_its_record(tmp_path, monkeypatch, capsys):
    """A copy with a main of its own: what it gets, and what command_line says of it."""
    own = tmp_path / "own.py"
    own.write_text(
        '"""Mine."""\nimport argparse, sys\nfrom hfproj import cli\nfrom hfproj.files import command_line\n'
        "def main():\n"
        '    parser = argparse.ArgumentParser(description=__doc__)\n    parser.add_argument("--seed", type=int)\n'
        '    print(cli.arguments(parser).seed, command_line())\n    cli.write_arguments("out")\n'
        'if __name__ == "__main__":\n    cli.run(main)\n'
    )
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "run", "./own.py", "--seed", "3")
    assert capsys.readouterr().out == "3 hfproj run ./own.py --seed 3\n"
    assert (tmp_path / "out" / "arguments.yaml").read_text() == "# hfproj run ./own.py --seed 3\nseed: 3\n"
    command(monkeypatch, "run", "own.py", "out/arguments.yaml")
    assert capsys.readouterr().out.startswith("3 hfproj run own.py out/arguments.yaml")


def test_a_command_under_a_launcher(monkeypatch):
    from hfproj.files import command_line

    monkeypatch.setenv("HFPROJ_RECIPE", "probe")
    assert command_line(["/somewhere/probe.py", "--model", "x"]) == "hfproj run probe --model x"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line(["/somewhere/probe.py"]) == "hfproj run probe --num_processes 2"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert command_line(["probe.py"]) == "hfproj run probe --num_processes 1 --mixed_precision bf16"
    assert command_line(["other.py"]) == "accelerate launch --mixed_precision bf16 other.py"


def test_report(tmp_path, monkeypatch, capsys):
    hfproj.Results(command="python mine.py").save(tmp_path)
    command(monkeypatch, "report", tmp_path)
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'report.html'}.\n"
    assert "python mine.py" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rnu", "Unknown command 'rnu'. Did you mean 'run'? Available: ls, cp, run"),
        ("simclr_vit", "Did you mean 'run simclr_vit'?"),
        ("ls preset", "Unknown kind 'preset'. Did you mean 'presets'?"),
        ("ls heads mlp", "Unknown arguments: 'mlp'"),
        ("cp", "Expected RECIPE, got none"),
        ("cp simclr", "Unknown recipe 'simclr'. Did you mean 'simclr_vit'?"),
        ("cp probe there.py", "Expected a new file to copy to, got 'there.py', which exists"),
        ("cp probe there.py/x.py", "can be written to, got 'there.py/x.py'"),
        ("cp probe x.txt", "Expected the name of a Python file or a folder to copy to, got 'x.txt'"),
        ("run simclr_vti", "Unknown recipe 'simclr_vti'. Did you mean 'simclr_vit'?"),
        ("run simclr_vit.py", "got 'simclr_vit.py', where no file is; simclr_vit ships: leave '.py' out"),
        ("run --seed 1", "Expected the name of a recipe behind run, got '--seed'"),
        ("run probe no.yaml", "Expected 'no.yaml' to be a file of arguments, got: No such file"),
        ("run probe", "Expected --model, got none"),
        ("convert nope.pth", "Expected --method and --output_dir, got none; --list shows the methods"),
        ("convert nope.pth --method byol", "Expected --output_dir, got none"),
        ("probe", "Expected MODEL, got none"),
        ("run simclr_vit --flip maybe", "Expected --flip to be true or false, got 'maybe'"),
        ("run simclr_vit --lr 1", "--lr (did you mean --learning_rate?)"),
        ("run simclr_vit --bs 1", "--bs (did you mean --per_device_train_batch_size?)"),
        ("run simclr_vit --batch_size 1", "--batch_size (did you mean --per_device_train_batch_size?)"),
        ("run simclr_vit --epochs 1", "--epochs (did you mean --num_train_epochs?)"),
        ("run simclr_vit --steps 1", "--steps (did you mean --max_steps?)"),
        ("run simclr_vit --wd 1", "--wd (did you mean --weight_decay?)"),
        ("run simclr_vit run.toml", "Unknown arguments: 'run.toml'. Files of arguments are .yaml, .yml, .json."),
        ("embed vit_nano notes.txt", "Expected DATA to be images, which 'vit_nano' reads, got 'notes.txt', texts"),
        ("convert", "Expected CHECKPOINT, --method and --output_dir, got none; --list shows the methods"),
        ("probe vit_nano --prob knn", "Unknown arguments: --prob (did you mean --probes?)"),
        ("report nowhere", "There is no file 'nowhere/results.json'"),
        ("push nowhere me/x", "Expected FOLDER to hold an adapter, got 'nowhere' (no such folder)"),
        ("push . me/x", "got '.' (no adapter_config.json in it)"),
        ("embed vit_nano digits --out x.csv", "Expected --out to end in .parquet or .npy, got 'x.csv'"),
        ("embed vit_nano digits --what g", "Unknown --what 'g'. Available: h, z."),
        ("embed vit_nano", "Expected DATA, got none"),
        ("run simclr_vit --num_processes two", "Expected --num_processes to be a whole number above 0, got 'two'"),
        ("run simclr_vit --num_processes", "Expected a value behind --num_processes, got none"),
        ("run simclr_vit --config_file no.yaml", "Expected --config_file to be a file of accelerate's, got 'no.yaml'"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("there.py", "run.toml", "notes.txt"):
        (tmp_path / name).write_text("")
    assert said in mistake(monkeypatch, capsys, *words.split())
