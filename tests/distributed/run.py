"""Runs every case of the table on N gloo processes, started once per N.

``on_processes(n)[name]`` is the list over ranks of what ``CASES[name]`` returned; ``on_one(name, n)`` is what the same
function returns here, on one process with the rows of all.
"""

import dataclasses
import datetime
import functools
import os
import tempfile
import time
import traceback
import warnings

import forked
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = 300  # seconds for all cases of one world size; a single collective gives up after half of it

SHARDS = {2: (5, 3), 3: (4, 3, 2)}  # rows per rank: uneven on purpose


@dataclasses.dataclass
class Processes:
    """What a case may know of where it runs. Written against this, it runs on one process and on several."""

    rank: int
    shards: tuple[int, ...]

    @property
    def one(self):
        return len(self.shards) == 1

    @property
    def total(self):
        return sum(self.shards)

    def rows(self, x: Tensor, dim: int = 0, shards: dict | None = None) -> Tensor:
        """Return this rank's rows of the joint `x`; `shards`: rows per rank by world size, else SHARDS."""
        if self.one:
            return x
        counts = self.shards if shards is None else shards[len(self.shards)]
        return x.split(counts, dim)[self.rank]

    def wrap(self, module: nn.Module) -> nn.Module:
        return module if self.one else DistributedDataParallel(module)


@functools.cache
def on_processes(world_size: int) -> dict[str, list]:
    with tempfile.TemporaryDirectory() as folder:
        forked.context()  # its server has the imports
        start = {"nprocs": world_size, "join": False, "start_method": "forkserver"}
        workers = mp.start_processes(_worker, (world_size, folder), **start)
        deadline = time.monotonic() + TIMEOUT
        try:
            while not workers.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{world_size} processes did not finish within {TIMEOUT} s")
        finally:
            for process in workers.processes:
                if process.is_alive():
                    process.kill()
        ranks = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(world_size)]
    return {name: [results[name] for results in ranks] for name in ranks[0]}


def on_one(name: str, world_size: int) -> dict[str, Tensor]:
    from distributed.cases import CASES

    return _run(CASES[name], Processes(0, (sum(SHARDS[world_size]),)))


def assert_equal_to_one(name: str, world_size: int, tolerance: float = 1e-9) -> None:
    """Assert that on every rank each tensor of a case equals that of one process with the global batch."""
    expected = on_one(name, world_size)
    for rank, result in enumerate(on_processes(world_size)[name]):
        assert isinstance(result, dict), f"rank {rank} failed:\n{result}"
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                result[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key, r=rank: f"rank {r}, {k}: {m}"
            )


def _worker(rank: int, world_size: int, folder: str) -> None:
    from distributed.cases import CASES

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
    )
    results = {}
    for name, case in CASES.items():
        try:
            results[name] = _run(case, Processes(rank, SHARDS[world_size]))
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def _run(case, processes: Processes) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: value.detach() for name, value in case(processes).items()}
