"""Cases of diagnostics: streamed on every process and reduced, against the functions on all rows at once."""

import torch
from diagnostics.features import KINDS, MEASURES, difference, disagreements, normal, numbers

from distributed.run import Processes
from hfproj import diagnostics as d
from hfproj.diagnostics import SpectrumState, ViewState
from hfproj.errors import UsageError

ROWS, DIM = 61, 12
SHARDS = {2: (44, 17), 3: (20, 0, 41)}  # one process of three has nothing
FEW = {2: (6, 0), 3: (1, 2, 3)}  # where there are half as many rows as dimensions


def spectra(kind: str):
    """All streamed measures of one kind of features; every rank holds the joint rows to compare with."""

    def case(processes: Processes):
        f = KINDS[kind](ROWS, DIM)
        local = processes.rows(f, shards=SHARDS if len(f) == ROWS else FEW)
        states = {}
        for normalize in (False, True):
            state = SpectrumState(normalize=normalize)
            for rows in local.split(5):
                state.update(rows)
            states[normalize] = state.reduce()
            assert states[normalize].count == len(f)
            assert state.count == len(local)  # unchanged
        assert not (wrong := disagreements(f, states)), wrong
        return {name: numbers(lambda m=m: m.streamed(states[m.normalize])) for name, m in MEASURES.items()}

    return case


def views(processes: Processes):
    """Alignment, positive cosine and LiDAR of objects that few directions tell apart."""
    z = normal(3 * ROWS, DIM, seed=2).view(3, ROWS, DIM)
    z = z + 5 * normal(ROWS, 4, seed=3) @ normal(4, DIM, seed=4)
    state = ViewState()
    for part in processes.rows(z, dim=1, shards=SHARDS).split(7, dim=1):
        state.update(part)
    joint = state.reduce()
    assert (joint.count, state.count) == (ROWS, processes.rows(z, dim=1, shards=SHARDS).shape[1])
    values = {"cosine": joint.positive_cosine(), "alignment": joint.alignment(), "lidar": joint.lidar()}
    expected = {"cosine": d.positive_cosine(z), "alignment": d.alignment(z), "lidar": d.lidar_of_views(z)}
    for name, value in values.items():
        assert difference(torch.tensor([value]), torch.tensor([expected[name]])) <= 1e-10, name
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def refused(make, axis: int):
    """1 where a state refuses rows that only the last process holds, and names them."""

    def case(processes: Processes):
        f = normal(2 * ROWS, DIM).view(2, ROWS, DIM) if axis else normal(ROWS, DIM)
        f.select(axis, ROWS - 3)[..., 0] = torch.nan
        state = make()
        message = ""
        try:
            for rows in processes.rows(f, dim=axis, shards=SHARDS).split(10, dim=axis):
                state.update(rows)
            state.reduce()
        except UsageError as error:
            message = str(error)
        row = (ROWS if processes.one else SHARDS[len(processes.shards)][-1]) - 3
        expected = [f"row {row} of the stream"] + [f"Process {len(processes.shards) - 1}:"] * (not processes.one)
        assert all(part in message for part in expected), message
        return {"refused": torch.tensor(1)}

    return case


DIAGNOSTICS = {
    **{f"spectra of {kind} features": spectra(kind) for kind in KINDS},
    "views": views,
    "a bad row in all, spectra": refused(SpectrumState, 0),
    "a bad row in all, views": refused(ViewState, 1),
}
