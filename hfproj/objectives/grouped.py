"""One objective on random disjoint groups of dimensions: DirectCLR's mode "group".

A random permutation π of the dimensions of z, drawn anew each step, gives groups π(1…s), π(s+1…2s), …, and

    L = Σ_g L_inner(z[…, group g]).

References:
    Jing et al. 2021, arXiv 2110.09348; facebookresearch/directclr ``directclr/main.py``, mode "group": 8 groups of 256
    entries of the representation (the head ``identity``), the symmetric InfoNCE at temperature 0.1, summed.

Deviations:
    The permutation is the same on all processes; there each process draws its own.
"""

from typing import Any

import torch
from torch import Tensor

from hfproj.errors import UsageError
from hfproj.functional.rows import generator_of
from hfproj.objectives import create_objective
from hfproj.objectives.base import Objective, ObjectiveOutput, Step, check_at_least
from hfproj.typing import Views


def draw_groups(dim: int, groups: int, group_dim: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
    """Return `groups` disjoint random sets of `group_dim` indices below `dim`.

    Example:
        >>> sorted(torch.cat(draw_groups(6, 3, 2)).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    device = "cpu" if generator is None else generator.device
    return torch.randperm(dim, generator=generator, device=device)[: groups * group_dim].split(group_dim)


class Grouped(Objective):
    """The sum of an objective over random disjoint groups of dimensions, drawn anew each step.

    When to use: to spread information over all dimensions without a head (DirectCLR's comparison). It costs the inner
    objective once per group, and has its demands on the batch.

    Args:
        objective: Name of the objective; one without state between steps and without prototypes. The default with its
            own defaults is DirectCLR's.
        objective_options: Its options.
        groups: Number of groups. 8: DirectCLR.
        group_dim: Dimensions of each; None: as many as there are for `groups` equal ones (256 of 2048: DirectCLR).

    Raises:
        UsageError: If an option is out of range or the inner objective keeps state or needs prototypes; in a call, if z
            has fewer dimensions than the groups take, or the inner objective refuses its input.

    Example:
        >>> round(Grouped(objective="nt_xent", groups=2)(torch.ones(2, 4, 8)).loss.exp().item(), 2)  # 7 for each group
        49.0
    """

    def __init__(
        self, *, objective: str = "info_nce", objective_options: dict[str, Any] | None = None, groups: int = 8,
        group_dim: int | None = None,
    ):  # fmt: skip
        super().__init__()
        check_at_least(1, groups=groups, group_dim=group_dim)
        inner: Any = create_objective(objective, **(objective_options or {}))
        self.objective, self.groups, self.group_dim = inner, groups, group_dim
        if inner.needs & {"scores", "prototypes"} or inner.state_dict():
            raise UsageError(
                f"The objective {objective!r} needs prototypes or keeps state between steps, which groups that are "
                "drawn anew each step would mix up; use one without, such as 'info_nce' or 'nt_xent'."
            )
        # What the trainer reads from an objective (see hfproj.objectives.base) is that of the inner one.
        for name in ("views", "needs", "target_of", "target_views", "ema_momentum", "scales"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def compute(
        self, z: Views, *, target: Tensor | None = None, prediction: Tensor | None = None, step: Step | None = None,
        **given: object,
    ) -> ObjectiveOutput:  # fmt: skip
        """Return the sum of the losses, and the mean over the groups of each term.

        `target` and `prediction` are grouped with z. `step` draws the permutation; None, on one process: torch does.
        """
        dim = z.shape[-1]
        group_dim = dim // self.groups if self.group_dim is None else self.group_dim
        if not 0 < self.groups * group_dim <= dim:
            raise UsageError(
                f"z has {dim} dimensions, which is too few for {self.groups} disjoint groups of "
                f"{self.group_dim or 'at least 1'}: use fewer or smaller groups, or a wider head."
            )
        parts = {name: rows for name, rows in (("target", target), ("prediction", prediction)) if rows is not None}
        for name, rows in parts.items():
            self.check_shape(name, rows, z, views=1)
        outputs = []
        for group in draw_groups(dim, self.groups, group_dim, generator_of(step)):
            own = group.to(z.device)
            own_parts = {name: rows[..., own] for name, rows in parts.items()}
            outputs.append(self.objective(z[..., own], step=step, **own_parts, **given))
        terms = {name: torch.stack([o.terms[name] for o in outputs]).mean() for name in outputs[0].terms}
        return ObjectiveOutput(torch.stack([o.loss for o in outputs]).sum(), terms)
