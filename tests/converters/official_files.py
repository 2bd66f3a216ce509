"""One checkpoint of every layout that the converters know, small; `full=True` makes it at its official size."""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from official_layers import Builder, Case, below, double, run_mlp, run_resnet, run_vit, wrapped
from torch import Tensor

SMALL = {"channels": (8, 8, 12, 16), "layers": (1, 1, 1, 1)}
RESNET50 = {"channels": (64, 128, 256, 512), "layers": (3, 4, 6, 3)}


def optimizer() -> dict[str, Any]:
    """What an optimizer with a numpy schedule leaves in a file."""
    return {"state": {}, "param_groups": [{"lr": np.float64(0.1), "params": [0, 1]}]}


def resnet(builder: Builder, prefix: str, full: bool) -> int:
    return builder.resnet(prefix, **(RESNET50 if full else SMALL))


def encoded(state: dict[str, Tensor], prefix: str) -> Callable[[Tensor], Tensor]:
    return lambda x: run_resnet(double(below(state, prefix)), x)


def dino_logits(state: dict[str, Tensor], prefix: str, z: Tensor) -> Tensor:
    v, g = state[f"{prefix}weight_v"].double(), state[f"{prefix}weight_g"].double()
    return F.normalize(z, dim=-1) @ (g * v / v.norm(dim=1, keepdim=True)).T


def dino_head(builder: Builder, prefix: str, last: str, width: int, full: bool, norm: bool = False, g: bool = False):
    widths = (2048, 2048, 256) if full else (20, 20, 10)
    builder.mlp(prefix, width, *widths, norm=norm)
    count = 65536 if full else 30
    builder.tensors[f"{last}weight_g"] = torch.ones(count, 1)
    if g:
        builder.normal(f"{last}weight_g", count, 1, mean=1.0, std=0.1)
    builder.normal(f"{last}weight_v", count, widths[-1])


def dino(full: bool = False, *, arch: str = "vit", network: str = "teacher", norm: bool = False, g: bool = False):
    file: dict[str, Any] = {"optimizer": optimizer(), "epoch": 100, "args": argparse.Namespace(arch=arch, lr=0.1)}
    states = {}
    for seed, name in enumerate(("student", "teacher")):
        builder = Builder(seed)
        if arch == "vit":
            size = {"width": 384, "depth": 12, "patch": 16, "image": 224} if full else {}
            width = builder.vit("backbone.", **size)
        else:
            width = resnet(builder, "backbone.", full)
        dino_head(builder, "head.mlp.", "head.last_layer.", width, full, norm, g)
        states[name] = builder.tensors
        file[name] = wrapped(builder.tensors) if name == "student" or norm or arch != "vit" else builder.tensors
    file["dino_loss"] = {"center": torch.zeros(1, 30)}
    state, heads = states[network], 6 if full else 3

    def run(x: Tensor) -> dict[str, Tensor]:
        body = double(below(state, "backbone."))
        h = run_vit(body, x, heads)[:, 0] if arch == "vit" else run_resnet(body, x)
        steps = "0 1 act 3 4 act 6" if norm else "0 act 2 act 4"
        z = run_mlp(double(below(state, "head.mlp.")), h, steps, F.gelu)
        return {"h": h, "z": z, "scores": dino_logits(state, "head.last_layer.", z)}

    image = 224 if full else 16 if arch == "vit" else 32
    options = {} if full or arch != "vit" else {"num_heads": heads}
    return Case("dino", file, image, run, {**options, "network": network})


def dinov2(full: bool = False, *, head: str = "dino_head", chunks: int = 0, rich: bool = False, whole: bool = False):
    builder = Builder()
    size: dict[str, Any] = {"width": 384, "depth": 12, "patch": 14, "image": 224} if full else {"patch": 7, "image": 14}
    if rich:  # SwiGLU and registers
        size |= {"gated": True, "registers": 3, "hidden": 2048 if full else 64}
    depth = size.get("depth", 2)
    width = builder.vit("backbone.", scaled=True, chunks=chunks, **size)
    for name in ("dino_head", "ibot_head"):
        dino_head(builder, f"{name}.mlp.", f"{name}.last_layer.", width, full)
    state, heads = builder.tensors, 6 if full else 3
    file: dict[str, Any] = {"teacher": state}
    if whole:
        file = {
            "model": {**wrapped(state, "teacher."), **wrapped(state, "student."), "dino_loss.center": torch.ones(1)}
        }

    def run(x: Tensor) -> dict[str, Tensor]:
        tokens = run_vit(double(below(state, "backbone.")), x, heads, depth // chunks if chunks else 0)
        h = tokens[:, 0] if head == "dino_head" else tokens[:, 1 + size.get("registers", 0) :].mean(1)
        z = run_mlp(double(below(state, f"{head}.mlp.")), h, "0 act 2 act 4", F.gelu)
        return {"h": h, "z": z, "scores": dino_logits(state, f"{head}.last_layer.", z)}

    options = {} if full else {"num_heads": heads}
    return Case("dinov2", file, size["image"], run, {**options, "head": head})


def moco(full: bool = False, *, mlp: bool = True, network: str = "query"):
    file, states = {}, {}
    for seed, (name, prefix) in enumerate({"query": "encoder_q.", "key": "encoder_k."}.items()):
        builder = Builder(seed)
        width = resnet(builder, prefix, full)
        if mlp:
            builder.mlp(f"{prefix}fc.", width, width, 128 if full else 12)
        else:
            builder.linear(f"{prefix}fc.", width, 128 if full else 12)
        states[name] = below(builder.tensors, prefix)
        file |= builder.tensors
    file["queue"], file["queue_ptr"] = torch.randn(12, 32), torch.zeros(1, dtype=torch.long)
    state = states[network]

    def run(x: Tensor) -> dict[str, Tensor]:
        h = encoded(state, "")(x)
        return {"h": h, "z": run_mlp(double(below(state, "fc.")), h, "0 act 2" if mlp else "-")}

    content = {"epoch": 200, "arch": "resnet50", "state_dict": wrapped(file), "optimizer": optimizer()}
    return Case("moco_v2" if mlp else "moco_v1", content, 224 if full else 32, run, {"network": network})


def moco_v3(full: bool = False, *, arch: str = "vit", network: str = "base", last_norm: bool = True):
    state: dict[str, Tensor] = {}
    hidden, out = (4096, 256) if full else (20, 12)
    unbiased = {"norm": True, "bias": False, "last_bias": False, "last_affine": False}
    part = "head." if arch == "vit" else "fc."
    for seed, name in enumerate(("base", "momentum")):
        builder, prefix = Builder(seed), f"{name}_encoder."
        if arch == "vit":
            size = {"width": 384, "depth": 12, "patch": 16, "image": 224} if full else {}
            width = builder.vit(prefix, **size)
            widths = (width, hidden, hidden, out)
        else:
            width = resnet(builder, prefix, full)
            widths = (width, hidden, out)
        builder.mlp(prefix + part, *widths, last_norm=True, **unbiased)
        state |= builder.tensors
    builder = Builder(2)
    builder.mlp("predictor.", out, hidden, out, last_norm=last_norm, **unbiased)
    state |= builder.tensors
    heads = 12 if full else 3

    def run(x: Tensor) -> dict[str, Tensor]:
        body = double(below(state, f"{network}_encoder."))
        h = run_vit(body, x, heads)[:, 0] if arch == "vit" else run_resnet(body, x)
        z = run_mlp(below(body, part), h, "0 1 act 3 4 act 6 7" if arch == "vit" else "0 1 act 3 4")
        if network == "momentum":
            return {"h": h, "z": z}
        p = run_mlp(double(below(state, "predictor.")), z, "0 1 act 3 4" if last_norm else "0 1 act 3")
        return {"h": h, "z": z, "p": p}

    image = 224 if full else 16 if arch == "vit" else 32
    options = {"num_heads": heads} if arch == "vit" and not full else {}
    content = {"epoch": 300, "arch": arch, "state_dict": wrapped(state), "scaler": {"scale": 65536.0}}
    return Case("moco_v3", content, image, run, {**options, "network": network})


def simclr(full: bool = False, *, port: str = "spijkervet"):
    builder = Builder()
    prefix = {"spijkervet": "encoder.", "sthalles": "backbone."}[port]
    width = resnet(builder, prefix, full)
    head = "projector." if port == "spijkervet" else "backbone.fc."
    bias = port == "sthalles"
    builder.mlp(head, width, width, 64 if full else 12, bias=bias, last_bias=bias)
    state = builder.tensors

    def run(x: Tensor) -> dict[str, Tensor]:
        h = encoded(state, prefix)(x)
        return {"h": h, "z": run_mlp(double(below(state, head)), h, "0 act 2")}

    content = {"epoch": 100, "arch": "resnet18", "state_dict": state} if bias else state
    return Case("simclr", content, 224 if full else 32, run)


def simclr_v2(full: bool = False, *, shift: bool = False):
    builder = Builder()
    width = resnet(builder, "", full)
    names = dict(builder.tensors)
    builder.tensors.clear()
    head = {"norm": True, "bias": False, "last_bias": False, "last_norm": True}
    builder.mlp("layers.", width, width, width, 128 if full else 12, **head)
    if not shift:
        builder.tensors["layers.7.bias"].zero_()
    body: dict[str, Tensor] = {}
    for name, tensor in names.items():  # the port's own ResNet
        stage, _, rest = name.partition(".")
        if not stage.startswith("layer"):
            body[name.replace("conv1.", "net.0.0.").replace("bn1.", "net.0.1.0.")] = tensor
            continue
        block, part, leaf = rest.split(".", 2)
        new = {
            "conv1": "net.0.", "bn1": "net.1.0.", "conv2": "net.2.", "bn2": "net.3.0.", "conv3": "net.4.",
            "bn3": "net.5.0.", "downsample": "projection.",
        }[part] + leaf  # fmt: skip
        new = new.replace("projection.0.", "projection.shortcut.").replace("projection.1.", "projection.bn.0.")
        body[f"net.{stage[5:]}.blocks.{block}.{new}"] = tensor
    body |= {"fc.weight": torch.randn(5, width), "fc.bias": torch.randn(5)}
    state = dict(builder.tensors)

    def run(x: Tensor) -> dict[str, Tensor]:
        h = run_resnet(double(names), x)
        return {"h": h, "z": run_mlp(double(below(state, "layers.")), h, "0 1 act 3 4 act 6 7")}

    return Case("simclr_v2", {"resnet": body, "head": state}, 224 if full else 32, run)


def simsiam(full: bool = False):
    builder = Builder()
    width = resnet(builder, "encoder.", full)
    out, hidden = (2048, 512) if full else (width, 12)
    builder.mlp("encoder.fc.", width, width, width, out, norm=True, bias=False, last_norm=True, last_affine=False)
    builder.mlp("predictor.", out, hidden, out, norm=True, bias=False)
    state = builder.tensors

    def run(x: Tensor) -> dict[str, Tensor]:
        h = encoded(state, "encoder.")(x)
        z = run_mlp(double(below(state, "encoder.fc.")), h, "0 1 act 3 4 act 6 7")
        return {"h": h, "z": z, "p": run_mlp(double(below(state, "predictor.")), z, "0 1 act 3")}

    return Case("simsiam", {"epoch": 100, "state_dict": wrapped(state)}, 224 if full else 32, run)


def byol(full: bool = False, *, port: str = "yaox12", network: str = "online", simsiam_mlp: bool = False):
    state: dict[str, Tensor] = {}
    hidden, out = (4096, 256) if full else (20, 12)
    kind = "network" if port == "yaox12" else "encoder"
    bodies = {}
    for seed, name in enumerate(("online", "target")):
        builder, own = Builder(seed), f"{name}_{kind}."
        width = resnet(builder, "", full)
        bodies[name] = dict(builder.tensors)
        builder.tensors.clear()
        if port == "yaox12":
            children = {"conv1.": "0.", "bn1.": "1.", **{f"layer{i}.": f"{i + 3}." for i in range(1, 5)}}
            for key, tensor in bodies[name].items():
                first = key.split(".")[0] + "."
                state[f"{own}encoder.{children[first]}{key.removeprefix(first)}"] = tensor
            builder.mlp("", width, hidden, out, norm=True)
            names = {"0": "l1", "1": "bn1", "3": "l2"}
            state |= {f"{own}projetion.{names[k[0]]}{k[1:]}": t for k, t in builder.tensors.items()}
        else:
            body = {**bodies[name], "fc.weight": torch.randn(5, width), "fc.bias": torch.randn(5)}
            state |= wrapped(body, f"{own}net.")
            if name == "online":
                state |= wrapped(body, "net.")
            widths = (width, hidden, hidden, out) if simsiam_mlp else (width, hidden, out)
            unbiased = {"bias": False, "last_bias": False, "last_norm": True, "last_affine": False}
            builder.mlp("", *widths, norm=True, **(unbiased if simsiam_mlp else {}))
            state |= wrapped(builder.tensors, f"{own}projector.")
    builder = Builder(2)
    builder.mlp("", out, hidden, out, norm=True)
    names = {"0": "l1", "1": "bn1", "3": "l2"}
    if port == "yaox12":
        state |= {f"predictor.predictor.{names[k[0]]}{k[1:]}": t for k, t in builder.tensors.items()}
    else:
        state |= wrapped(builder.tensors, "online_predictor.")

    def run(x: Tensor) -> dict[str, Tensor]:
        h = run_resnet(double(bodies[network]), x)
        head = below(state, f"{network}_{kind}.{'projetion' if port == 'yaox12' else 'projector'}.")
        steps = "l1 bn1 act l2" if port == "yaox12" else "0 1 act 3 4 act 6 7" if simsiam_mlp else "0 1 act 3"
        z = run_mlp(double(head), h, steps)
        if network == "target":
            return {"h": h, "z": z}
        last = "predictor.predictor." if port == "yaox12" else "online_predictor."
        p = run_mlp(double(below(state, last)), z, "l1 bn1 act l2" if port == "yaox12" else "0 1 act 3")
        return {"h": h, "z": z, "p": p}

    content = {"model": wrapped(state), "epoch": 300, "amp": {}, "config": {"a": 1}} if port == "yaox12" else state
    return Case("byol", content, 224 if full else 32, run, {"network": network})


def projected(full: bool = False, *, method: str = "barlow_twins"):
    builder = Builder()
    width = resnet(builder, "backbone.", full)
    widths = (8192, 8192, 8192) if full else (20, 20, 14)
    builder.mlp("projector.", width, *widths, norm=True, bias=method == "vicreg", last_bias=False)
    if method == "barlow_twins":
        builder.norm("bn.", widths[-1], affine=False)
    state = builder.tensors

    def run(x: Tensor) -> dict[str, Tensor]:
        h = encoded(state, "backbone.")(x)
        return {"h": h, "z": run_mlp(double(below(state, "projector.")), h, "0 1 act 3 4 act 6")}

    content = {"epoch": 1000, "model": wrapped(state), "optimizer": {"state": {}}}
    return Case(method, content, 224 if full else 32, run)


def swav(full: bool = False, *, training: bool = False, linear: bool = False, blocks: int = 0):
    builder = Builder()
    width = resnet(builder, "", full)
    hidden, out, count = (2048, 128, 3000) if full else (20, 12, 9)
    if linear:
        builder.linear("projection_head.", width, out)
    else:
        builder.mlp("projection_head.", width, hidden, out, norm=True)
    names = [f"prototypes{i}.weight" for i in range(blocks)] or ["weight"]
    for name in names:
        builder.normal(f"prototypes.{name}", count, out)
    state = builder.tensors

    def run(x: Tensor) -> dict[str, Tensor]:
        h = run_resnet(double(state), x)
        z = run_mlp(double(below(state, "projection_head.")), h, "-" if linear else "0 1 act 3")
        rows = torch.cat([state[f"prototypes.{name}"].double() for name in names])
        return {"h": h, "z": z, "scores": F.normalize(z, dim=-1) @ F.normalize(rows, dim=-1).T}

    content = {"epoch": 5, "state_dict": wrapped(state), "amp": {"x": 1}} if training else wrapped(state)
    return Case("swav", content, 224 if full else 32, run)


def directclr(full: bool = False, *, mode: str = "directclr", final: bool = False):
    builder, d0 = Builder(), 360 if full else 7
    width = resnet(builder, "backbone.", full)
    builder.linear("online_head.", width, 1000)
    if mode == "simclr":
        bare = {"norm": True, "bias": False, "last_bias": False, "last_norm": True}
        builder.mlp("projector.", width, width, 128 if full else 12, **bare)
    elif mode == "single":
        builder.linear("projector.", width, 128 if full else 12, bias=False)
    state = builder.tensors

    def run(x: Tensor) -> dict[str, Tensor]:
        h = encoded(state, "backbone.")(x)
        if mode == "directclr":
            return {"h": h, "z": h[:, :d0]}
        steps = "0 1 act 3 4" if mode == "simclr" else "-"
        return {"h": h, "z": run_mlp(double(below(state, "projector.")), h, steps)}

    content: dict[str, Any] = {"epoch": 100, "model": wrapped(state)}
    if final:
        content = {"backbone": below(state, "backbone."), "head": below(state, "online_head.")}
    return Case("directclr", content, 224 if full else 32, run, {"d0": d0})


CASES: dict[str, Callable[..., Case]] = {
    "dino: ViT": dino,
    "dino: ViT, student with lengths": lambda full=False: dino(full, network="student", g=True),
    "dino: ResNet, BatchNorm in the head": lambda full=False: dino(full, arch="resnet50", norm=True),
    "dinov2: teacher": dinov2,
    "dinov2: chunked blocks": lambda full=False: dinov2(full, chunks=2),
    "dinov2: SwiGLU, registers, ibot_head": lambda full=False: dinov2(full, rich=True, head="ibot_head"),
    "dinov2: whole model, chunked SwiGLU": lambda full=False: dinov2(full, whole=True, chunks=2, rich=True),
    "moco_v1": lambda full=False: moco(full, mlp=False),
    "moco_v2": moco,
    "moco_v2: key": lambda full=False: moco(full, network="key"),
    "moco_v3: ViT": moco_v3,
    "moco_v3: ViT, momentum": lambda full=False: moco_v3(full, network="momentum"),
    "moco_v3: ResNet": lambda full=False: moco_v3(full, arch="resnet50", last_norm=False),
    "moco_v3: ResNet, early version": lambda full=False: moco_v3(full, arch="resnet50"),
    "simclr: Spijkervet": simclr,
    "simclr: sthalles": lambda full=False: simclr(full, port="sthalles"),
    "simclr_v2": simclr_v2,
    "simclr_v2: with a shift": lambda full=False: simclr_v2(full, shift=True),
    "simsiam": simsiam,
    "byol: yaox12": byol,
    "byol: yaox12, target": lambda full=False: byol(full, network="target"),
    "byol: lucidrains": lambda full=False: byol(full, port="lucidrains"),
    "byol: lucidrains, SimSiam's projector": lambda full=False: byol(full, port="lucidrains", simsiam_mlp=True),
    "byol: lucidrains, target": lambda full=False: byol(full, port="lucidrains", network="target"),
    "barlow_twins": projected,
    "vicreg": lambda full=False: projected(full, method="vicreg"),
    "swav: release": swav,
    "swav: training": lambda full=False: swav(full, training=True),
    "swav: linear head": lambda full=False: swav(full, linear=True),
    "swav: DeepCluster-v2": lambda full=False: swav(full, blocks=3),
    "directclr": directclr,
    "directclr: final file": lambda full=False: directclr(full, final=True),
    "directclr: simclr": lambda full=False: directclr(full, mode="simclr"),
    "directclr: single": lambda full=False: directclr(full, mode="single"),
}
