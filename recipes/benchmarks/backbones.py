"""Every backbone: does a head attach, is its h the feature of the backbone's author, does what is trained learn?

    python recipes/benchmarks/backbones.py timm           # one small model of each module of timm
    python recipes/benchmarks/backbones.py transformers   # a small model of each family that reads images or texts
    python recipes/benchmarks/backbones.py table          # docs/backbones.md from the results, with attach_costs.py's

Models have random weights: nothing is downloaded. Names after the first word measure these families alone and leave
the other results as they are. Writes recipes/benchmarks/results/backbones.json. On two cores 15 minutes for timm, 10
for transformers.

A model attaches if all of this holds:

- h of a fresh LoRA is the author's feature to 1e-5: timm's ``create_model(…, num_classes=0)(x)``; of transformers the
  pooled output or the documented rule, worked out here on each text alone, so that padding can't matter.
- Every trainable tensor gets a gradient, with LoRA and with ``trainable="full"``.
- A changed LoRA changes h in eval mode, with and without gradients alike.
- Two runs in eval mode under two seeds give one h, and disabling gives the bare backbone's output.
"""

import argparse
import copy
import importlib
import inspect
import json
import os
import time
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import timm
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES

import hfproj
from hfproj.backbones.dry_run import dry_run
from hfproj.errors import one_line
from hfproj.files import installed_versions, write_json

HERE = Path(__file__).resolve().parent
OUT, DOC = HERE / "results" / "backbones.json", HERE.parents[1] / "docs" / "backbones.md"
TOLERANCE = 1e-5
SIZES = ("test_", "atto", "femto", "pico", "nano", "xxs", "xx_small", "xxt", "xtiny", "tiny", "micro", "mini", "_xs",
         "x_small", "small", "_s", "050", "035", "18", "_b0", "_0", "lite")  # fmt: skip
# Values of small configurations: by the names that families have for them, and of families with their own arithmetic.
CONFIGS = json.loads((HERE / "small_configs.json").read_text())
TOWERS = {"text", "vision", "image", "vit", "backbone", "resnet", "dinov2", "lcnet"}  # in names without an AutoModel
CHANNELS_LAST = ("sam2_hiera_det_model", "sam2_vision_model")
STAGES = {"depths", "hidden_sizes", "width_coefficient", "depth_multiplier"}  # nothing else fits these
LAYER_LISTS = ("layer_types", "indexer_types", "layers_block_type")  # one entry a layer


def lora(**options: Any) -> Any:
    """Return the config of a head with LoRA, or of what `options` say."""
    own = options or {"backbone_adapter": LoraConfig(r=2, lora_alpha=8)}
    return hfproj.ProjectionHeadConfig(head="linear", out_dim=4, **own)


def without_gradient(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Return the trainable tensors that no gradient reaches."""
    model.train()
    torch.manual_seed(0)
    call(model, inputs).projection.float().square().sum().backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Run a model on inputs by name, or by position under the name "x"."""
    return model(inputs["x"]) if "x" in inputs else model(**inputs)


def check(backbone: nn.Module, inputs: dict[str, Any], author: Tensor) -> dict[str, Any]:
    """Attach to copies of `backbone` and return what holds; `author` is the feature that h has to be."""
    backbone.eval().requires_grad_(False)  # torch picks kernels by it; attaching takes it back
    began = time.perf_counter()
    model: Any = get_peft_model(copy.deepcopy(backbone), lora()).eval()
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 2)}
    config = model.peft_config["default"]
    row["reading"] = config.pooling
    targets = config.backbone_options["target_modules"]
    row["lora"] = len(targets) if isinstance(targets, list) else targets.count("|") + 1
    kinds = {type(backbone.get_submodule(n)).__name__ for n in targets} if isinstance(targets, list) else {"by pattern"}
    row["of"] = ", ".join(sorted(kinds))
    with torch.no_grad():
        torch.manual_seed(0)
        h = call(model, inputs).representation
        torch.manual_seed(1)
        row["random"] = bool((call(model, inputs).representation - h).abs().max() > TOLERANCE)
        row["difference"] = float((h - author).abs().max() / author.abs().max().clamp_min(1))
        with model.disable_adapter():
            torch.manual_seed(0)
            off = tensors(call(model, inputs))
        torch.manual_seed(0)
        pairs = zip(off, tensors(call(backbone, inputs)), strict=True)
        row["restored"] = all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        changed = call(model, inputs).representation
    graph = call(model, inputs).representation
    row["acts"] = not torch.equal(changed, h)  # of one computation: without the LoRA it gives the same bits
    row["one_eval"] = bool(torch.allclose(changed, graph, rtol=1e-3, atol=1e-4))
    row["idle_lora"] = without_gradient(model, inputs)
    row["idle_full"] = without_gradient(get_peft_model(copy.deepcopy(backbone), lora(trainable="full")), inputs)
    good = row["difference"] <= TOLERANCE and row["restored"] and row["acts"] and row["one_eval"] and not row["random"]
    return {**row, "holds": good and not row["idle_lora"] and not row["idle_full"]}


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a backbone's output."""
    values = tuple(output.values()) if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    return [v for v in values if isinstance(v, Tensor)]


# --- timm ---


def timm_families() -> Iterator[tuple[str, str]]:
    """Yield each module of timm that registers models with the smallest of its smaller models, by their names."""
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        names = sorted(names, key=lambda n: (next((i for i, s in enumerate(SIZES) if s in n), 99), len(n), n))
        sizes = {}
        for name in names[:5]:
            with torch.device("meta"):
                try:
                    model = timm.create_model(name, pretrained=False, num_classes=0)
                except (RuntimeError, NotImplementedError):  # values are computed while it is made
                    continue
            sizes[name] = sum(p.numel() for p in model.parameters())
        yield module, min(sizes, key=lambda n: sizes[n]) if sizes else names[0]


def timm_row(name: str) -> dict[str, Any]:
    """Measure one timm model."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0}
    try:
        backbone = timm.create_model(name, **options, depth=2).eval()  # a transformer of equal blocks
    except (TypeError, ValueError, AssertionError, IndexError, KeyError):
        backbone = timm.create_model(name, **options).eval()
    settle(backbone)
    with torch.no_grad():
        for x in images_for(backbone):
            try:
                author = backbone(x)
                break
            except (RuntimeError, AssertionError):  # of this size
                continue
        if author.ndim != 2:
            return {"refused": f"create_model(…, num_classes=0) returns {list(author.shape)}, no vector"}
    return check(backbone, {"x": x}, author)


def images_for(backbone: Any) -> Iterator[Tensor]:
    """Yield images that a timm model may take, small ones first where its size is free."""
    settings = backbone.pretrained_cfg
    fixed = settings.get("fixed_input_size") or getattr(backbone, "patch_embed", None) is not None
    for side in () if fixed else (96, 128, 160):
        yield torch.randn(2, settings["input_size"][0], side, side)
    yield torch.randn(2, *settings["input_size"])


@torch.no_grad()
def settle(backbone: nn.Module) -> None:
    """Move what starts at zero or close to it (scales of layers, biases): it would hide mistakes."""
    for parameter in backbone.parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < 1e-3:
            parameter.normal_(std=0.1)


# --- transformers ---


def small_config(kind: str) -> Any:
    """Return a small configuration of a family of transformers."""
    cls = CONFIG_MAPPING[kind]
    whole = cls()
    names = {k: whole.attribute_map.get(k, k) for k in CONFIGS["by_attribute"]}
    fits = {k: v for k, v in CONFIGS["by_attribute"].items() if type(vars(whole).get(names[k])) is int}
    lists = {k: v for k, v in vars(whole).items() if k.endswith(LAYER_LISTS) and isinstance(v, list)}
    if lists and len(longest := max(lists.values(), key=len)) == getattr(whole, "num_hidden_layers", 0):
        # one layer of each kind that there is
        lists = {k: v for k, v in lists.items() if len(v) == len(longest)}
        kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
        kinds = kinds * 2 if len(kinds) == 1 else kinds
        fits |= {k: list(v) for k, v in zip(lists, zip(*kinds, strict=True), strict=True)}
        fits["num_hidden_layers"] = len(kinds)
    if "qk_rope_head_dim" in fits:
        fits["head_dim"] = fits["qk_rope_head_dim"]
    own = CONFIGS["by_family"].get(kind, {})
    fits = own if STAGES & own.keys() else fits | own
    return cls(**{k: v for k, v in fits.items() if v != "its own"})


def transformers_families() -> Iterator[tuple[str, Any]]:
    """Yield each family that reads images or texts, one of the two, with its class; of mixed ones their towers."""
    for kind in (*MODEL_MAPPING_NAMES, *(k for k in CONFIG_MAPPING if k not in MODEL_MAPPING_NAMES)):
        try:
            config: Any = CONFIG_MAPPING[kind]
            model: Any = MODEL_MAPPING[config] if kind in MODEL_MAPPING_NAMES else tower(kind, config)
        except (KeyError, ValueError, ImportError):  # named there, and not in this version or without its libraries
            continue
        model = model[0] if isinstance(model, tuple) else model
        name = inspect.getattr_static(model, "main_input_name", "")
        mixed = getattr(config, "sub_configs", None) and kind not in CONFIGS["by_family"]
        if not mixed and (
            kind not in MODEL_MAPPING_NAMES
            or (model.__name__[:4] != "Timm" and (name == "input_ids" or str(name).startswith("pixel_values")))
        ):
            yield kind, model


def tower(kind: str, config: Any) -> Any:
    """Return the model of a configuration that no AutoModel loads: the text or vision part of a mixed family.

    Raises:
        KeyError: If it has none, or is neither.
    """
    if not TOWERS & set(kind.split("_")[-2:]):
        raise KeyError(kind)
    module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    if kind == "blip_text_model":
        return importlib.import_module(f"{module.__name__}_text").BlipTextModel
    made = [
        m for m in vars(module).values()
        if isinstance(m, type) and m.__module__ == module.__name__ and issubclass(m, transformers.PreTrainedModel)
        and config in typing.get_type_hints(m.__init__).values()
    ]  # fmt: skip
    found = {m.__name__: m for m in reversed(made) if not m.__name__.endswith("PreTrainedModel")}
    return found[max(found, key=lambda name: (name.endswith("Model"), name.endswith("Backbone")))]


def transformers_row(kind: str, cls: Any) -> dict[str, Any]:
    """Measure one family of transformers."""
    torch.manual_seed(0)
    backbone = cls(small_config(kind)).eval()
    settle(backbone)
    found = dry_run(backbone)
    if found is None:
        get_peft_model(backbone, lora())  # says why
        return {"unmeasured": "it can't be run without data"}
    given = [(k, v) for k, v in found.inputs.items() if isinstance(v, Tensor)]
    inputs = {k: torch.randn(v.shape) if v.is_floating_point() else v.clone() for k, v in given}
    inputs = {
        str(k or "x"): v.to("cpu") if not v.is_meta else torch.ones(v.shape, dtype=v.dtype) for k, v in inputs.items()
    }
    if "input_ids" in inputs:
        return text_row(backbone)
    pooling = get_peft_model(copy.deepcopy(backbone), lora(trainable="head")).peft_config["default"].pooling
    with torch.no_grad():
        noise = {"noise": torch.arange(16.0).expand(2, -1)} if kind == "vit_mae" else {}
        mask, backbone.config.mask_ratio = getattr(backbone.config, "mask_ratio", None), 0.0
        out = call(backbone, {**inputs, **noise})
        backbone.config.mask_ratio = mask
        last = out if isinstance(out, Tensor) else getattr(out, "last_hidden_state", None)
        last = out.feature_maps[-1] if last is None else last
        last = last.permute(0, 3, 1, 2) if kind in CHANNELS_LAST else last
        prefix = backbone.config.to_dict().get("num_register_tokens", 0) if last.ndim == 3 else 0
        rules = {
            "pooler": lambda: out.pooler_output.flatten(1),
            "cls": lambda: last[:, 0],
            "mean": lambda: last.flatten(2).mean(2) if last.ndim == 4 else last[:, prefix:].mean(1),
        }
        author = rules[pooling]()
    return check(backbone, inputs, author)


def text_row(backbone: Any) -> dict[str, Any]:
    """Measure a text backbone: texts of two lengths, padded on the left, against each of them alone."""
    ids = torch.randint(3, 90, (2, 8))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    ids[1, :3] = getattr(backbone.config, "pad_token_id", None) or 0
    pooling = get_peft_model(copy.deepcopy(backbone), lora(trainable="head")).peft_config["default"].pooling
    with torch.no_grad():
        alone = [backbone(input_ids=i[m > 0][None]) for i, m in zip(ids, mask, strict=True)]
        tokens = [getattr(out, "last_hidden_state", out[0]) for out in alone]
        if tokens[0].ndim == 2:
            author = torch.cat(tokens)
        else:
            author = torch.cat([t[:, -1] if pooling == "last" else t.mean(1) for t in tokens])
        padded = copy.deepcopy(backbone)(input_ids=ids.flip(1), attention_mask=mask.flip(1))
        alone = copy.deepcopy(backbone)(input_ids=ids[1:, 3:].flip(1))
        first, second = (getattr(out, "last_hidden_state", out[0]) for out in (padded, alone))
        leaks = first.ndim == 3 and not torch.allclose(first[1, :5], second[0, :5], rtol=1e-5, atol=1e-6)
    if leaks:  # convolutions see padding, or the model takes no mask: no h can be free of it
        ids, author = ids[:1].repeat(2, 1), author[:1].repeat(2, 1)
        return {**check(backbone, {"input_ids": ids}, author), "leaks": True}
    return check(backbone, {"input_ids": ids, "attention_mask": mask}, author)


# --- results ---


def measured(part: str, families: Iterator[tuple[str, Any]], only: list[str]) -> None:
    """Measure families, one at a time, and keep each in the file as soon as it is there."""
    if not only and OUT.is_file():
        write_json(OUT, {**json.loads(OUT.read_text()), part: {}})
    for family, what in families:
        if only and family not in only:
            continue
        began = time.perf_counter()
        try:
            if part == "timm":
                row = {"model": what, **timm_row(what)}
            else:
                row = {"model": what.__name__, **transformers_row(family, what)}
        except Exception as error:  # whatever a family raises is what its row says
            name = "" if isinstance(error, hfproj.UsageError) else f"{type(error).__name__}: "
            why = "refused" if isinstance(error, hfproj.UsageError) else "unmeasured"
            row = {"model": getattr(what, "__name__", what), why: name + one_line(error)[:300]}
        results = json.loads(OUT.read_text()) if OUT.is_file() else {}
        results.setdefault(part, {})[family] = row
        write_json(OUT, {**results, "versions": installed_versions()})
        print(f"{family}: {json.dumps(row)} ({time.perf_counter() - began:.1f} s)", flush=True)


_POOLED = {"pooler": "its own pooled output", "cls": "class token", "mean": "mean of tokens", "last": "last token"}


def in_words(row: dict[str, Any]) -> str:
    """Return a row's verdict: yes, or what does not hold."""
    for why in ("refused", "unmeasured"):
        if why in row:
            return f"{why}: {row[why].replace('|', '/')}"
    said = {
        f"h differs by {row['difference']:.1g}": row["difference"] > TOLERANCE,
        "the bare output differs while disabled": not row["restored"],
        "h is random": row["random"],
        "LoRA does not act in eval mode": not row["acts"],
        "eval differs with gradients": not row["one_eval"],
        f"no gradient: {', '.join((row['idle_lora'] + row['idle_full'])[:2])}": row["idle_lora"] or row["idle_full"],
    }
    return "; ".join(text for text, holds in said.items() if holds) or (
        "yes, without padding, which changes the model's own tokens" if row.get("leaks") else "yes"
    )


def write_table() -> None:
    """Write the tables between the marks of docs/backbones.md."""
    results = json.loads(OUT.read_text())
    lines = []
    for part in ("timm", "transformers"):
        rows = results.get(part, {})
        refused, none = (sum(why in row for row in rows.values()) for why in ("refused", "unmeasured"))
        good = sum(bool(row.get("holds")) for row in rows.values())
        version = results["versions"].get(part)
        title = f"### {part} {version}: {len(rows)} families, {good} as promised, {refused} refused"
        lines += [f"{title}, {none} unmeasured", "",
                  "| family | model | h | all of it holds | LoRA reaches |", "|---|---|---|---|---|"]  # fmt: skip
        for family, row in rows.items():
            reach = f"{row['lora']} {row['of']}" if "lora" in row else ""
            how = _POOLED.get(row.get("reading", ""), "")
            lines.append(f"| {family} | {row['model']} | {how} | {in_words(row)} | {reach} |")
        lines.append("")
    lines += ["### Cost of attaching a head with LoRA", "",
              "| backbone | PEFT's LoRA, CPU s | with a head, CPU s | PEFT's LoRA, MiB | with a head, MiB |",
              "|---|---:|---:|---:|---:|"]  # fmt: skip
    for name, row in results.get("costs", {}).items():
        own, ours = row["peft"], row["hfproj"]
        lines.append(f"| {name} | {own['cpu']} | {ours['cpu']} | {own['MiB']} | {ours['MiB']} |")
    before, _, _ = DOC.read_text(encoding="utf-8").partition("<!-- table -->\n")
    DOC.write_text(f"{before}<!-- table -->\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("timm", "transformers", "table"))
    parser.add_argument("only", nargs="*", help="Families to measure; none measures all.")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if options.part != "table":
        families = timm_families() if options.part == "timm" else transformers_families()
        measured(options.part, families, options.only)
    write_table()


if __name__ == "__main__":
    main()
