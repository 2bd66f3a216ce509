"""``hfproj autopsy``."""

import argparse
from pathlib import Path
from typing import Any

from hfproj.commands.options import options as parsed


def parser() -> argparse.ArgumentParser:
    """Return the flags of ``hfproj autopsy``."""
    text = (
        "hfproj autopsy FOLDER DATA: the head of an adapter layer by layer, and where to cut it.\n\n"
        "    hfproj autopsy out/simclr_vit digits --views rotation_degrees=30,flip_probability=0 --card\n\n"
        "It writes autopsy.json and autopsy.png beside the adapter."
    )
    parser = argparse.ArgumentParser(description=text, add_help=False)
    parser.add_argument("folder", help="A folder with an adapter, or a Hub id.")
    parser.add_argument("data", help="Labelled images with the splits train and test: digits, a Hub id, a folder.")
    views = "Options of hfproj.ImageViews whose transforms are asked for; without a value its defaults."
    parser.add_argument("--views", nargs="?", const="", help=views)
    parser.add_argument("--layers", help="Blocks of the backbone instead of the last but one, such as 0,2,4.")
    parser.add_argument("--image_column", help="Column of the images.")
    parser.add_argument("--label_column", help="Column of the labels.")
    parser.add_argument("--limit", type=int, help="Take this many random images of each split.")
    parser.add_argument("--seed", type=int, default=0, help="Of the halves that choose and confirm.")
    parser.add_argument("--out", help="Folder to write into instead.")
    parser.add_argument("--card", action="store_true", help="Add it to results.json and card of FOLDER.")
    return parser


def autopsy(given: argparse.Namespace) -> None:
    """Print the table, and write JSON, picture and on request the card.

    Raises:
        UsageError: If there is no adapter or no data of this name, or with --card no results.json.
    """
    import hfproj
    from hfproj import plots
    from hfproj.errors import UsageError
    from hfproj.reporting import write_card

    results = hfproj.Results.load(given.folder) if given.card else None
    columns = {"image_column": given.image_column, "label_column": given.label_column, "limit": given.limit}
    train, test = (hfproj.load_image_dataset(given.data, split=split, **columns) for split in ("train", "test"))
    model = hfproj.from_pretrained(given.folder)
    options: Any = parsed(given.views or "")
    views = None if given.views is None else hfproj.ImageViews.for_model(model, **options)
    blocks = given.layers.split(",") if given.layers else None
    layers = blocks and [int(block) if block.lstrip("-").isdigit() else block for block in blocks]
    found = hfproj.autopsy(
        model, train=train, test=test, views=views, layers=layers, seed=given.seed, dataset=given.data, progress=True
    )
    print(found.table())
    out = Path(given.out or given.folder)
    if not out.is_dir() and not given.out:
        raise UsageError(f"Expected --out for what is written, since {given.folder!r} is no folder here.")
    plots.plot_autopsy(found, found.save(out).with_suffix(".png"))
    print(f"\nWrote autopsy.json and autopsy.png into {out}.")
    if results is not None:
        results.geometry["autopsy"] = found.to_dict()
        print(f"Wrote {write_card(results, given.folder)}.")
