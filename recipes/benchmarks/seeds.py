"""The same recipe with several seeds, merged into one results.json with mean ± standard deviation, and its card.

    python recipes/benchmarks/seeds.py --output_dir model_cards/vit_nano_digits_simclr --license apache-2.0

Flags after ``--`` go to recipes/simclr_vit.py. Finished runs are kept below runs/ and not run again. The table of the
README is that of model_cards/vit_nano_digits_simclr (3 seeds; 2 CPU cores, about 3 × 2.5 minutes).
"""

import argparse
import subprocess
import sys
from pathlib import Path

from hfproj import Results
from hfproj.reporting import write_card

RECIPE = Path(__file__).resolve().parents[1] / "simclr_vit.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="Folder for results.json, spectrum.png and the card."
    )
    parser.add_argument("--license", help="Of the adapters, onto the card; the author's choice.")
    parser.add_argument("flags", nargs="*", help="Flags of the recipe, after --.")
    options = parser.parse_args()

    runs = []
    for seed in options.seeds:
        folder = Path("runs") / options.output_dir.name / str(seed)
        if not (folder / "results.json").is_file():
            command = [sys.executable, str(RECIPE), *options.flags, "--seed", str(seed), "--output_dir", str(folder)]
            subprocess.run([*command, "--disable_tqdm", "True"], check=True)
        runs.append(Results.load(folder))
    merged = runs[0].merge(*runs[1:])
    merged.command = " ".join(["accelerate launch recipes/simclr_vit.py", *options.flags, "--seed", "0"])
    merged.log = []  # that of the first run alone would be taken for all of them
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_card(merged, options.output_dir, license=options.license)
    print(merged.table())


if __name__ == "__main__":
    main()
