"""The model card of an adapter, generated from its `results.json` and from nothing else."""

import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfproj.errors import HfprojError, UsageError
from hfproj.files import portable, write_atomic
from hfproj.plots import plot_spectrum
from hfproj.probes.verdicts import verdicts
from hfproj.results import Measurement, Results

PICTURE = "spectrum.png"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_EMBEDDED = "vit_nano"
_TASK = "image-feature-extraction"


def render_card(results: Results, *, repo_id: str | None = None, picture: str | None = None) -> str:
    """Return the README.md of an adapter: YAML front matter and the text.

    Args:
        results: What was measured, best before and after training.
        repo_id: Where the adapter is going to lie on the Hub, for the loading example.
        picture: Name of the spectrum's picture beside the card, if there is one.

    Example:
        >>> card = render_card(Results(measurements=[Measurement("rankme", "h", "after", 18.7)]))
        >>> card.startswith("---") and "library_name: peft" in card and "import hfproj" in card
        True
    """
    plain = {name: portable(getattr(results, name)) for name in ("config", "command", "notes")}
    results = replace(results, **plain)  # results that were never saved may still hold paths of this machine
    name = (repo_id or "projection-head").split("/")[-1]
    parts = [
        f"---\n{_front_matter(results, name)}\n---",
        f"# {name}",
        _sentence(results),
        *_warnings(results),
        _measured(results),
    ]
    if picture:
        parts.append(f"![Covariance spectrum of h and z before and after training]({picture})")
    parts.append(_loading(results, repo_id))
    if results.command:
        parts.append(f"## Training\n\n```\n{results.command}\n```")
    if results.seeds:
        parts.append(f"Seed{'s' * (len(results.seeds) > 1)}: {', '.join(map(str, results.seeds))}.")
    parts.append("## Protocol\n\n" + "\n".join(f"- {line}" for line in protocols(results)))
    if results.notes:
        parts.append("\n".join(f"- {note}" for note in results.notes))
    versions = ", ".join(f"{package} {version}" for package, version in results.versions.items())
    parts.append(f"## Versions\n\n{versions}\n\nThis card was generated from `results.json`.")
    return "\n\n".join(parts) + "\n"


def write_card(results: Results, folder: str | os.PathLike, *, repo_id: str | None = None) -> Path:
    """Write `results.json`, `spectrum.png` (where matplotlib is installed) and `README.md` into the adapter's folder.

    A picture that lies there already is replaced where it can be drawn, and shown in any case.

    Raises:
        UsageError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"There is no folder {str(folder)!r}; save the adapter there first.")
    results.save(folder / "results.json")
    if results.spectra:
        with suppress(HfprojError):  # no matplotlib, or total collapse: the card is complete without a picture
            plot_spectrum(results.spectra, folder / PICTURE)
    path = folder / "README.md"
    picture = PICTURE if (folder / PICTURE).is_file() else None
    write_atomic(path, render_card(results, repo_id=repo_id, picture=picture).encode())
    return path


def _front_matter(results: Results, name: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    base, datasets = _hub_base(results), sorted({m.dataset for m in results.measurements if m.dataset})
    evaluated = [
        EvalResult(
            task_type=_TASK,
            task_name="Image feature extraction",
            dataset_type=m.dataset or "unspecified",
            dataset_name=m.dataset or "unspecified",
            metric_type="accuracy" if m.unit == "accuracy" else m.name,
            metric_name=f"{m.label} of {m.layer}, {m.when} training{_settings(m)}",
            metric_value=m.value,
        )
        for m in results.measurements
    ]
    data: dict[str, Any] = {"library_name": "peft", "license": "apache-2.0", "pipeline_tag": _TASK}
    data["tags"] = ["hfproj", "projection-head", "self-supervised-learning", "peft"]
    if base:
        data |= {"base_model": base, "base_model_relation": "adapter"}
    hub_datasets = [d for d in datasets if _HUB_ID.fullmatch(d)]
    if hub_datasets:
        data["datasets"] = hub_datasets
    if evaluated:
        data |= {"model_name": name, "eval_results": evaluated}
    return ModelCardData(**data).to_yaml()


def _settings(m: Measurement) -> str:
    hidden = {"chosen", "k"} if m.name == "knn" else {"chosen"}
    settings = [f"{key} {value}" for key, value in m.protocol.items() if key not in hidden]
    return f" ({', '.join(settings)})" if settings else ""


def _hub_base(results: Results) -> str | None:
    """Return the base model where it is a Hub id; a local folder (`./name`) or the embedded backbone is none."""
    base = re.sub(r"^hf[-_]hub:", "", str(results.config.get("base_model") or ""))
    return base if _HUB_ID.fullmatch(base) and base.split("/")[-1] != _EMBEDDED else None


def _sentence(results: Results) -> str:
    adapter = results.config.get("adapter") or {}
    base = str(results.config.get("base_model") or "")
    shown = base.removeprefix("./") or "its backbone"
    link = (
        f"[{_hub_base(results)}](https://huggingface.co/{_hub_base(results)})" if _hub_base(results) else f"`{shown}`"
    )
    inner = adapter.get("backbone_adapter") or {}
    beside = f" together with a {inner['peft_type']} adapter" if inner.get("peft_type") else ""
    text = (
        f"A projection head (`{adapter.get('head', 'head')}`, z of width {adapter['out_dim']})"
        if adapter.get("out_dim")
        else f"A projection head (`{adapter.get('head', 'head')}`)"
    )
    text += f" as a PEFT adapter on {link}, trained by self-supervision{beside}."
    if base.split("/")[-1] == _EMBEDDED:
        text += (
            "\n\nThe backbone `vit_nano` ships with hfproj: its weights are Apache-2.0, its training images come from "
            "ImageNet (Tiny-ImageNet; research use)."
        )
    return text


def _warnings(results: Results) -> list[str]:
    lines = []
    for verdict in verdicts(results):
        if verdict.sense == "better":
            continue
        interval, shown = verdict.interval, ""
        if interval is not None:
            shown = (
                f" (difference {interval.difference:+.4f}, 95 % interval {interval.low:+.4f} to {interval.high:+.4f})"
            )
        lines.append(
            f"> **{verdict.headline}**: {verdict.label} of h went from {verdict.before:.4f} to {verdict.after:.4f}"
            f"{shown}. Use the bare backbone where this task resembles yours."
        )
    return lines


def _measured(results: Results) -> str:
    if not results.measurements:
        return "## Measured\n\nNothing was measured."
    datasets = sorted({m.dataset for m in results.measurements if m.dataset})
    on = f" on {', '.join(datasets)}" if datasets else ""
    return f"## Measured{on}\n\nh is the representation (backbone output), z the projection.\n\n{results.to_markdown()}"


def _loading(results: Results, repo_id: str | None) -> str:
    where = repo_id or "path/or/repository"
    return (
        "## Loading\n\n"
        "```python\n"
        "import hfproj  # registers the PEFT method; without it PEFT does not know this adapter\n\n"
        f'model = hfproj.from_pretrained("{where}")  # backbone and adapter\n'
        "out = model(x)  # out.representation (h), out.projection (z)\n"
        "```"
    )


def protocols(results: Results) -> list[str]:
    """Return a line per protocol under which something was measured."""
    lines: dict[str, None] = {}
    for m in results.measurements:
        settings = ", ".join(f"{key} = {value}" for key, value in m.settings.items())
        lines[f"{m.label}{f' on {m.dataset}' if m.dataset else ''}: {settings or 'no settings'}"] = None
    return [*lines, "All in eval mode. RankMe does not centre; spectra are of L2-normalised, centred features."]
