"""Checkpoints of the official structure with random weights, and what the official networks compute from them.

Names and shapes are those of the public code (references in the modules of `hfproj.converters`); widths are small. The
forward passes are written here with torch's functions alone, in float64, and share nothing with the library.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]


class Builder:
    """Random tensors by name, in the order in which a module would register them; with `meta`, shapes alone."""

    def __init__(self, seed: int = 0, *, meta: bool = False):
        self.tensors: Tensors = {}
        self.meta = meta
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> None:
        if self.meta:
            self.tensors[name] = torch.empty(shape, device="meta")
        else:
            self.tensors[name] = mean + std * torch.randn(shape, generator=self.random)

    def linear(self, name: str, width: int, out: int, bias: bool = True) -> None:
        self.normal(f"{name}weight", out, width, std=width**-0.5)
        if bias:
            self.normal(f"{name}bias", out, std=0.3)

    def norm(self, name: str, width: int, affine: bool = True) -> None:
        if affine:
            self.normal(f"{name}weight", width, std=0.2, mean=1.0)
            self.normal(f"{name}bias", width, std=0.3)
        self.normal(f"{name}running_mean", width, std=0.3)
        self.tensors[f"{name}running_var"] = 0.5 + torch.rand(width, generator=self.random)
        self.tensors[f"{name}num_batches_tracked"] = torch.tensor(1000 + len(self.tensors))

    def conv(self, name: str, width: int, out: int, size: int) -> None:
        self.normal(f"{name}.weight", out, width, size, size, std=(width * size**2) ** -0.5)

    def resnet(
        self,
        prefix: str,
        *,
        channels: tuple[int, ...] = (8, 8, 12, 16),
        layers: tuple[int, ...] = (1, 1, 1, 1),
        expansion: int = 4,
    ) -> int:
        """torchvision's ResNet without ``fc``; returns the width of h."""
        self.conv(f"{prefix}conv1", 3, 64, 7)
        self.norm(f"{prefix}bn1.", 64)
        width = 64
        for stage, (planes, count) in enumerate(zip(channels, layers), start=1):
            for block in range(count):
                name = f"{prefix}layer{stage}.{block}."
                out = planes * expansion
                convs = [(width, planes, 1), (planes, planes, 3), (planes, out, 1)]
                if expansion == 1:
                    convs = [(width, planes, 3), (planes, planes, 3)]
                for i, of in enumerate(convs, start=1):
                    self.conv(f"{name}conv{i}", *of)
                    self.norm(f"{name}bn{i}.", of[1])
                if block == 0 and (stage > 1 or width != out):
                    self.conv(f"{name}downsample.0", width, out, 1)
                    self.norm(f"{name}downsample.1.", out)
                width = out
        return width

    def vit(
        self,
        prefix: str,
        *,
        width: int = 24,
        depth: int = 2,
        patch: int = 8,
        image: int = 16,
        scaled: bool = False,
        hidden: int | None = None,
        gated: bool = False,
        registers: int = 0,
        chunks: int = 0,
    ) -> int:
        """timm's ViT as DINO, MoCo v3 and DINOv2 have it; returns the width of h."""
        hidden = hidden or 4 * width
        self.normal(f"{prefix}cls_token", 1, 1, width)
        self.normal(f"{prefix}pos_embed", 1, (image // patch) ** 2 + 1, width)
        if registers:
            self.normal(f"{prefix}register_tokens", 1, registers, width)
        if scaled:
            self.normal(f"{prefix}mask_token", 1, width)
        self.normal(f"{prefix}patch_embed.proj.weight", width, 3, patch, patch, std=0.1)
        self.normal(f"{prefix}patch_embed.proj.bias", width)
        for block in range(depth):
            name = f"{prefix}blocks.{f'{block // (depth // chunks)}.' if chunks else ''}{block}."
            for norm in ("norm1", "norm2"):
                self.normal(f"{name}{norm}.weight", width, std=0.2, mean=1.0)
                self.normal(f"{name}{norm}.bias", width, std=0.3)
            self.linear(f"{name}attn.qkv.", width, 3 * width)
            self.linear(f"{name}attn.proj.", width, width)
            first, second = ("w12", "w3") if gated else ("fc1", "fc2")
            self.linear(f"{name}mlp.{first}.", width, hidden)
            self.linear(f"{name}mlp.{second}.", hidden // 2 if gated else hidden, width)
            if scaled:
                self.normal(f"{name}ls1.gamma", width)
                self.normal(f"{name}ls2.gamma", width)
        self.normal(f"{prefix}norm.weight", width, std=0.2, mean=1.0)
        self.normal(f"{prefix}norm.bias", width, std=0.3)
        return width

    def mlp(
        self,
        prefix: str,
        *widths: int,
        norm: bool = False,
        bias: bool = True,
        last_bias: bool = True,
        last_norm: bool = False,
        last_affine: bool = True,
    ) -> None:
        """An nn.Sequential of linear layers, BatchNorms and activations."""
        position = 0
        for layer, (width, out) in enumerate(pairwise(widths), start=1):
            last = layer == len(widths) - 1
            self.linear(f"{prefix}{position}.", width, out, bias=last_bias if last else bias)
            position += 1
            if last_norm if last else norm:
                self.norm(f"{prefix}{position}.", out, affine=last_affine or not last)
                position += 1
            position += 1  # the activation


def below(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def double(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def run_norm(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale = (tensors[f"{name}.running_var"] + 1e-5).rsqrt().reshape(shape)
    y = (x - tensors[f"{name}.running_mean"].reshape(shape)) * scale
    if f"{name}.weight" in tensors:
        y = y * tensors[f"{name}.weight"].reshape(shape) + tensors[f"{name}.bias"].reshape(shape)
    return y


def run_resnet(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Return h of torchvision's ResNet: strides in the 3 × 3 convolution of a bottleneck."""
    x = F.conv2d(x, tensors["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(run_norm(tensors, "bn1", x)), 3, stride=2, padding=1)
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in tensors:
            name = f"layer{stage}.{block}."
            stride = 2 if stage > 1 and block == 0 else 1
            count = 3 if f"{name}conv3.weight" in tensors else 2
            y = x
            for i in range(1, count + 1):
                weight = tensors[f"{name}conv{i}.weight"]
                here = stride if i == (2 if count == 3 else 1) else 1
                y = run_norm(tensors, f"{name}bn{i}", F.conv2d(y, weight, stride=here, padding=weight.shape[-1] // 2))
                y = F.relu(y) if i < count else y
            if f"{name}downsample.0.weight" in tensors:
                x = F.conv2d(x, tensors[f"{name}downsample.0.weight"], stride=stride)
                x = run_norm(tensors, f"{name}downsample.1", x)
            x = F.relu(x + y)
            block += 1
    return x.mean((2, 3))


def run_vit(tensors: Mapping[str, Tensor], x: Tensor, heads: int, chunk: int = 0) -> Tensor:
    """Return all tokens after the last norm."""

    def layer(name: str, x: Tensor) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-6).sqrt() * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    patches = F.conv2d(
        x, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"],
        stride=tensors["patch_embed.proj.weight"].shape[-1],
    ).flatten(2).mT  # fmt: skip
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), patches], 1) + tensors["pos_embed"]
    if "register_tokens" in tensors:
        x = torch.cat([x[:, :1], tensors["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    for block in range(99):
        name = f"blocks.{f'{block // chunk}.' if chunk else ''}{block}."
        if f"{name}norm1.weight" not in tensors:
            break
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in layer(f"{name}attn.qkv", norm(f"{name}norm1", x)).chunk(3, -1)
        )
        attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        y = layer(f"{name}attn.proj", attention.transpose(1, 2).flatten(2))
        x = x + y * tensors.get(f"{name}ls1.gamma", torch.ones(()))
        y = norm(f"{name}norm2", x)
        if f"{name}mlp.w12.weight" in tensors:
            gate, value = layer(f"{name}mlp.w12", y).chunk(2, -1)
            y = layer(f"{name}mlp.w3", F.silu(gate) * value)
        else:
            y = layer(f"{name}mlp.fc2", F.gelu(layer(f"{name}mlp.fc1", y)))
        x = x + y * tensors.get(f"{name}ls2.gamma", torch.ones(()))
    return norm("norm", x)


def run_mlp(tensors: Mapping[str, Tensor], h: Tensor, steps: str, act: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
    """Return what a chain gives; `steps` names its modules, "act" the activation: ``"0 act 2"``."""
    for name in steps.split():
        if name == "act":
            h = act(h)
        elif f"{name}.running_mean" in tensors:
            h = run_norm(tensors, name, h)
        else:
            weight = tensors[f"{name}.weight" if name != "-" else "weight"]
            bias = tensors.get(f"{name}.bias" if name != "-" else "bias")
            h = h @ weight.T if bias is None else h @ weight.T + bias
    return h


@dataclass
class Case:
    """An official checkpoint and its network.

    Attributes:
        method: Which converter reads it.
        file: What ``torch.save`` wrote.
        image: Side of its images.
        network: Images → {"h", "z", "p", "scores"} in float64.
        options: Of `hfproj.convert`.
        full: The same structure at the official width, for slow checks.
    """

    method: str
    file: dict[str, Any]
    image: int
    network: Callable[[Tensor], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)


def wrapped(tensors: Mapping[str, Tensor], prefix: str = "module.") -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}
