"""The table of cases: name → function of :class:`distributed.run.Processes` that returns named tensors.

Unless a test says otherwise, what a case returns on each of N processes equals what it returns on one.
"""

import torch
from torch import nn

from distributed.diagnostics import DIAGNOSTICS
from distributed.extraction import EXTRACTION
from distributed.methods import METHODS
from distributed.probes import PROBES
from distributed.run import Processes
from hfproj import distributed
from hfproj.errors import UsageError
from hfproj.functional.moments import covariance_penalty, off_diagonal_energy
from hfproj.heads.mlp import MLPHead
from hfproj.heads.norm import BatchNorm
from hfproj.objectives.nt_xent import NTXent


class Network(nn.Module):
    """A small encoder and an MLP head with BatchNorm."""

    def __init__(self, statistics: str):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.head = MLPHead(
            in_dim=6, out_dim=4, hidden_dim=7, last_norm="batch", last_affine="scale", batch_statistics=statistics
        )

    def forward(self, x):
        return self.head(self.encoder(x))


def training(objective: nn.Module, *, views: int = 2, statistics: str = "per_view"):
    """Two steps of SGD in float64, with the gradients of the second and all running statistics."""

    def case(processes: Processes):
        network = Network(statistics).double()
        x = torch.randn(2, views, processes.total, 5, dtype=torch.float64)
        model = processes.wrap(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for batch in x:
            optimizer.zero_grad()
            loss, terms = objective(model(processes.rows(batch, dim=1)))
            loss.backward()
            optimizer.step()
        gradients = {f"{name}.grad": p.grad for name, p in network.named_parameters()}
        return {"loss": loss, **terms, **gradients, **network.state_dict()}

    return case


def gather(shards=None):
    """Value, gradient and second derivative of a joint function of gathered rows."""

    def case(processes: Processes):
        x = torch.randn(processes.total, 3, dtype=torch.float64)
        direction = torch.randn_like(x)
        local = processes.rows(x, shards=shards).requires_grad_()
        joint = distributed.gather_rows(local)
        value = (joint.T @ joint).square().sum()
        (grad,) = torch.autograd.grad(value, local, create_graph=True)
        grad = grad / distributed.world_size()  # the mean over ranks that DDP takes
        (hvp,) = torch.autograd.grad((grad * processes.rows(direction, shards=shards)).sum(), local)
        return {"joint": joint, "value": value, "grad": _joint(grad), "hvp": _joint(hvp)}

    return case


def _joint(x):
    return distributed.gather_rows(x.detach())


def reductions(processes: Processes):
    x = torch.arange(processes.total, dtype=torch.float64) + 1
    local = processes.rows(x).clone().requires_grad_()
    value = distributed.all_reduce_sum(local.sum()).square()
    (grad,) = torch.autograd.grad(value, local)
    return {
        "value": value,
        "grad": _joint(grad / distributed.world_size()),
        "max": distributed.all_reduce_max(local.max()),
        "labels": distributed.gather_rows(processes.rows(torch.arange(processes.total))),
    }


def plumbing(processes: Processes):
    """What is only meaningful on several processes: compared with the ranks in the test."""
    distributed.barrier()
    return {
        "rank": torch.tensor([distributed.rank(), distributed.world_size()]),
        "counts": torch.tensor(distributed.row_counts(10 + processes.rank)),
        "broadcast": torch.tensor(distributed.broadcast_object(distributed.rank() + 5)),
        "objects": torch.tensor([o["rank"] for o in distributed.gather_objects({"rank": distributed.rank()})]),
    }


def batch_norm(statistics: str, shards=None, views: int = 2):
    """Output, input gradient, parameter gradients and running statistics of one BatchNorm."""

    def case(processes: Processes):
        norm = BatchNorm(3, statistics=statistics).double()
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        x = 100 + torch.randn(views, processes.total, 3, dtype=torch.float64)
        cotangent = torch.randn_like(x)
        local = processes.rows(x, dim=1, shards=shards).clone().requires_grad_()
        y = norm(local)
        # a joint scalar: collectives sum in its backward
        distributed.all_reduce_sum((y * processes.rows(cotangent, dim=1, shards=shards)).sum()).backward()
        by_row = (t.transpose(0, 1).detach() for t in (y, local.grad / distributed.world_size()))
        y, grad = (distributed.gather_rows(t) for t in by_row)
        parameters = {
            f"{name}.grad": distributed.all_reduce_sum(p.grad) / distributed.world_size()
            for name, p in norm.named_parameters()
        }
        return {"y": y, "grad": grad, **parameters, **norm.state_dict()}

    return case


def local_negatives(processes: Processes):
    z = torch.randn(2, processes.total, 4, dtype=torch.float64)
    return {"loss": NTXent(gather=False, tile_rows=3)(processes.rows(z, dim=1)).loss}


def refused(function):
    """1 where `function` of one single row over all processes raises UsageError, 0 elsewhere."""

    def case(processes: Processes):
        rows = torch.randn(2, 1 if processes.rank == 0 else 0, 4, dtype=torch.float64)
        try:
            function(rows)
        except UsageError:
            return {"refused": torch.tensor(1)}
        return {"refused": torch.tensor(0)}

    return case


ONE_ROW_HERE = {2: (7, 1), 3: (7, 1, 1)}
NONE_HERE = {2: (8, 0), 3: (0, 4, 5)}


def products(width: int):
    """Value, gradient and Hessian-vector product of a norm of covariances, by N × N or D × D matrices."""

    def case(processes: Processes):
        x = torch.randn(2, processes.total, width, dtype=torch.float64)
        direction = processes.rows(torch.randn_like(x), dim=1)
        local = processes.rows(x, dim=1).clone().requires_grad_()
        value = off_diagonal_energy(local[0], local[1]) + covariance_penalty(local[0])
        (grad,) = torch.autograd.grad(value, local, create_graph=True)
        grad = grad / distributed.world_size()
        (hvp,) = torch.autograd.grad((grad * direction).sum(), local)
        by_row = {"grad": grad, "hvp": hvp}
        return {"value": value, **{n: _joint(t.transpose(0, 1)) for n, t in by_row.items()}}

    return case


CASES = {
    "products of few rows": products(20),
    "products of few dimensions": products(4),
    "gather": gather(),
    "gather, empty rank": gather(NONE_HERE),
    "reductions": reductions,
    "plumbing": plumbing,
    "batch norm per view": batch_norm("per_view"),
    "batch norm joint": batch_norm("joint"),
    "batch norm, one row on a rank": batch_norm("per_view", ONE_ROW_HERE),
    "batch norm, empty rank": batch_norm("per_view", NONE_HERE),
    "batch norm, one row in all": refused(lambda rows: BatchNorm(4).double()(rows)),
    "nt_xent, local negatives": local_negatives,
    "nt_xent, one image in all": refused(NTXent(tile_rows=2)),
    "nt_xent dense, one image in all": refused(NTXent(tile_rows=None)),
    "nt_xent dense": training(NTXent(tile_rows=None)),
    "nt_xent dense, 3 views, joint statistics": training(NTXent(tile_rows=None), views=3, statistics="joint"),
    "nt_xent tiled": training(NTXent(tile_rows=3)),
    "nt_xent tiled, joint statistics": training(NTXent(tile_rows=5), statistics="joint"),
    "nt_xent tiled, 3 views": training(NTXent(tile_rows=4), views=3),
    "nt_xent tiled, cold": training(NTXent(tile_rows=4, temperature=0.01)),
    **METHODS,
    **DIAGNOSTICS,
    **EXTRACTION,
    **PROBES,
}
