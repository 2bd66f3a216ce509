"""What studies of papers found, as the section of docs/reproduce.md: every study, its verdicts, and what it took.

    python recipes/benchmarks/reproduce_table.py              # writes the section from recipes/results/reproduce

The files there are written by `hfproj reproduce STUDY --output_dir recipes/results/reproduce`, and not by hand.
"""

import json
from collections import Counter
from pathlib import Path

from hfproj.files import write_atomic
from hfproj.reproduction import all_studies
from hfproj.reproduction.judging import FAILS, HOLDS, UNCLEAR
from hfproj.reproduction.running import Job

ROOT = Path(__file__).resolve().parents[2]
FOLDER, PAGE = ROOT / "recipes" / "results" / "reproduce", ROOT / "docs" / "reproduce.md"
BEGIN, END = "<!-- studies -->", "<!-- /studies -->"


def section(folder: Path = FOLDER) -> str:
    """Return the table of all studies."""
    lines = [
        "| study | asks | at scale mini: holds / fails / cannot be judged | runs | CPU hours |",
        "|---|---|---|---|---|",
    ]
    hours: dict[tuple, float] = {}
    for name, study in all_studies().items():
        file = folder / f"{name}-mini.json"
        if not file.is_file():
            lines.append(f"| `{name}` | {study.title} | – | – | – |")
            continue
        verdicts = Counter(one["verdict"] for one in json.loads(file.read_text(encoding="utf-8"))["verdicts"])
        job = Job(study, "mini", folder, {})
        runs, expected = job.records(), len(study.runs()) * len(study.scales["mini"].seeds)
        own = {
            (run["row"], run["data"], run["seed"], study.name.split(".")[0]): run["cpu_seconds"] / 3600 for run in runs
        }
        hours |= own
        counts = " / ".join(str(verdicts[kind]) for kind in (HOLDS, FAILS, UNCLEAR))
        done = f"{len(runs)}" if len(runs) == expected else f"{len(runs)} of {expected}"
        link = f"[`{name}`](../recipes/results/reproduce/{file.with_suffix('.md').name})"
        lines.append(f"| {link} | {study.title} | {counts} | {done} | {sum(own.values()):.1f} |")
    return (
        "\n".join(lines)
        + f"\n\nAll of them took {sum(hours.values()):.1f} CPU hours; runs that several studies show count once."
    )


def main() -> None:
    """Write the section."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_atomic(PAGE, f"{before}{BEGIN}\n{section()}\n{END}{after}".encode())


if __name__ == "__main__":
    main()
