"""What the Hub says about a card's front matter, as far as cards of adapters go.

References: https://huggingface.co/docs/hub/model-cards and the specification of model cards that it links to.
"""

import re

import yaml

LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2
agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc intel-research h-research lppl-1.3c ms-pl mpl-2.0
odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl llama2 llama3 gemma unknown other
"""
RELATIONS = ("adapter", "finetune", "merge", "quantized")
REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def front_matter(card: str):
    """The value of a card's YAML, {} without one; what is no YAML is None."""
    match = FRONT.match(card)
    try:
        return (yaml.safe_load(match[1]) or {}) if match else {}
    except yaml.YAMLError:
        return None


def complaints(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's front matter."""
    values = front_matter(card)
    if values is None:
        return ["The front matter is no valid YAML"], []
    if not isinstance(values, dict):
        return ["The front matter has to be a mapping"], []
    if not values:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    license = values.get("license", "other")
    for name in license if isinstance(license, list) else [license]:
        if name not in LICENSES.split():
            errors.append(f'"license" must be one of the known licences or "other", not {name!r}')
    for key in ("base_model", "datasets"):
        named = values.get(key, [])
        for name in named if isinstance(named, list) else [named]:
            if not isinstance(name, str) or not REPO_ID.fullmatch(name) or ".." in name or "--" in name:
                errors.append(f'"{key}" with value {name!r} is not valid. Use a model or data set id of the Hub')
    if values.get("base_model_relation", "adapter") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    for key in ("tags", "metrics", "language"):
        named = values.get(key, [])
        if not isinstance(named, (list, str)) or not all(isinstance(n, str) for n in named):
            errors.append(f'"{key}" must be a list of strings')
    for key in ("library_name", "pipeline_tag", "license_name", "license_link", "thumbnail"):
        if not isinstance(values.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    return errors + _complaints_about_results(values.get("model-index", [])), []


def _complaints_about_results(index) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be a list']
    errors = []
    for m, model in enumerate(index):
        where = f'"model-index[{m}]'
        if (
            not isinstance(model, dict)
            or not isinstance(model.get("name"), str)
            or not isinstance(model.get("results"), list)
        ):
            errors.append(f'{where}" needs a name and a list of results')
            continue
        for r, result in enumerate(model["results"]):
            here = f"{where}.results[{r}]"
            needs = (("task", ("type",)), ("dataset", ("type", "name")))
            for part, keys in needs:
                for key in keys:
                    if not isinstance((result.get(part) or {}).get(key), str):
                        errors.append(f'{here}.{part}.{key}" is required and must be a string')
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'{here}.metrics" is required and must be a list')
                continue
            for metric in metrics:
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    errors.append(f'{here}.metrics" each need a type and a value')
    return errors
