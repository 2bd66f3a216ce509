"""What an objective is given beside tensors, and what it returns."""

import dataclasses
import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


class ObjectiveOutput(NamedTuple):
    """Loss of the joint batch, and named scalars to log, without gradients."""

    loss: Tensor
    terms: dict[str, Tensor]


@dataclasses.dataclass
class Step:
    """Where training stands.

    Attributes:
        global_step: Optimizer steps taken so far.
        epoch: Epochs done so far, with the fraction of the current one.
        generator: Source of randomness, in the same state on all processes and after a resume.
    """

    global_step: int
    epoch: float
    generator: torch.Generator

    @classmethod
    def at(cls, seed: int, global_step: int, epoch: float, device: torch.device | str = "cpu") -> "Step":
        """Make a step whose generator depends on (`seed`, `global_step`) and on nothing else.

        Example:
            >>> a, b = Step.at(0, 7, 0.5), Step.at(0, 7, 0.5)
            >>> bool(torch.rand((), generator=a.generator) == torch.rand((), generator=b.generator))
            True
        """
        # Hashed, since torch's CPU generator reads 32 bits only and neighbouring seeds must not meet.
        digest = hashlib.blake2b(f"{seed}:{global_step}".encode(), digest_size=4).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
        return cls(global_step, epoch, generator)
