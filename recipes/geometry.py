"""What a head does to the geometry of representations: the experiments of "The Geometry of Projection Heads"
(arXiv 2605.17180) on trained adapters, at the size of two CPU cores, and the analysis of any saved adapter.

    python recipes/geometry.py train          # 27 adapters, with a LoRA on vit_nano or the head alone; 15 minutes
    python recipes/geometry.py guillotine     # what probes read from h and from z; 5 minutes
    python recipes/geometry.py curvature      # of a rotation sweep
    python recipes/geometry.py orbits         # how far h and z move while an image turns
    python recipes/geometry.py depth          # heads of one to three layers
    python recipes/geometry.py adapter --adapter out/simclr_vit      # a folder or a Hub id
    python recipes/geometry.py head --adapter out/dino_vit_s16       # the head alone: J's spectrum, its curvature

Images are scikit-learn's handwritten digits, which have an upright position, so that rotation is a nuisance with a
meaning; ``--dataset`` takes any other. Adapters and finished measurements are kept below runs/geometry and not made
again. Results go to recipes/results/geometry/results.json and into figures beside it (``recipes/geometry_table.py``
makes the text). ``adapter`` and ``head`` write the geometry into the results.json of an adapter, a converted one
(recipes/convert.py) as well, and render its report.html. ``head`` asks of the images nothing but their h, so that it is
the cheaper one for large backbones. The experiments themselves are `hfproj.studies.head_geometry`.
"""

from hfproj import cli

cli.start(__file__)  # answers --help before anything large is imported

import argparse
import warnings
from pathlib import Path

from hfproj.studies.head_geometry.analysis import analyse
from hfproj.studies.head_geometry.measures import curvature, depth, guillotine, orbits
from hfproj.studies.head_geometry.models import train
from hfproj.studies.head_geometry.study import SEEDS, Study

RUNS = Path("runs/geometry")
OUT = cli.results_folder(__file__, "results/geometry")
MEASURES = {"guillotine": guillotine, "curvature": curvature, "orbits": orbits, "depth": depth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", *MEASURES, "adapter", "head"))
    parser.add_argument("--dataset", default="digits", help="What hfproj.load_image_dataset takes.")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--adapter", help="Of adapter and head: a folder that holds one, or a Hub id.")
    parser.add_argument("--output_dir", help="Of adapter and head: where to write, if not into its folder.")
    options = cli.arguments(parser)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*|keep_original=False.*")
    study = Study(options.dataset, RUNS, OUT, options.seeds)
    if options.what == "train":
        train(study)
    elif options.what in MEASURES:
        study.save(options.what, MEASURES[options.what](study))
    elif options.adapter is None:
        parser.error(f"{options.what} needs --adapter")
    else:
        analyse(options.adapter, options.dataset, options.output_dir, head_only=options.what == "head")


if __name__ == "__main__":
    cli.run(main)
