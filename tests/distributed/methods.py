"""Cases made from the tables of objectives and regularizers: training steps on N processes against one."""

import copy

import torch
from objectives.objective_cases import CASES, OUT_DIM, Case
from regularizers.regularizer_cases import CASES as REGULARIZERS
from torch import nn

from distributed.run import Processes
from hfproj import ProjectionHeadConfig
from hfproj.objectives import create_objective
from hfproj.objectives.base import Step
from hfproj.regularizers import create_regularizer
from hfproj.tuner.layer import HeadModules

IN_DIM = 5
MOMENTUM = 0.5  # of the EMA teacher: large changes, so that a wrong teacher shows


class Adapter(nn.Module):
    """Encoder, head, predictor, prototypes and scales, as an adapter holds them."""

    def __init__(self, case: Case, objective: nn.Module):
        super().__init__()
        scales = getattr(objective, "scales", None) or None
        config = ProjectionHeadConfig(
            head=case.head,
            head_options=case.head_options,
            out_dim=OUT_DIM,
            predictor=case.predictor,
            prototypes=case.prototypes,
            scales=scales,
        )
        self.encoder = nn.Sequential(nn.Linear(IN_DIM, 6), nn.Tanh())
        self.modules_ = HeadModules(config, 6)

    def forward(self, x):
        """Return h, z and what else there is, each ``[views, batch, dim]``."""
        h = self.encoder(x)
        out = {name: rows.view(*x.shape[:2], -1) for name, rows in self.modules_(h).items()}
        return {"h": h, **out, "scales": dict(self.modules_.scales)}


def make(case: Case):
    """Return an adapter with its objective and the target copy (or None), in float64."""
    objective = create_objective(case.name, **case.options).double()
    network = Adapter(case, objective).double()
    target = copy.deepcopy(network).requires_grad_(False) if "target" in objective.needs else None
    return network, objective, target


def given(objective, out, target_out, *, labels, index, step, prototypes):
    """Return the keyword arguments of the objective."""
    return {
        "labels": labels,
        "index": index,
        "prediction": out.get("prediction"),
        "scores": out.get("scores"),
        "prototypes": None if prototypes is None else prototypes.vectors().detach(),
        "scales": out["scales"],
        "target": target_out,
        "step": step,
    }


def training_steps(case: Case, rows=None, steps: int = 3):
    """SGD steps in float64 with all that an objective may need; everything that may differ is returned."""

    def run(processes: Processes):
        network, objective, target = make(case)
        total = case.rows or processes.total
        shards = None if case.rows is None else {2: (total - 9, 9), 3: (total - 14, 8, 6)}
        x = torch.randn(steps, case.views, total, IN_DIM, dtype=torch.float64)
        labels, index = torch.arange(total) % 3, torch.arange(total)
        model = processes.wrap(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        result = {}
        for i in range(steps):
            step = Step.at(0, i, i / 2)
            if hasattr(objective, "on_epoch_start") and i in (0, 2):
                objective.on_epoch_start(step)
            mine = processes.rows(x[i], dim=1, shards=shards)
            optimizer.zero_grad()
            out = model(mine)
            teacher = None
            if target is not None:
                seen = target(mine[: getattr(objective, "target_views", None)])
                teacher = seen["scores" if getattr(objective, "target_of", "") == "scores" else "projection"]
            local = [processes.rows(t, shards=shards) for t in (labels, index)]
            keywords = given(
                objective,
                out,
                teacher,
                labels=local[0],
                index=local[1],
                step=step,
                prototypes=network.modules_.prototypes,
            )
            loss, terms = objective(out["projection"], **keywords)
            loss.backward()
            result |= {f"loss {i}": loss, **{f"{name} {i}": value for name, value in terms.items()}}
            result |= {
                f"{name}.grad {i}": p.grad.clone() for name, p in network.named_parameters() if p.grad is not None
            }
            optimizer.step()
            if target is not None:
                for copied, parameter in zip(target.parameters(), network.parameters()):
                    copied.lerp_(parameter.detach(), 1 - MOMENTUM)
        return {**result, **network.state_dict(), **{f"objective.{n}": b for n, b in objective.state_dict().items()}}

    return run


class Head(nn.Module):
    """A backbone with a head, as regularizers see it without PEFT: the head alone."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(IN_DIM, 6), nn.Tanh())
        self.head = HeadModules(ProjectionHeadConfig(head_options={"hidden_dim": 7}, out_dim=OUT_DIM), 6).head

    def forward(self, x):
        h = self.encoder(x)
        return h, self.head(h)


def regularized_step(name: str, options: dict):
    """Value and gradients of a regularizer."""

    def run(processes: Processes):
        regularizer, network = create_regularizer(name, **options).double(), Head().double()
        x = torch.randn(2, processes.total, IN_DIM, dtype=torch.float64)
        model = processes.wrap(network)  # kept until the backward: DDP averages gradients there
        h, z = model(processes.rows(x, dim=1))
        value = regularizer(network.head, h, z, step=Step.at(0, 0, 0.0)) + 0 * z.sum()
        value.backward()
        return {"value": value, **{f"{n}.grad": p.grad for n, p in network.named_parameters() if p.grad is not None}}

    return run


METHODS = {f"objective {name}": training_steps(case) for name, case in CASES.items()}
METHODS |= {f"regularizer {name}": regularized_step(*row) for name, row in REGULARIZERS.items()}
