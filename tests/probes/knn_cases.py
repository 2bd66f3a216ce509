"""Banks, labels and queries that are hard for nearest neighbours, and brute force in float64 with the same ties."""

import numpy as np
import torch


def reference(bank, labels, queries, k, temperature, own=False):
    """Brute force in float64, one query at a time: by cosine, then lowest row; votes, then smallest label."""
    bank, queries, labels = bank.double().numpy(), queries.double().numpy(), np.asarray(labels)
    predictions = []
    for number, q in enumerate(queries):
        norms = np.sqrt((bank * bank).sum(1)) * np.sqrt((q * q).sum())
        cosine = (bank * q).sum(1) / np.where(norms > 0, norms, 1)
        cosine = np.round(cosine, 12)  # rows that are equal tie, whatever numpy's summation does
        order = np.argsort(-cosine, kind="stable")
        order = order[order != number] if own else order
        order = order[:k]
        classes = np.unique(labels)
        votes = [np.exp(cosine[order][labels[order] == c] / temperature).sum() for c in classes]
        predictions.append(classes[int(np.argmax(np.round(votes / np.max(votes), 12)))])
    return torch.tensor(np.array(predictions))


def clusters(rows, dim, classes, seed, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (rows,), generator=generator)
    return centres[labels] + noise * torch.randn(rows, dim, generator=generator), labels


CASES = {
    "random": lambda: (*clusters(500, 24, 7, 1, 2.0), clusters(120, 24, 7, 2, 2.0)[0]),
    "float64": lambda: (
        clusters(300, 8, 3, 1)[0].double(),
        clusters(300, 8, 3, 1)[1],
        clusters(50, 8, 3, 2)[0].double(),
    ),
    "offset": lambda: (*clusters(400, 16, 5, 1)[:1], clusters(400, 16, 5, 1)[1], clusters(80, 16, 5, 2)[0] + 30),
    "labels are any integers": lambda: (
        clusters(200, 8, 3, 1)[0],
        clusters(200, 8, 3, 1)[1] * 1000 - 7,
        torch.randn(40, 8),
    ),
    "duplicated": lambda: (clusters(60, 8, 5, 1, 2.0)[0].repeat(9, 1), torch.arange(540) * 7 % 5, torch.randn(80, 8)),
    "few values": lambda: (torch.randint(0, 2, (400, 3)).float(), torch.randint(0, 4, (400,)), torch.eye(3)),
    "collapsed": lambda: (torch.randn(1, 8).expand(300, 8).contiguous(), torch.arange(300) % 3, torch.randn(20, 8)),
    "nearly collapsed": lambda: (1 + 1e-3 * torch.randn(300, 8), torch.arange(300) % 3, 1 + 1e-3 * torch.randn(20, 8)),
    "unbalanced": lambda: (torch.randn(500, 8), (torch.arange(500) < 8).long(), torch.randn(60, 8)),
    "one a class": lambda: (torch.randn(9, 4), torch.arange(9) + 5, torch.randn(30, 4)),
    "one row": lambda: (torch.randn(1, 4), torch.tensor([3]), torch.randn(5, 4)),
    "zero rows": lambda: (torch.cat([torch.zeros(30, 4), torch.randn(30, 4)]), torch.arange(60) % 4, torch.zeros(3, 4)),
    "tiny and huge rows": lambda: (torch.randn(99, 4) * 1e-30, torch.arange(99) % 4, torch.randn(9, 4) * 1e30),
}
