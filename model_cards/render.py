"""Makes the cards here again from their results.json: after a change of what a card says, not of what was measured.

All of them::

    python model_cards/render.py

one, with a licence that goes into its results::

    python model_cards/render.py vit_nano_digits_simclr --license apache-2.0
"""

import argparse
from pathlib import Path

from hfproj import Results, write_card

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Write the cards that the command names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="*", default=sorted(p.parent.name for p in HERE.glob("*/results.json")))
    parser.add_argument("--license", help="Write this licence into the results, and so onto the card.")
    options = parser.parse_args()
    for name in options.cards:
        print(write_card(Results.load(HERE / name), HERE / name, license=options.license))


if __name__ == "__main__":
    main()
