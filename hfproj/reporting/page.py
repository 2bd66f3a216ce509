"""`hfproj.report`: what a run measured, as one HTML page that needs no network and no other file.

The page is made from `results.json` and, where that has no history, from `history.parquet` beside it. It holds no
script, its pictures are inside it, and its content security policy forbids it to load anything.
"""

import base64
import json
import os
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from hfproj import plots
from hfproj.errors import HfprojError
from hfproj.files import portable, write_atomic
from hfproj.reporting.card import protocols
from hfproj.reporting.pictures import Picture, pictures_of
from hfproj.results import Results
from hfproj.results.history import HISTORY_FILE, read_history
from hfproj.results.verdict import Verdict, verdicts

PAGE = "report.html"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_STYLE = Path(__file__).parent / "report.css"


def report(output_dir: str | os.PathLike, *, path: str | os.PathLike | None = None) -> Path:
    """Write `report.html` into the folder of a run, and return where it lies.

    One page for people: whether the representation got better, the measurements, an alarm if there was one, a picture
    of everything that was recorded, with how to read it, and how to run it again. It opens without a network.

    Args:
        output_dir: The folder that holds `results.json`.
        path: Where to write instead.

    Raises:
        UsageError: there is no `results.json` in the folder.
        AdapterFileError: the results or the history are damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Results(command="python simclr.py").save(folder)
        ...     report(folder).name
        'report.html'
    """
    folder = Path(output_dir)
    results = Results.load(folder / "results.json")
    if not results.history and (folder / HISTORY_FILE).is_file():
        results.history = read_history(folder / HISTORY_FILE)
    path = folder / PAGE if path is None else Path(path)
    write_atomic(path, render_report(results).encode())
    return path


def render_report(results: Results) -> str:
    """Return the page. Without matplotlib, or where a picture cannot be drawn, a sentence says so in its place."""
    title = _title(results)
    parts = [
        f"<header>\n<h1>{escape(title)}</h1>\n<p class=quiet>{escape(_subtitle(results))}</p>\n</header>",
        "<main>",
        _alarm(results.geometry.get("collapse")),
        _verdict(results),
        _section("Measured", _measured(results)),
        _section("Pictures", _pictures(pictures_of(results))),
        _section("Geometry", _scalars(results.geometry.get("scalars"))),
        _section("Protocol", _list([*protocols(results), *results.notes]) if results.measurements else ""),
        _section("Command and configuration", _configuration(results)),
        "</main>",
        "<footer><p>Made from <code>results.json</code> by <code>hfproj.report</code>.</p></footer>",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _title(results: Results) -> str:
    adapter = _mapping(results.config.get("adapter"))
    base = str(results.config.get("base_model") or "").removeprefix("./") or "a backbone"
    return f"{adapter['head']} head on {base}" if adapter.get("head") else f"Projection head on {base}"


def _subtitle(results: Results) -> str:
    adapter, recipe = _mapping(results.config.get("adapter")), _mapping(results.config.get("recipe"))
    inner = _mapping(adapter.get("backbone_adapter")).get("peft_type")
    datasets = sorted({m.dataset for m in results.measurements if m.dataset})
    facts = [
        f"z of width {adapter['out_dim']}" if adapter.get("out_dim") else "",
        f"{inner} on the backbone" if inner else "",
        f"objective {recipe['objective']}" if recipe.get("objective") else "",
        f"measured on {', '.join(datasets)}" if datasets else "",
        f"seed{'s' * (len(results.seeds) > 1)} {', '.join(map(str, results.seeds))}" if results.seeds else "",
    ]
    return " · ".join(fact for fact in facts if fact)


def _verdict(results: Results) -> str:
    found = verdicts(results)
    senses = {verdict.sense for verdict in found}
    sense = senses.pop() if len(senses) == 1 else "unclear"
    lines = [_in_words(verdict) for verdict in found]
    if not found:
        lines.append(
            "<strong>Whether the representation got better is not known</strong>: no probe was scored with labels "
            "before and after training."
        )
    lines += [escape(line) for line in rank_sentences(results)]
    if len(results.seeds) > 1:
        lines.append(f"Numbers are means over {len(results.seeds)} seeds.")
    paragraphs = "\n".join(f"<p>{line}</p>" for line in lines)
    return f'<section class="verdict {sense}" aria-label="Verdict">\n{paragraphs}\n</section>'


def _in_words(verdict: Verdict) -> str:
    on = f" on {verdict.dataset}" if verdict.dataset else ""
    interval = verdict.interval
    shown = (
        f"{interval.difference:+.4f}, 95\u00a0% interval {interval.low:+.4f} to {interval.high:+.4f}"
        if interval is not None
        else f"{verdict.after - verdict.before:+.4f}; no interval, since answers row by row were not kept"
    )
    advice = "" if verdict.sense == "better" else " Use the bare backbone where this task resembles yours."
    return (
        f"<strong>{verdict.headline}</strong>: {escape(verdict.label)} of h{escape(on)} went from "
        f"{verdict.before:.4f} to {verdict.after:.4f} ({shown}).{advice}"
    )


def rank_sentences(results: Results) -> list[str]:
    """Return what training did to RankMe of h and z; a fall to less than half is called a sign of collapse.

    Example:
        >>> from hfproj.results import Measurement
        >>> ranks = [Measurement("rankme", "z", w, v) for w, v in (("before", 14.0), ("after", 1.2))]
        >>> rank_sentences(Results(measurements=ranks))
        ['RankMe of z went from 14.0 to 1.2: less than half, a sign of dimensional collapse.']
    """
    lines = []
    for key in dict.fromkeys(m.key for m in results.measurements if m.name == "rankme"):
        changes: list[str] = []
        fallen: list[str] = []
        for layer in ("h", "z"):
            means = []
            for when in ("before", "after"):
                same = [m.value for m in results.measurements if (m.key, m.layer, m.when) == (key, layer, when)]
                means.append(sum(same) / len(same) if same else None)
            before, after = means
            if before is not None and after is not None:
                changes.append(f"of {layer} {'' if changes else 'went '}from {before:.1f} to {after:.1f}")
                fallen += [layer] * (after < before / 2)
        if changes:
            on = f" on {key[1]}" if len({m.dataset for m in results.measurements}) > 1 and key[1] else ""
            which = f" for {fallen[0]}" if len(fallen) == 1 and len(changes) == 2 else ""
            end = (
                f"less than half{which}, a sign of dimensional collapse"
                if fallen
                else "no sign of dimensional collapse"
            )
            lines.append(f"RankMe{on} {' and '.join(changes)}: {end}.")
    return lines


def _alarm(collapse: Any) -> str:
    alarm = _mapping(collapse)
    if not alarm:
        return ""
    cause = f": {alarm['cause']}" if alarm.get("cause") else ""
    step = f" at step {alarm['step']}" if alarm.get("step") is not None and not alarm.get("what") else ""
    what = f"\n<p>{escape(str(alarm['what']))}</p>" if alarm.get("what") else ""
    return (
        f'<section class="alarm" aria-label="Alarm">\n<p><strong>{escape(f"Collapse alarm{step}{cause}")}</strong></p>'
        f"{what}\n</section>"
    )


def _measured(results: Results) -> str:
    if not results.measurements:
        return "<p>Nothing was measured.</p>"
    [header, *rows] = results.cells()
    several = len(results.seeds) > 1
    spread = " Mean ± standard deviation over seeds." if several else ""
    return f"<p class=quiet>h is the representation (backbone output), z the projection.{spread}</p>\n" + _table(
        header, rows, "Measurements"
    )


def _scalars(scalars: Any) -> str:
    rows = [[str(name).replace("_", " "), _number(value)] for name, value in _mapping(scalars).items()]
    return _table(["", "value"], rows, "Scalars of the geometry") if rows else ""


def _number(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.4g}" if is_number else "–" if value is None else str(value)


def _pictures(found: Iterable[Picture]) -> str:
    shown: list[str] = []
    failed: dict[str, list[str]] = {}
    for picture in found:
        try:
            shown.append(_figure(picture))
        except HfprojError as error:
            failed.setdefault(str(error), []).append(picture.title)
    lines = [f"<p>Not drawn: {escape(', '.join(titles))}. {escape(why)}</p>" for why, titles in failed.items()]
    return "\n".join([*lines, *(['<div class="pictures">', *shown, "</div>"] if shown else [])])


def _figure(picture: Picture) -> str:
    figure = picture.draw()
    data = base64.b64encode(plots.picture(figure, "svg")).decode()
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return (
        f'<figure>\n<img src="data:image/svg+xml;base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(picture.alt)}">\n'
        f"<figcaption><h3>{escape(picture.title)}</h3><p>{escape(picture.caption)}</p></figcaption>\n</figure>"
    )


def _configuration(results: Results) -> str:
    parts = [_code(results.command, "Command")] if results.command else []
    scalars = {n: v for n, v in results.config.items() if not isinstance(v, dict | list | None)}
    plain = [f"{name}: {value}" for name, value in scalars.items()]
    plain += [", ".join(f"{package} {version}" for package, version in results.versions.items())]
    parts += [f"<p>{escape(line)}</p>" for line in plain if line]
    for name, value in results.config.items():
        if isinstance(value, dict | list):
            text = json.dumps(portable(value), indent=1, ensure_ascii=False)
            parts.append(f"<details><summary>{escape(str(name))}</summary>{_code(text, str(name))}</details>")
    return "\n".join(parts)


def _code(text: str, label: str) -> str:
    return f'<pre tabindex="0" role="region" aria-label="{escape(label)}"><code>{escape(text)}</code></pre>'


def _table(header: list[str], rows: list[list[str]], label: str) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' if cell else "<td></td>" for cell in header)
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _list(lines: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
