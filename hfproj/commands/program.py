"""The command ``hfproj``: which words are which command."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence

import hfproj
from hfproj.commands import outcome, recipes
from hfproj.commands.arguments import SUFFIXES, arguments, help_wanted, split_files
from hfproj.errors import UsageError

HELP = """\
hfproj: projection heads of self-supervised learning as PEFT adapters

  hfproj run simclr_vit                          train a head on handwritten digits: no network needed
  hfproj run simclr_vit --num_processes 4        the same on four GPUs, or on CPUs where there is none
  hfproj run simclr_vit run.yaml --seed 1        arguments from a file; each run leaves its own as arguments.yaml
  hfproj cp simclr_vit mine.py                   a copy to change; then: hfproj run ./mine.py
  hfproj embed out/simclr_vit my/images          h or z of images or texts, as .parquet or .npy

Commands (hfproj COMMAND --help):
  ls [KIND]              what there is: heads, objectives, regularizers, probes, presets, studies …
  cp RECIPE [TO]         copy a recipe
  run RECIPE …           run a recipe, or a copy of one
  probe MODEL …          what a backbone or an adapter knows: probes of h and z
  reproduce STUDY …      a table of a paper: trained, measured, judged
  report FOLDER          the page of a run, from its results.json
  convert CHECKPOINT …   an official checkpoint with its head as an adapter
  push FOLDER REPO       an adapter to the Hub, with its card
  embed MODEL DATA       features of a data set as a file
  autopsy FOLDER DATA    a head layer by layer: rank, labels, augmentations, where to cut
"""


def main() -> None:
    """Run the command of ``sys.argv``."""
    try:
        outcome.run(lambda: _main(sys.argv[1:]))
        sys.stdout.flush()
    except BrokenPipeError:  # `hfproj ls presets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _main(words: Sequence[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
    elif words[0] in ("--version", "-V"):
        print(f"hfproj {hfproj.__version__}")
    elif words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        if words[0] in recipes.tables.read()["recipes"]:
            hint = f" Did you mean 'run {words[0]}'?"
        raise UsageError(f"Unknown command {words[0]!r}.{hint} Available: {', '.join(COMMANDS)}.")
    else:
        COMMANDS[words[0]](list(words[1:]))


def _options(command: str, words: Sequence[str], parser: argparse.ArgumentParser) -> argparse.Namespace:
    sys.argv = [f"hfproj {command}", *words]
    return arguments(parser)


def _ls(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description="hfproj ls [KIND]: what is registered.", add_help=False)
    parser.add_argument("kind", nargs="?", help=f"One of {', '.join(recipes.KINDS)}; none: the names of all.")
    sys.stdout.write(recipes.listing(_options("ls", words, parser).kind))


def _cp(words: list[str]) -> None:
    text = "hfproj cp RECIPE [TO]: a copy of a recipe, to be changed. hfproj run ./COPY.py runs it."
    parser = argparse.ArgumentParser(description=text, add_help=False)
    parser.add_argument("recipe", help="Its name, see hfproj ls recipes.")
    parser.add_argument("to", nargs="?", help="A new file, or a folder; none: the working directory.")
    options = _options("cp", words, parser)
    target = recipes.copy(options.recipe, options.to)
    shown = target if target.is_absolute() else f"./{target}"
    print(f"Copied to {shown}. After your changes: hfproj run {shown}")


def _run(words: list[str]) -> None:
    if not words or words[0].startswith("-"):
        if words and words[0] not in ("-h", "--help"):
            raise UsageError(f"Expected the name of a recipe behind run, got {words[0]!r}; flags follow the name.")
        print("hfproj run RECIPE [FILE.yaml] [FLAGS]: a recipe by name, or a copy by its path. Its flags: hfproj run")
        print("RECIPE --help. With --num_processes or --config_file accelerate launches it on several processes.\n")
        sys.stdout.write(recipes.listing("recipes"))
    else:
        recipes.run_recipe(words[0], words[1:])


def _probe(words: list[str]) -> None:
    named = words and not words[0].startswith("-") and not words[0].endswith(SUFFIXES)
    flags = {word.partition("=")[0] for word in words}
    if not named and "--model" not in flags and not help_wanted(words) and not split_files(words)[0]:
        raise UsageError("Expected MODEL, got none. See --help.")
    recipes.run_recipe("probe", ["--model", *words] if named else words)


def _reproduce(words: list[str]) -> None:
    recipes.run_recipe("reproduce", words)


def _convert(words: list[str]) -> None:
    recipes.run_recipe("convert", words)


def _report(words: list[str]) -> None:
    from hfproj.commands import sharing

    sharing.report(_options("report", words, sharing.report_parser()))


def _push(words: list[str]) -> None:
    from hfproj.commands import sharing

    sharing.push(_options("push", words, sharing.push_parser()))


def _embed(words: list[str]) -> None:
    from hfproj.commands import embedding

    embedding.embed(_options("embed", words, embedding.parser()))


def _autopsy(words: list[str]) -> None:
    from hfproj.commands import inside

    inside.autopsy(_options("autopsy", words, inside.parser()))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "ls": _ls, "cp": _cp, "run": _run, "probe": _probe, "report": _report, "convert": _convert, "push": _push,
    "embed": _embed, "autopsy": _autopsy, "reproduce": _reproduce,
}  # fmt: skip
