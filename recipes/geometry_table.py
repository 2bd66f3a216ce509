"""What recipes/geometry.py and recipes/collapse_geometry.py measured, claim by claim against the paper's.

    python recipes/geometry_table.py
    python recipes/geometry_table.py --check      # compare alone: status 2 if the document is another
    python recipes/geometry_table.py --figures    # draw the figures again, too

Writes docs/geometry_study.md from recipes/results/geometry/results.json. Verdicts follow from the numbers, by the rules
in `hfproj.studies.head_geometry.claims` and `collapse_claims`.
"""

import argparse
import json
from pathlib import Path

from hfproj import cli
from hfproj.errors import UsageError
from hfproj.files import write_atomic

RESULTS = Path(__file__).resolve().parent / "results" / "geometry" / "results.json"
DOCS = Path(__file__).resolve().parents[1] / "docs" / "geometry_study.md"
DATASET = "digits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if the document is another.")
    parser.add_argument("--figures", action="store_true", help="Draw the figures again, from the same file.")
    options = parser.parse_args()
    if not RESULTS.is_file():
        raise UsageError(f"There is no {RESULTS}: run recipes/geometry.py and recipes/collapse_geometry.py first.")
    from hfproj.studies.head_geometry.document import document  # imports torch, which --help does without
    from hfproj.studies.head_geometry.figures import draw

    found = json.loads(RESULTS.read_text(encoding="utf-8"))[DATASET]
    lines = document(found, DATASET)
    text = "\n".join(lines).rstrip() + "\n"
    if options.check:
        if not DOCS.is_file() or DOCS.read_text(encoding="utf-8") != text:
            raise UsageError(f"{DOCS} is not what {RESULTS} says; run this recipe without --check.")
        print(f"{DOCS} is what the results say.")
        return
    if options.figures:
        draw(found, RESULTS.parent)
    write_atomic(DOCS, text.encode())
    print(f"Wrote {DOCS}.")


if __name__ == "__main__":
    cli.run(main)
