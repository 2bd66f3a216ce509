"""What a card and a page are made from: one context, prepared from results; the templates hold the words around it.

Its texts are as the results have them; the templates escape.
"""

import inspect
import itertools
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from hfproj.backbones import EMBEDDED
from hfproj.errors import UsageError
from hfproj.objectives import OBJECTIVES
from hfproj.presets import all_presets
from hfproj.registry import Registry
from hfproj.regularizers import REGULARIZERS
from hfproj.reporting.markdown import Code, one_line
from hfproj.reporting.metadata import base_model_of, license_of, mapping, modality_of, trained_on
from hfproj.results import LAYERS, WHENS, Measurement, Results, Verdict, findings, verdicts, words
from hfproj.results.inside import Autopsy, Invariance
from hfproj.results.measurement import (
    Cell,
    Key,
    by_cell,
    grouped,
    mean_std,
    missing_sentences,
    row_names,
    settings_text,
    short,
)

_METHODS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "LN_TUNING": "LN tuning"}  # as people write them
_OF_PEFT = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "alpha", "oft_block_size", "boft_block_size")
_OF_OPTIMIZER = ("learning_rate", "head_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")
_OF_VIEWS = ("crop_scale", "flip", "color_jitter", "grayscale", "rotation", "views")  # flags of the recipe
_ARXIV = re.compile(r"\barXiv (\d{4}\.\d{4,5})\b")


class Context:
    """Everything that a card or a page says of a run; what the results do not say is empty or None.

    Example:
        >>> Context(Results(config={"base_model": "me/vit", "adapter": {"head": "mlp"}})).title
        'mlp head on me/vit'
    """

    def __init__(self, results: Results):
        adapter, recipe = mapping(results.config.get("adapter")), mapping(results.config.get("recipe"))
        inner, layer, head = mapping(adapter.get("backbone_adapter")), adapter.get("layer", -1), adapter.get("head")
        base = results.config.get("base_model") or mapping(adapter.get("backbone")).get("id")
        widths = [width if isinstance(width := adapter.get(name), int) else None for name in ("in_dim", "out_dim")]
        measured, judged = results.measurements, [v for layer in LAYERS for v in verdicts(results, layer)]
        labelled = [m for m in measured if m.name not in words.UNLABELLED]
        missing = [name for probe, name in words.USUAL_PROBES.items() if not any(m.name == probe for m in labelled)]

        self.results = results  # for what is shown as it was recorded
        self.findings = findings(results)  # what training did, in words, warnings first
        of_h = {v.sense for v in judged if v.layer == "h"} or {f.sense for f in self.findings if f.unlabelled}
        self.judged = bool(of_h)  # whether it is known, with labels or without, what became of h
        clear = of_h - {"unclear"}
        self.sense = clear.pop() if len(clear) == 1 else "unclear"
        self.head = head if isinstance(head, str) and one_line(head) else ""
        self.in_dim, self.out_dim = widths  # of h and z
        self.backbone = base.removeprefix("./") if isinstance(base, str) and one_line(base) else "a backbone"
        self.title = f"{head} head on {self.backbone}" if head else f"Projection head on {self.backbone}"
        self.base_model = base_model_of(results)  # the backbone, where it is a Hub id
        self.private = "fingerprint" in adapter and not (base or mapping(adapter.get("backbone")).get("id"))
        self.embedded = str(results.config.get("base_model") or "").split("/")[-1] == EMBEDDED  # ships with hfproj
        self.method = _method(inner["peft_type"]) if inner.get("peft_type") else ""  # PEFT's on the backbone
        self.layer = None if layer == -1 else layer  # the block that h is read from; None: the last
        self.objective = _objective(results)
        self.uses_labels = _uses_labels(self.objective)  # None where it is not known
        self.modality = modality_of(results)  # "image", "text" or None
        self.trained_on = trained_on(results)  # data sets
        self.datasets = list(dict.fromkeys(m.dataset for m in measured if m.dataset))  # measured on
        self.before = any(m.when == "before" for m in measured)  # whether anything was measured before training
        self.continued = str(recipe.get("continue_from") or "")  # the adapter that training went on from
        self.measured, self.labelled = bool(measured), bool(labelled)  # whether anything was, and with labels
        self.missing = missing  # usual probes that were not run
        self.unmeasured = missing_sentences(results.missing)  # what could not be measured, and why
        self.tables = _tables(results, {(v.key, v.layer): v for v in judged})
        self.cells = results.cells(arrows=True)  # h and z in one table, the header first
        self.layer_cells = results.layer_cells()  # every layer, where there are others, the header first
        self.inside = _inside(results.geometry)  # sections: title, tables of cells, sentences
        self.protocol = _protocol(measured)
        self.settings = _settings(results, adapter, recipe, self.backbone)  # a part, and pieces of text or `Code`
        self.license = license_of(results)
        self.sources = list(_sources(results))

    @property
    def facts(self) -> list[str]:
        """Width of z, PEFT method, objective, data sets and seeds, as far as they are known."""
        seeds = self.results.seeds
        return (
            [f"z of width {self.out_dim}"] * bool(self.out_dim)
            + [f"{self.method} on the backbone"] * bool(self.method)
            + [f"objective {self.objective}"] * bool(self.objective)
            + [f"measured on {', '.join(sorted(self.datasets))}"] * bool(self.datasets)
            + [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"] * bool(seeds)
        )


def _inside(geometry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sections of an autopsy and of an invariance report, where results hold them."""
    sections = []
    with suppress(UsageError):  # a damaged one, of somebody else
        if kept := geometry.get("autopsy"):
            found = Autopsy.from_dict(kept)
            said = [cut.sentence for cut in found.cuts] + [words.INSIDE["layers"]]
            sections.append({"title": words.INSIDE["title"], "tables": [found.cells()], "sentences": said})
            geometry = {"invariance": kept["invariance"], **geometry}
    with suppress(UsageError):
        if kept := geometry.get("invariance"):
            moved = Invariance.from_dict(kept)
            tables = [cells for cells in (moved.cells(), moved.layer_cells()) if cells]
            sections.append(
                {"title": words.INSIDE["transforms"], "tables": tables, "sentences": [words.INSIDE["moved"]]}
            )
    return sections


def _tables(results: Results, judged: Mapping[tuple[Key, str], Verdict]) -> list[dict[str, Any]]:
    """Return the tables of h and z of each data set, those with labels first; `whens` are their columns."""
    tables = []
    own = grouped(m for m in results.measurements if m.layer in LAYERS)
    for (dataset, measured), labelled in itertools.product(own.items(), (True, False)):
        chosen = [m for m in measured if (m.name not in words.UNLABELLED) == labelled]
        cells = by_cell(chosen)
        whens = [when for when in WHENS if any(m.when == when for m in chosen)]
        rows = []
        for key, name in row_names(chosen).items():
            layers = [layer for layer in LAYERS if any((key, layer, when) in cells for when in WHENS)]
            rows += [_row(cells, key, layer, whens, judged.get((key, layer))) for layer in layers]
            rows[-len(layers)]["name"] = name
        tables += [{"dataset": dataset, "labelled": labelled, "whens": whens, "rows": rows}] * bool(rows)
    return tables


def _row(
    cells: dict[Cell, list[Measurement]], key: Key, layer: str, whens: list[str], verdict: Verdict | None
) -> dict[str, Any]:
    """Return a measure of a layer before and after training, with ± where seeds differ, and its gain."""
    found = {when: mean_std(cells.get((key, layer, when), [])) for when in WHENS}
    interval, before, after = verdict.interval if verdict else None, *found.values()
    gain = interval.difference if interval else after[0] - before[0] if before and after else None
    return {
        "name": "",
        "layer": layer,
        "cells": [words.number(key[0], pair[0], pair[1] or None) if (pair := found[w]) else "–" for w in whens],
        "change": "–" if gain is None else words.change(key[0], gain),
        "interval": words.interval(key[0], *interval[1:]) if interval else "",
    }


def _protocol(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """Return how to read each measure: "parts" hold for all data sets, other settings stand "by_dataset"."""
    found: dict[str, dict[str, dict[str, Any]]] = {}  # name → data set → settings
    meanings: dict[str, str] = {}
    for dataset, own in grouped(measurements).items():
        measured = {m.key: m for m in own}
        names = row_names(measured.values())
        alike: dict[tuple[str, str], list[Key]] = {}  # numbers of one probe with one protocol share a line
        for key in names:
            alike.setdefault((key[0].split("_")[0], key[2]), []).append(key)
        for keys in alike.values():
            name = ", ".join(names[key] for key in keys)
            meanings[name] = words.UNLABELLED.get(keys[0][0], "")
            found.setdefault(name, {})[dataset] = measured[keys[0]].settings
    lines = []
    for name, by_dataset in found.items():
        first = next(iter(by_dataset.values()))
        shared = {n: v for n, v in first.items() if all(n in own and own[n] == v for own in by_dataset.values())}
        apart = {d: {n: v for n, v in own.items() if n not in shared} for d, own in by_dataset.items()}
        texts = {dataset: settings_text(own) for dataset, own in apart.items() if own}
        parts = [part for part in (meanings[name], settings_text(shared)) if part]
        lines.append({"name": name, "parts": parts, "by_dataset": texts})
    return lines


def _options(values: Mapping[str, Any]) -> list[Code]:
    return [Code(f"{name}={short(value)}") for name, value in values.items() if value is not None]


def _settings(
    results: Results, adapter: Mapping[str, Any], recipe: Mapping[str, Any], backbone: str
) -> list[tuple[str, Sequence[str]]]:
    """Return what was trained and how, as far as the results say it: the part, and its pieces."""
    training = mapping(results.config.get("training"))
    rows: list[tuple[str, Sequence[str]]] = []
    if adapter:
        library, layer = mapping(adapter.get("backbone")).get("library"), adapter.get("layer", -1)
        rows.append(("backbone", [Code(backbone), *([str(library)] if library else [])]))
        if digest := mapping(adapter.get("fingerprint")).get("sha256"):
            rows.append((words.BACKBONE["digest"], [Code(str(digest))]))
        rows.append(("h", _options({"pooling": adapter.get("pooling"), "layer": layer if layer != -1 else None})))
        head = [Code(adapter["head"])] if adapter.get("head") else []
        widths = f"{adapter.get('in_dim', '?')} → {adapter.get('out_dim', '?')}"
        rows.append(("head", [*head, widths, *_options(mapping(adapter.get("head_options")))]))
        for name in ("predictor", "prototypes", "scales"):
            if (value := adapter.get(name)) is not None:
                rows.append((name, _named(value, "head") if isinstance(value, dict) else [Code(value)]))
        if inner := mapping(adapter.get("backbone_adapter")):
            targets = inner.get("target_modules")
            count = [f"{len(targets)} modules"] if isinstance(targets, list) else []
            options = _options(_chosen(inner, _OF_PEFT))
            rows.append(("on the backbone", [_method(inner.get("peft_type")), *options, *count]))
        rows.append(("trained", _trained(adapter)))
    if name := _objective(results):
        rows.append(("objective", _named({**mapping(adapter.get("objective")), "name": name}, "name")))
    for name, value in mapping(adapter.get("regularizers")).items():
        rows.append(("regularizer", [Code(name), *_options(value if isinstance(value, dict) else {"weight": value})]))
    rows.append(("views", _options(mapping(results.config.get("views")) or _chosen(recipe, _OF_VIEWS))))
    if training:
        optimizer = "LARS" if training.get("lars") else str(training.get("optim") or "AdamW")
        used = {n: training[n] for n in _OF_OPTIMIZER if training.get(n) is not None}
        used |= _chosen(training, ("ema_momentum", "patch_dropout", "bf16", "fp16"))
        rows += [("optimizer", [optimizer, *_options(used)]), ("length", _length(results, training))]
    return [(part, pieces) for part, pieces in rows if pieces]


def _chosen(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name)}


def _named(value: Mapping[str, Any], key: str) -> list[str]:
    """Return a name and its options: ``{"head": "mlp", "depth": 2}``, or with "head_options"."""
    own = value.get("head_options") if "head_options" in value else {k: v for k, v in value.items() if k != key}
    return [*([Code(value[key])] if value.get(key) else []), *_options(mapping(own))]


def _trained(adapter: Mapping[str, Any]) -> list[str]:
    trainable = adapter.get("trainable")
    if isinstance(trainable, int) and not isinstance(trainable, bool):
        return [f"the head and the last {trainable} blocks of the backbone; their weights are part of the adapter"]
    if trainable == "full":
        return ["the head and the whole backbone; its weights are part of the adapter"]
    inner = trainable == "adapter" and adapter.get("backbone_adapter")
    alone = "the head and the adapter on the backbone, whose own" if inner else "the head alone; the backbone's"
    return [f"{alone} weights stay as they are"] if trainable in ("head", "adapter") else []


def _length(results: Results, training: Mapping[str, Any]) -> list[str]:
    steps = [row.get("step") for row in [*results.history, *results.log] if isinstance(row, dict)]
    last = max((s for s in steps if isinstance(s, int)), default=0)
    epochs, batch = training.get("num_train_epochs"), training.get("per_device_train_batch_size")
    accumulated = training.get("gradient_accumulation_steps")
    counted = epochs is not None and not (training.get("max_steps") or 0) > 0  # max_steps goes before the epochs
    pieces = [f"{epochs} epochs"] * counted + [f"{last} steps"] * bool(last)
    pieces += [f"{batch} a step and process"] * (batch is not None)
    return pieces + [f"{accumulated} of these a step"] * bool(accumulated)


def _method(peft_type: object) -> str:
    return _METHODS.get(str(peft_type), one_line(peft_type or "PEFT", 40))


def _objective(results: Results) -> str:
    adapter, recipe = mapping(results.config.get("adapter")), mapping(results.config.get("recipe"))
    name = mapping(adapter.get("objective")).get("name") or recipe.get("objective")
    return name if isinstance(name, str) and one_line(name) else ""


def _uses_labels(objective: str) -> bool | None:
    needs = getattr(OBJECTIVES.get(objective), "needs", None) if objective in OBJECTIVES.list() else None
    return "labels" in needs if isinstance(needs, Collection) else None


def _sources(results: Results) -> Iterator[dict[str, str]]:
    """Yield the source of every method of which it is known: objective, regularizers, preset."""
    adapter, recipe = mapping(results.config.get("adapter")), mapping(results.config.get("recipe"))
    methods: list[tuple[str, Registry, str]] = [("Objective", OBJECTIVES, _objective(results))]
    methods += [("Regularizer", REGULARIZERS, name) for name in mapping(adapter.get("regularizers"))]
    for kind, registry, name in methods:
        if name in registry.list() and (found := reference(registry, name)):
            yield {"kind": kind, "name": name, "text": found[0], "arxiv": found[1]}
    preset = recipe.get("preset")
    if isinstance(preset, str) and preset in all_presets():
        yield {"kind": "Settings of the preset", "name": preset, "text": all_presets()[preset].source, "arxiv": ""}


def reference(registry: Registry, name: str) -> tuple[str, str] | None:
    """Return the first reference in the docstring of a registered class, or of its module, and its arXiv number or "".

    Example:
        >>> reference(OBJECTIVES, "barlow_twins")
        ('Zbontar et al. 2021,', '2103.03230')
    """
    cls = registry.get(name)
    text = f"{inspect.getdoc(cls)}\n\n{sys.modules[cls.__module__].__doc__}"
    found = re.search(r"^References:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    first = " ".join(found[1].split()).split("; ")[0] if found else ""
    if number := _ARXIV.search(first):
        return first[: number.start()].rstrip(), number[1]
    return (first.rstrip("."), "") if '"' in first else None
