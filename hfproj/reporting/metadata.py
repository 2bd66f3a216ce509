"""What the Hub reads of a card: its front matter with the model index, and the files of `.eval_results`.

Only what is true of the adapter itself goes there: numbers before training belong to the bare backbone and stay in the
card's text. Numbers are means over seeds; their protocol, and the spread, are in each metric's arguments.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hfproj.backbones import EMBEDDED
from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.filenames import EVAL_RESULTS
from hfproj.files import rounded, write_atomic
from hfproj.reporting.markdown import one_line
from hfproj.results import LAYERS, Measurement, Results
from hfproj.results.measurement import by_cell, grouped, mean_std, row_names
from hfproj.results.words import UNLABELLED

TAGS = ("hfproj", "projection-head", "self-supervised-learning", "peft")
_FEATURES = "feature-extraction", "Feature extraction"
_TASKS = {"image": ("image-feature-extraction", "Image feature extraction"), "text": _FEATURES}
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")
_TAG = re.compile(r"\w[\w-]{1,30}", re.ASCII)  # without the colon, which the Hub's own tags have
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


def front_matter(results: Results, name: str) -> str:
    """Return the YAML between the two lines of a card's front matter."""
    from huggingface_hub import EvalResult, ModelCardData

    task, task_name = _TASKS[modality_of(results) or "text"]
    adapter = mapping(results.config.get("adapter"))
    methods = [mapping(adapter.get("backbone_adapter")).get("peft_type"), mapping(adapter.get("objective")).get("name")]
    tags = [*TAGS, *(m.lower() for m in methods if isinstance(m, str) and _TAG.fullmatch(m))]
    data: dict[str, Any] = {"library_name": "peft", "license": license_of(results), "pipeline_tag": task, "tags": tags}
    if base := base_model_of(results):
        data |= {"base_model": base, "base_model_relation": "adapter"}
    data["datasets"] = [name for name in trained_on(results) if hub_id(name)] or None
    data["language"] = [code for code in _texts(results.config.get("language")) if _LANGUAGE.fullmatch(code)] or None
    evaluated = []
    for title, m, value, arguments, _ in numbers_of(results):
        dataset = one_line(m.dataset) or "unspecified"
        kind = "accuracy" if m.unit == "accuracy" else one_line(m.name, 60)
        own: dict[str, Any] = {"metric_name": one_line(title), "metric_args": arguments}
        evaluated.append(EvalResult(task, dataset, dataset, kind, value, task_name, **own))
    if evaluated:
        data |= {"model_name": name, "eval_results": evaluated}
    return ModelCardData(**data).to_yaml()


@checked
def write_eval_results(results: Results, folder: str | os.PathLike) -> list[Path]:
    """Write the Hub's newer form of evaluation results, ``.eval_results/<data set>.yaml``, and return the files.

    One file for each data set that is a Hub id, with what was scored there with labels after training: an entry each
    of h and z, whose notes hold the protocol. The Hub shows them beside the leaderboards of data sets that have one,
    and there only for the tasks that these define; ours are called ``knn_h``, ``linear_z`` and so on.

    Raises:
        UsageError: If the folder does not exist.

    Example:
        >>> import tempfile
        >>> from hfproj.results import Measurement
        >>> measured = [Measurement("linear", "h", "after", 0.5, "uoft-cs/cifar10", "accuracy", {"epochs": 100})]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path] = write_eval_results(Results(measurements=measured), folder)
        ...     path.name, path.read_text().splitlines()[-1]
        ('uoft-cs--cifar10.yaml', '  notes: linear accuracy of h (epochs 100)')
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"There is no folder {str(folder)!r}; save the adapter there first.")
    found: dict[str, list[EvalResultEntry]] = {}
    for name, m, value, arguments, rank in numbers_of(results):
        if hub_id(m.dataset) and m.name not in UNLABELLED:
            task = re.sub(r"[^\w.-]+", "_", f"{m.name}_{m.layer}") + f"_{rank}" * (rank > 1)
            how = ", ".join(f"{key} {setting}" for key, setting in arguments.items() if key != "layer")
            notes = one_line(f"{name} ({how})" if how else name, 1000)
            entry = EvalResultEntry(dataset_id=m.dataset, task_id=task, value=value, notes=notes)
            found.setdefault(m.dataset, []).append(entry)
    paths = []
    for dataset, entries in found.items():
        path = folder / EVAL_RESULTS / f"{dataset.replace('/', '--')}.yaml"  # no Hub id holds two hyphens
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=10_000)
        write_atomic(path, text.encode())
        paths.append(path)
    return paths


def numbers_of(results: Results) -> Iterator[tuple[str, Measurement, float, dict[str, Any], int]]:
    """Yield what was measured after training: name, a measurement, mean over seeds, settings, rank among its likes."""
    counts: dict[tuple[str, str, str], int] = {}
    for dataset, measured in grouped(results.measurements).items():
        after = [m for m in measured if m.when == "after" and m.layer in LAYERS]
        cells = by_cell(after)
        for (key, name), layer in itertools.product(row_names(after).items(), LAYERS):
            alike = cells.get((key, layer, "after"), [])
            found = mean_std(alike)
            if found is None:
                continue
            spread = {"seeds": len(alike), "std": rounded(found[1])} if len(alike) > 1 else {}
            counts[dataset, key[0], layer] = rank = counts.get((dataset, key[0], layer), 0) + 1
            settings = {**_plain(alike[0].settings), "layer": layer, **spread}
            yield f"{name} of {layer}", alike[0], rounded(found[0]), settings, rank


def mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping, and an empty one for anything else: a card is written whatever the results hold."""
    return value if isinstance(value, Mapping) else {}


def hub_id(name: object) -> str | None:
    """Return a name where it is the id of a repository, ``owner/name``, and None where it is anything else.

    Example:
        >>> hub_id("uoft-cs/cifar10"), hub_id("./cifar10"), hub_id("digits")
        ('uoft-cs/cifar10', None, None)
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or name.count("/") != 1 or not name.isascii():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if all(part[0].isalnum() for part in name.split("/")) else None


def base_model_of(results: Results) -> str | None:
    """Return the base model where it is a Hub id; a local folder (`./name`) or the embedded backbone is none.

    Old models of transformers have ids without an owner (``bert-base-uncased``).
    """
    base = re.sub(r"^hf[-_]hub:", "", str(results.config.get("base_model") or ""))
    backbone = mapping(mapping(results.config.get("adapter")).get("backbone"))
    old = "/" not in base and backbone.get("library") == "transformers" and hub_id(f"hub/{base}")
    return base if (hub_id(base) or old) and base.split("/")[-1] != EMBEDDED else None


def trained_on(results: Results) -> list[str]:
    """Return the data sets that the adapter was trained on, where the results say so."""
    return _texts(results.config.get("dataset") or mapping(results.config.get("recipe")).get("dataset"))


def _texts(said: object) -> list[str]:
    names = said if isinstance(said, list | tuple) else [said]
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and name))


def license_of(results: Results) -> str | None:
    """Return the licence that the author chose, None without one."""
    said = results.config.get("license")
    return said if isinstance(said, str) and _LICENSE.fullmatch(said) else None


@checked
def check_license(license: str | None) -> None:
    """Refuse what is no identifier of a licence as the Hub has them.

    Raises:
        UsageError: If it is none.
    """
    if license is not None and not _LICENSE.fullmatch(str(license)):
        known = "such as 'apache-2.0', 'mit' or 'cc-by-nc-4.0'"
        raise UsageError(f"Expected the licence as one of the Hub's identifiers, {known}, got {license!r}.")


def modality_of(results: Results) -> str | None:
    """Return "image" or "text" where the results tell what the backbone reads, else None.

    They say so (``config["modality"]``), or the backbone (timm, the embedded one), the recipe or the objective does.
    """
    config, adapter = results.config, mapping(results.config.get("adapter"))
    if config.get("modality") in _TASKS:
        return str(config["modality"])
    recipe, backbone = mapping(config.get("recipe")), mapping(adapter.get("backbone"))
    objective = mapping(adapter.get("objective")).get("name") or recipe.get("objective")
    embedded = str(config.get("base_model") or "").split("/")[-1] == EMBEDDED
    if backbone.get("library") == "timm" or embedded or "image_column" in recipe:
        return "image"
    return "text" if objective == "simcse" else None


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as values that YAML writes in one line each."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        if not isinstance(value, int | float | str | None):
            value = json.dumps(value, ensure_ascii=False, default=str)
        if value is not None:
            plain[one_line(name, 60)] = one_line(value) if isinstance(value, str) else value
    return plain
