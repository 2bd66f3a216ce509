"""An augmentation that destroys a feature: does the projection head keep the loss of it from the representation?

    python recipes/dropped_digits.py --images uoft-cs/cifar10

SimCLR on CIFAR-10 with digits blended onto the images, which a view drops with some probability; probes read digit and
class from h and from z. The experiment and its source: `hfproj.studies.dropped_digits`.

27 runs of a minute of one core each; finished ones are kept below --runs. Writes dropped_digits.json, .md
and four figures below recipes/benchmarks/results.
"""

from hfproj import cli

cli.start(__file__)  # answers --help before anything large is imported

from dataclasses import dataclass, field
from pathlib import Path

from hfproj.studies.dropped_digits import study

OUT = cli.results_folder(__file__, "benchmarks/results/dropped_digits")


@dataclass
class Recipe:
    """Flags of this recipe."""

    images: str = field(metadata={"help": "CIFAR-10: a Hub id, or a folder of parquet files."})
    runs: str = field(default="runs/dropped_digits", metadata={"help": "Finished runs are kept here."})


def main() -> None:
    (recipe,) = cli.parse(Recipe)
    study(recipe.images, Path(recipe.runs), OUT)


if __name__ == "__main__":
    cli.run(main)
