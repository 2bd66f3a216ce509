"""N processes give what one process with the joint batch gives, in float64."""

import pytest
import torch
from distributed.cases import CASES
from distributed.run import SHARDS, assert_equal_to_one, on_processes

from hfproj import distributed

OF_THEIR_OWN = {"plumbing", "nt_xent, local negatives"} | {name for name in CASES if "in all" in name}


processes = pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)])


@processes
@pytest.mark.parametrize("name", [name for name in CASES if name not in OF_THEIR_OWN])
def test_equals_one_process(name, world_size):
    assert_equal_to_one(name, world_size)


@processes
def test_ranks_counts_and_objects(world_size):
    ranks = list(range(world_size))
    for rank, result in enumerate(on_processes(world_size)["plumbing"]):
        assert result["rank"].tolist() == [rank, world_size]
        assert result["counts"].tolist() == [10 + r for r in ranks]
        assert result["broadcast"].item() == 5
        assert result["objects"].tolist() == ranks


@processes
@pytest.mark.parametrize("name", [name for name in CASES if "in all" in name])
def test_one_row_over_all_processes_is_refused_on_every_rank(name, world_size):
    assert [result["refused"].item() for result in on_processes(world_size)[name]] == [1] * world_size


@processes
def test_local_negatives_stay_local(world_size):
    from hfproj.objectives.nt_xent import nt_xent_loss

    z = torch.randn(2, sum(SHARDS[world_size]), 4, dtype=torch.float64)
    for shard, result in zip(z.split(SHARDS[world_size], 1), on_processes(world_size)["nt_xent, local negatives"]):
        torch.testing.assert_close(result["loss"], nt_xent_loss(shard), rtol=1e-12, atol=0)


def test_one_process_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.gather_rows(x) is x
    assert distributed.all_reduce_sum(x) is x
    assert not distributed.all_reduce_max(x).requires_grad
    assert distributed.row_counts(3) == [3]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    distributed.barrier()
