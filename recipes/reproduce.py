"""A table or a figure of a paper on projection heads by one command: its rows are trained and measured, set beside the
paper's numbers, and its claims judged: holds, fails, cannot be judged.

    python recipes/reproduce.py --list                            # every table and figure, with what it asks
    python recipes/reproduce.py last_layer.table2 --scale trial   # seconds: does everything run?
    python recipes/reproduce.py last_layer.table2 --workers 2     # reduced to two CPU cores; goes on if stopped
    python recipes/reproduce.py last_layer.table2 --scale paper   # as published, on a GPU
    accelerate launch recipes/reproduce.py last_layer.table2 --scale paper       # each row on all GPUs together
    python recipes/reproduce.py last_layer.table2 --control turned               # claims turned round must fail

Data come from the Hub; --data takes a folder that holds cifar10, cifar100 … instead, or name=place. The output folder
gets the page (.md), the verdicts (.json), pictures, and the runs, which are not made again. How each scale differs from
the paper stands on the page. The studies are `hfproj.studies.papers`, the rules of the verdicts
`hfproj.reproduction.judging`.
"""

from hfproj import cli

cli.start(__file__)  # answers --help before anything large is imported

import argparse
import os
import warnings
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="Name of the study, see --list.")
    parser.add_argument("--list", action="store_true", help="Show the studies.")
    parser.add_argument("--scale", default="mini", help="paper, mini, or trial.")
    parser.add_argument("--data", action="append", default=[], help="Folder with data sets, or name=place; repeatable.")
    parser.add_argument("--rows", action="append", default=[], help="Run this row only; repeatable.")
    parser.add_argument("--seeds", nargs="*", type=int, help="In place of the scale's.")
    parser.add_argument("--workers", type=int, default=1, help="Processes that share the rows.")
    parser.add_argument("--control", help="turned: claims turned round; shuffled: labels shuffled.")
    parser.add_argument("--no_run", action="store_true", help="Only write the page of what is finished.")
    parser.add_argument("--output_dir", default="out/reproduce", help="Folder of pages, pictures and runs.")
    options = cli.arguments(parser)

    from hfproj.reproduction import list_studies, reproduce
    from hfproj.reproduction.sources import places_of

    if options.list or options.study is None:
        width = max(map(len, list_studies()))
        print("\n".join(f"{name:{width}}  {line}" for name, line in list_studies().items()))
        return
    warnings.filterwarnings("ignore", message="keep_original=False.*")
    places: dict[str, str] = {}
    for one in options.data:  # the later one counts where two name a data set
        folder = "=" not in one or Path(one).is_dir()
        places |= places_of(one if folder else dict([one.split("=", 1)]))
    found = reproduce(
        options.study, scale=options.scale, data=places or None, rows=options.rows,
        seeds=options.seeds, workers=options.workers, control=options.control, output_dir=options.output_dir,
        run=not options.no_run,
    )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{found.text}\nWritten to {found.path}.")


if __name__ == "__main__":
    cli.run(main)
