"""``hfproj report`` and ``hfproj push``."""

import argparse
import shutil
import tempfile
from pathlib import Path

from hfproj.errors import UsageError


def report_parser() -> argparse.ArgumentParser:
    """Return the flags of ``hfproj report``."""
    text = "hfproj report FOLDER: write report.html, one page of a run, from its results.json and history.parquet."
    parser = argparse.ArgumentParser(description=text, add_help=False)
    parser.add_argument("folder", help="The output folder of a run.")
    parser.add_argument("--path", help="Where to write the page instead.")
    return parser


def report(options: argparse.Namespace) -> None:
    """Write the page.

    Raises:
        UsageError: If there is no results.json.
    """
    import hfproj

    print(f"Wrote {hfproj.report(options.folder, path=options.path)}.")


def push_parser() -> argparse.ArgumentParser:
    """Return the flags of ``hfproj push``."""
    text = (
        "hfproj push FOLDER REPO: an adapter with its card and results to the Hub, in one commit.\n\n"
        "    hfproj push out/simclr_vit me/digits-simclr --private --license apache-2.0\n\n"
        "The token is that of `hf auth login`, or HF_TOKEN. Everything is checked before anything is sent."
    )
    parser = argparse.ArgumentParser(description=text, add_help=False)
    parser.add_argument("folder", help="The output folder of a run, or any folder with an adapter.")
    parser.add_argument("repo", help="user/name or organisation/name.")
    parser.add_argument("--private", action="store_true", help="Make the repository a private one, if it is new.")
    parser.add_argument("--license", help="Of the adapter, as the Hub writes it: apache-2.0, mit …")
    parser.add_argument("--revision", help="Branch to push to; by default main.")
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request instead.")
    parser.add_argument("--message", help="Title of the commit.")
    return parser


def push(options: argparse.Namespace) -> None:
    """Push what lies in a folder; objective and EMA teacher, which a later training goes on from, go along.

    Raises:
        UsageError: If there is no adapter, no token, or something that can't be pushed; nothing was sent.
        HubError: If the Hub refused or could not be reached.
    """
    from hfproj import filenames

    folder = Path(options.folder)
    if not (folder / filenames.ADAPTER_CONFIG).is_file():
        missing = f"no {filenames.ADAPTER_CONFIG} in it" if folder.is_dir() else "no such folder"
        raise UsageError(f"Expected FOLDER to hold an adapter, got {options.folder!r} ({missing}).")
    from hfproj.hub.push import Target, send
    from hfproj.hub.staging import stage

    private = options.private or None
    target = Target(options.repo, revision=options.revision, create_pr=options.create_pr, private=private)
    import hfproj

    model = hfproj.from_pretrained(folder)
    results = hfproj.Results.load(folder) if (folder / filenames.RESULTS).is_file() else None
    with tempfile.TemporaryDirectory(prefix="hfproj-") as staging:
        staged = stage(model, Path(staging), options.repo, results=results, license=options.license)
        for name in (filenames.OBJECTIVE, filenames.EMA):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staged.folder / name)
        commit = send(staged, target, commit_message=options.message, commit_description=None)
    print(f"Pushed to {commit.pr_url or commit.repo_url.url if commit else options.repo}.")
