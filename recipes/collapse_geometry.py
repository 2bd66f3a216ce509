"""Collapse, and the curvature by which a head leaves it: "The Geometry of Projection Heads" (arXiv 2605.17180), its
experiments on dynamics, at the size of two CPU cores.

    python recipes/collapse_geometry.py collapse    # SGD, gradient flow, constructed equilibria; 45 minutes
    python recipes/collapse_geometry.py hessian     # extreme eigenvalues along training; 8 minutes
    python recipes/collapse_geometry.py conditioning    # condition number of h of a finished hessian; 2 minutes

What is trained and measured: `hfproj.studies.head_geometry.collapse`. Finished runs are kept below runs/geometry and
not run again; results go to recipes/results/geometry/results.json and into figures beside it
(``recipes/geometry_table.py`` makes the text).
"""

from hfproj import cli

cli.start(__file__)  # answers --help before anything large is imported

import argparse
from pathlib import Path

from hfproj.files import installed_versions
from hfproj.studies.head_geometry.collapse import collapse, conditioning, hessian
from hfproj.studies.head_geometry.study import SEEDS, Study

RUNS = Path("runs/geometry")
OUT = cli.results_folder(__file__, "results/geometry")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collapse", "hessian", "conditioning"))
    parser.add_argument("--dataset", default="digits", help="What hfproj.load_image_dataset takes.")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    options = cli.arguments(parser)
    study = Study(options.dataset, RUNS, OUT, options.seeds)
    if options.what == "conditioning":
        recorded = study.recorded("hessian")
        rows = conditioning(study, recorded["runs"])
        study.save("hessian", {**recorded, "runs": rows, "conditioning": {"versions": installed_versions()}})
        return
    study.save(options.what, {"collapse": collapse, "hessian": hessian}[options.what](study))


if __name__ == "__main__":
    cli.run(main)
