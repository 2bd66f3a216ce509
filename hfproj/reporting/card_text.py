"""The sentences of a card: what the adapter is, what training did to it, how to load it, how it was made, limits."""

import json
from collections.abc import Collection, Sequence
from typing import Any

from hfproj.backbones import EMBEDDED
from hfproj.filenames import EMA, OBJECTIVE, PREPROCESSING
from hfproj.objectives import OBJECTIVES
from hfproj.reporting.card_markdown import code, fence, inline, mapping, one_line, options, table
from hfproj.reporting.card_metadata import base_model_of, license_of, modality_of, trained_on
from hfproj.reporting.card_numbers import needs_labels, signed
from hfproj.results import Results
from hfproj.results.verdict import Verdict, rank_changes

_METHODS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "LN_TUNING": "LN tuning"}  # as people write them
_OF_PEFT = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "alpha", "oft_block_size", "boft_block_size")
_OF_OPTIMIZER = ("learning_rate", "head_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")
_OF_VIEWS = ("crop_scale", "flip", "color_jitter", "grayscale", "rotation", "views")  # flags of the recipe
_USUAL_PROBES = {"knn": "k-NN", "linear": "linear probe", "fine_tune": "fine-tuning"}


def title(results: Results, repo_id: str | None) -> str:
    """Return the heading: the repository's name, or head and backbone."""
    if repo_id:
        return inline(repo_id.split("/")[-1])
    head = mapping(results.config.get("adapter")).get("head")
    return inline(f"{head} head on {_backbone(results)}" if head else f"Projection head on {_backbone(results)}")


def summary(results: Results) -> str:
    """Return what it is, in a sentence or two."""
    adapter, base = mapping(results.config.get("adapter")), base_model_of(results)
    link = f"[{inline(base)}](https://huggingface.co/{base})" if base else code(_backbone(results))
    inner, objective = mapping(adapter.get("backbone_adapter")).get("peft_type"), _objective(results)
    head = [code(adapter.get("head"))] * _is_name(adapter.get("head"))
    head += [f"z {adapter.get('out_dim')} wide"] * isinstance(adapter.get("out_dim"), int)
    text = "A projection head" + (f" ({', '.join(head)})" if head else "")
    text += f" with a {_method(inner)} adapter for {link}" if inner else f" for {link}"
    if objective:
        data = trained_on(results)
        on = f" on {' and '.join(code(name) for name in data)}" if data else ""
        text += f", trained{_with_labels(objective)}{on} by the objective {code(objective)}"
    layer = adapter.get("layer", -1)
    where = "the backbone" if layer == -1 else f"the backbone's block {inline(layer)}"
    text += (
        f". **h** is the representation, the pooled output of {where}; **z = head(h)** is the projection, which the "
        "objective sees."
    )
    if str(results.config.get("base_model") or "").split("/")[-1] == EMBEDDED:
        text += (
            f"\n\nThe backbone `{EMBEDDED}` ships with hfproj: its weights are Apache-2.0, its training images come "
            "from ImageNet (Tiny-ImageNet; research use)."
        )
    return text


def verdict_lines(results: Results, judged: Sequence[Verdict]) -> list[str]:
    """Return what training did, warnings first: worse accuracies of h and z, signs of collapse, no gain, a gain."""
    several = len({v.dataset for v in judged}) > 1
    lines = []
    for layer, advice in (
        ("h", "Use the bare backbone where your task resembles this one."),
        ("z", "Use h, not z, where your task resembles this one."),
    ):
        worse = [v for v in judged if (v.layer, v.sense) == (layer, "worse")]
        if worse:
            lines.append(f"> ⚠️ **{worse[0].headline}**: {_in_words(worse, several)}. {advice}")
    lines += [f"> ⚠️ {line}" for line in _collapse(results)]
    unclear = [v for v in judged if (v.layer, v.sense) == ("h", "unclear")]
    if unclear:
        lines.append(
            f"> **{unclear[0].headline}**: {_in_words(unclear, several)}. An interval that holds 0 says neither that "
            "the representation got better nor that it got worse."
        )
    better = [v for v in judged if (v.layer, v.sense) == ("h", "better")]
    if better:
        lines.append(f"**{better[0].headline}**: {_in_words(better, several)}.")
    return lines


def _in_words(found: Sequence[Verdict], several: bool) -> str:
    known = any(v.interval is not None for v in found)
    return "; ".join(
        f"{inline(v.label)} of {v.layer}{_on(v.dataset, several)} went from {v.before:.4f} to {v.after:.4f} "
        f"({_difference(v, known)})"
        for v in found
    ) + ("" if known else "; no intervals, since answers row by row were not kept")


def _on(dataset: str, several: bool) -> str:
    return f" on {code(dataset)}" if several and dataset else ""


def _difference(v: Verdict, known: bool) -> str:
    if v.interval is None:
        return signed(v.after - v.before) + ", no interval" * known
    return f"{signed(v.interval.difference)}, 95 % interval {signed(v.interval.low)} to {signed(v.interval.high)}"


def _collapse(results: Results) -> list[str]:
    alarm, lines = mapping(results.geometry.get("collapse")), []
    if alarm:
        step = f" at step {inline(alarm['step'])}" if alarm.get("step") is not None else ""
        what = inline(alarm.get("what") or alarm.get("cause") or "its cause is not recorded", 600)
        lines.append(f"**The collapse alarm rang while it trained**{step}: {what}")
    changes = [change for change in rank_changes(results) if change.collapsed]
    several = len({m.dataset for m in results.measurements}) > 1
    if changes:
        fallen = "; ".join(
            f"RankMe of {c.layer}{_on(c.dataset, several)} fell from {c.before:.1f} to {c.after:.1f}" for c in changes
        )
        lines.append(f"**A sign of dimensional collapse**: {fallen}, to less than half.")
    return lines


def loading(
    results: Results, repo_id: str | None, files: Collection[str], adapters: Sequence[str], adapter: str
) -> str:
    """Return the lines of Python that load the adapter and compute h and z."""
    repo = quoted = _quoted(repo_id or "path/or/repository")
    others = [name for name in adapters if name != adapter]
    if adapter not in adapters and others:  # without a "default" the card in the root is that of another one
        adapter = others.pop(0)
    if adapter != "default":
        quoted += f", adapter={_quoted(adapter)}"
    folder = f", subfolder={_quoted(adapter)}" if adapter != "default" else ""
    config = mapping(results.config.get("adapter"))
    widths = [config.get(name) for name in ("in_dim", "out_dim")]
    shapes = f"  # [batch, {widths[0]}], [batch, {widths[1]}]" if all(isinstance(w, int) for w in widths) else ""
    imports, prepare, call = _inputs(results)
    lines = [
        "import hfproj  # registers the PEFT method, also for PEFT alone",
        *imports,
        "",
        f"model = hfproj.from_pretrained({quoted})  # backbone and adapter",
        *prepare,
        "with torch.no_grad():",
        f"    out = {call}",
        f"h, z = out.representation, out.projection{shapes}",
    ]
    doors = [
        "from peft import PeftModel",
        "",
        f"model = PeftModel.from_pretrained(backbone, {repo}{folder})  # on your own backbone",
        f"head = hfproj.load_head({quoted})  # z = head(h), no backbone",
    ]
    parts = [fence("\n".join(lines), "python"), "After the same import:", fence("\n".join(doors), "python")]
    if others:
        example = code(f"adapter={_quoted(others[0])}")
        parts.append(f"Other adapters here: {', '.join(map(code, others))}; {example} loads the first of them.")
    if PREPROCESSING in files:
        parts.append("`transformers.AutoImageProcessor.from_pretrained` reads how images are prepared from here too.")
    if kept := [f"`{name}`" for name in (OBJECTIVE, EMA) if name in files]:
        parts.append(
            f"{' and '.join(kept)} {'is' if len(kept) == 1 else 'are'} for going on with the training: "
            f"`hfproj.ProjectionTrainer(…, continue_from=…)`."
        )
    return "\n\n".join(parts)


def _inputs(results: Results) -> tuple[list[str], list[str], str]:
    """Return imports, the lines that make an input, and the call."""
    modality = modality_of(results)
    if modality == "image":
        prepare = [
            "prepare = hfproj.EvalImages.for_model(model)  # size, mean and std",
            'x = prepare([{"image": Image.open("image.png")}])["pixel_values"]',
        ]
        return ["import torch", "from PIL import Image"], prepare, "model(x)"
    if modality == "text":
        base = _quoted(base_model_of(results) or "tokenizer/of/the/backbone")
        prepare = [
            f"tokenizer = AutoTokenizer.from_pretrained({base})",
            'x = tokenizer(["A sentence.", "And another one."], padding=True, return_tensors="pt")',
        ]
        return ["import torch", "from transformers import AutoTokenizer"], prepare, "model(**x)"
    return ["import torch"], [], "model(x)  # x: what the backbone takes"


def configuration(results: Results) -> str:
    """Return a table of what was trained and how; empty where the results do not say."""
    adapter = mapping(results.config.get("adapter"))
    training, recipe = mapping(results.config.get("training")), mapping(results.config.get("recipe"))
    rows: list[tuple[str, str]] = []
    if adapter:
        rows += [
            ("backbone", _read_out(results)),
            ("head", _head(adapter, f" {adapter.get('in_dim', '?')} → {adapter.get('out_dim', '?')}")),
        ]
        for name in ("predictor", "prototypes", "scales"):
            value = adapter.get(name)
            rows += [(name, _head(value) if isinstance(value, dict) else code(value))] * (value is not None)
        rows += [("on the backbone", _inner(adapter))] * bool(adapter.get("backbone_adapter"))
        rows.append(("trained", _trained(adapter)))
    objective = mapping(adapter.get("objective")) or mapping({"name": _objective(results)})
    if _is_name(objective.get("name")):
        rows.append(("objective", _named(objective["name"], {k: v for k, v in objective.items() if k != "name"})))
    for name, value in mapping(adapter.get("regularizers")).items():
        rows.append(("regularizer", _named(name, value if isinstance(value, dict) else {"weight": value})))
    views = mapping(results.config.get("views")) or {k: recipe[k] for k in _OF_VIEWS if recipe.get(k)}
    rows += [("views", options(views))] * bool(views)
    if training:
        rows += [("optimizer", _optimizer(training)), ("length", _length(results, training))]
    return table(["part", "setting"], [[name, text] for name, text in rows if text]) if rows else ""


def _trained(adapter: Any) -> str:
    """Return what was trained, empty where the config does not say."""
    trainable = adapter.get("trainable")
    if isinstance(trainable, int) and not isinstance(trainable, bool):
        return f"the head and the last {trainable} blocks of the backbone; their weights are part of the adapter"
    if trainable == "full":
        return "the head and the whole backbone; its weights are part of the adapter"
    inner = trainable == "adapter" and adapter.get("backbone_adapter")
    alone = "the head and the adapter on the backbone, whose own" if inner else "the head alone; the backbone's"
    return f"{alone} weights stay as they are" if trainable in ("head", "adapter") else ""


def _read_out(results: Results) -> str:
    adapter = mapping(results.config.get("adapter"))
    library, pooling = mapping(adapter.get("backbone")).get("library"), adapter.get("pooling")
    read = {"layer": adapter["layer"]} if adapter.get("layer", -1) != -1 else {}
    parts = [code(_backbone(results)) + (f" ({inline(library)})" if library else "")]
    parts += [f"h by {options({'pooling': pooling, **read})}"] * bool(pooling)
    return "; ".join(parts)


def _head(value: Any, widths: str = "") -> str:
    value = mapping(value)
    own = value.get("head_options") if "head_options" in value else {k: v for k, v in value.items() if k != "head"}
    return _named(value.get("head") or "", mapping(own), inline(widths.strip()))


def _named(name: object, values: Any, more: str = "") -> str:
    parts = [code(name) if name else "", more, options(mapping(values))]
    return ", ".join(part for part in parts if part)


def _inner(adapter: Any) -> str:
    inner = mapping(adapter.get("backbone_adapter"))
    targets = inner.get("target_modules")
    count = f"{len(targets)} modules" if isinstance(targets, list) else ""
    found = {n: inner[n] for n in _OF_PEFT if inner.get(n)}
    return ", ".join(part for part in (_method(inner.get("peft_type")), options(found), count) if part)


def _method(peft_type: object) -> str:
    return _METHODS.get(str(peft_type), inline(peft_type or "PEFT", 40))


def _optimizer(training: Any) -> str:
    name = "LARS" if training.get("lars") else inline(training.get("optim") or "AdamW")
    used = {n: training[n] for n in _OF_OPTIMIZER if training.get(n) is not None}
    used |= {n: training[n] for n in ("ema_momentum", "patch_dropout", "bf16", "fp16") if training.get(n)}
    return ", ".join(part for part in (name, options(used)) if part)


def _length(results: Results, training: Any) -> str:
    steps = [row.get("step") for row in [*results.history, *results.log] if isinstance(row, dict)]
    last = max((s for s in steps if isinstance(s, int)), default=0)
    epochs, batch = training.get("num_train_epochs"), training.get("per_device_train_batch_size")
    parts = [f"{inline(epochs)} epochs"] * (epochs is not None) + [f"{last} steps"] * bool(last)
    parts += [f"{inline(batch)} a step and process"] * (batch is not None)
    accumulated = training.get("gradient_accumulation_steps")
    return ", ".join([*parts, *([f"{inline(accumulated)} of these a step"] if accumulated else [])])


def limits(results: Results, judged: Sequence[Verdict]) -> list[str]:
    """Return what a reader must not read into the numbers, as far as the results themselves tell."""
    measured = results.measurements
    labelled = [m for m in measured if needs_labels(m)]
    lines = []
    if not measured:
        lines.append("Nothing was measured: whether this adapter helps is not known.")
    elif not labelled:
        lines.append("No label was used: whether the representation got better for any task is not known.")
    else:
        if not any(v.layer == "h" for v in judged):
            lines.append("No accuracy of h was measured before and after training: whether it got better is not known.")
        missing = [name for probe, name in _USUAL_PROBES.items() if not any(m.name == probe for m in labelled)]
        lines += [f"Not measured: {', '.join(missing)}."] * bool(missing)
    datasets = list(dict.fromkeys(m.dataset for m in measured if m.dataset))
    if len(datasets) == 1:
        same = ", the data set that it was trained on" if datasets[0] in trained_on(results) else ""
        lines.append(f"Measured on held-out data of {code(datasets[0])} alone{same}.")
    if len(results.seeds) > 1:
        lines.append(
            f"± is the standard deviation over {len(results.seeds)} training runs. Intervals are paired bootstraps "
            "over test rows, of the mean over runs: they speak of other test rows, not of other runs."
        )
    elif measured:
        lines.append("One training run: the spread over seeds was not measured.")
    if license_of(results) is None:
        lines.append("The author chose no licence.")
    return lines


def _objective(results: Results) -> str | None:
    adapter, recipe = mapping(results.config.get("adapter")), mapping(results.config.get("recipe"))
    name = mapping(adapter.get("objective")).get("name") or recipe.get("objective")
    return name if _is_name(name) else None


def _with_labels(objective: str) -> str:
    """Return whether an objective uses labels, in words; empty where it is not known."""
    needs = getattr(OBJECTIVES.get(objective), "needs", None) if objective in OBJECTIVES.list() else None
    if not isinstance(needs, Collection):
        return ""
    return " with labels" if "labels" in needs else " without labels"


def _backbone(results: Results) -> str:
    base = results.config.get("base_model") or mapping(mapping(results.config.get("adapter")).get("backbone")).get("id")
    return str(base).removeprefix("./") if _is_name(base) else "its backbone"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(one_line(value))


def _quoted(text: str) -> str:
    """Return a text as Python writes it."""
    return json.dumps(one_line(text), ensure_ascii=False)
