"""Cases of feature extraction: every row once, in order, the same on all processes, with a cache and without."""

import hashlib
import shutil
import tempfile
import types
from pathlib import Path

import torch
from torch import nn

from distributed.run import Processes
from hfproj import distributed
from hfproj.features import extract_features


class Net(nn.Module):
    """A backbone and a head in float64."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.backbone, self.head = nn.Conv1d(2, 5, 1).double(), nn.Linear(5, 3).double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        tokens = self.backbone(x).mT
        h = tokens.mean(1)
        return types.SimpleNamespace(representation=h, projection=self.head(h), backbone_output=tokens)


class Collator:
    """Stacks items."""

    cache_key = "stacked"

    def __call__(self, items):
        x, labels = zip(*items)
        return {"pixel_values": torch.stack(x), "labels": torch.tensor(labels), "index": 100 + torch.tensor(labels)}


def data(rows: int) -> list:
    x = torch.randn(rows, 2, 4, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    return [(x[i], i) for i in range(rows)]


def extraction(rows: int, batch_size: int, *, cached: bool):
    """All that `extract_features` returns of a data set, and the bytes of its cache."""

    def case(processes: Processes):
        model, options = Net(), {"layers": ["backbone"], "tokens": True, "dtype": torch.float64}
        folder = None
        if cached:
            folder = distributed.broadcast_object(tempfile.mkdtemp() if distributed.rank() == 0 else None)
            options["cache_dir"] = folder
        try:
            results = [
                extract_features(model, data(rows), collator=Collator(), batch_size=batch_size, **options)
                for _ in range(1 + cached)
            ]
            found = {}
            for features in results:
                assert features.labels.tolist() == list(range(rows))
                assert features.index.tolist() == list(range(100, 100 + rows))
                found = {**features.by_name(), "tokens": features.tokens}
                found = {name: f.clone() for name, f in found.items()}
            if folder is not None:
                seen = distributed.all_reduce_sum(torch.tensor(sum(model.seen)))
                assert seen == rows, seen  # each row once in all, and none by the second call
                contents = [path.read_bytes() for path in sorted(Path(folder).glob("*/*"))]
                assert len(contents) == 2, list(Path(folder).glob("*/*"))
                sums = b"".join(hashlib.sha256(content).digest() for content in contents)
                found["files"] = torch.tensor(list(sums), dtype=torch.float64)
            return found
        finally:
            distributed.barrier()
            if folder is not None and distributed.rank() == 0:
                shutil.rmtree(folder)

    return case


EXTRACTION = {
    "features of 11 rows": extraction(11, 4, cached=False),
    "features of one row": extraction(1, 4, cached=False),
    "cached features of one row": extraction(1, 4, cached=True),
    "cached features of fewer shards than processes": extraction(300, 256, cached=True),
    "cached features of uneven shards": extraction(1301, 64, cached=True),
}
