"""What the probes cost in time and memory, and whether they are exact, on synthetic features.

    python recipes/benchmarks/probes.py knn

Each measure is a function below and a subcommand; `all` runs every one. A measure runs in processes of its own, on one
thread, and reports the peak of resident memory of the whole process, features and libraries included. Results go into
recipes/benchmarks/results/probes.json, each under its name; those of other measures stay.

`knn`: bank of 50,000 × 384, 10,000 queries, k = 200. `spread`: ten overlapping Gaussian clusters; `offset`: the same
with a mean as long as the noise, as representations of a real backbone have, so that all cosines lie close together.
`plain`: unit rows, a float32 product, topk and votes, with no care for ties or rounding; `faiss`: its flat index of
inner products, where it is installed (faiss-cpu). `labels_equal` is the fraction of the queries' labels, and
`neighbours_equal` that of neighbour lists, that are those of float64 on the first 1,000 queries. One CPU core,
five minutes.

`linear`: 50,000 × 384, 10 classes, L2 fixed: `LinearProbe` and scikit-learn's StandardScaler and LogisticRegression
(lbfgs, default tolerance and 1e-6), from features to coefficients. `excess` is how far the objective, computed in
float64 from the coefficients, lies above the lowest of a case, relative. `decaying`: columns of a power-law spectrum,
mixed, as representations have it. `path`: L2 chosen from 16 strengths, over the price of that strength alone. `rates`:
13 learning rates at once (`ManyRatesProbe`, one epoch) and one after the other. About three minutes.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import importlib.util
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from hfproj.files import command_line, installed_versions, rounded, write_json
from hfproj.probes import KNNProbe, LinearProbe, ManyRatesProbe

OUT = Path(__file__).resolve().parent / "results" / "probes.json"
ROWS, QUERIES, DIM, CLASSES, K, TEMPERATURE, CHECKED, ROUNDS = 50_000, 10_000, 384, 10, 200, 0.07, 1000, 2


def peak_gib() -> float:
    """Return the largest resident memory that this process has had, in GiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return float(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def timed(function: Callable[[], object]) -> tuple[object, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    value = function()
    return value, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def alone(function: Callable, *arguments: object) -> object:
    """Run a function of this file in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def features(kind: str, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    f = torch.randn(rows, DIM, generator=generator).mul_(10)
    for label, centre in enumerate(centres):
        f[labels == label] += centre
    if kind == "offset":
        f += 10 * torch.randn(DIM, generator=torch.Generator().manual_seed(98))
    return f, labels


def vote(cosines: Tensor, labels: Tensor) -> Tensor:
    votes = torch.zeros(len(cosines), CLASSES, dtype=cosines.dtype)
    return votes.scatter_add_(1, labels, ((cosines - cosines[:, :1]) / TEMPERATURE).exp()).argmax(1)


def plain(bank: Tensor, labels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    bank = torch.nn.functional.normalize(bank, dim=1)
    predicted, rows = [], []
    for some in torch.nn.functional.normalize(queries, dim=1).split(256):
        cosines, near = (some @ bank.T).topk(K)
        predicted.append(vote(cosines, labels[near]))
        rows.append(near)
    return torch.cat(predicted), torch.cat(rows)


def flat_index(bank: Tensor, labels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(DIM)
    index.add(torch.nn.functional.normalize(bank, dim=1).numpy())
    found = index.search(torch.nn.functional.normalize(queries, dim=1).numpy(), K)
    cosines, near = map(torch.from_numpy, found)
    return vote(cosines, labels[near]), near


def probe(bank: Tensor, labels: Tensor, queries: Tensor) -> tuple[Tensor, None]:
    return KNNProbe(k=K, temperature=TEMPERATURE).fit(bank, labels).predict(queries), None


def probe_k_list(bank: Tensor, labels: Tensor, queries: Tensor) -> tuple[Tensor, None]:
    return KNNProbe(k=(K, 10, 20, 100), temperature=TEMPERATURE).fit(bank, labels).predict(queries), None


WAYS = {"KNNProbe": probe, "KNNProbe, k = 10, 20, 100, 200": probe_k_list, "plain": plain, "faiss": flat_index}


def exact(kind: str) -> tuple[Tensor, Tensor]:
    """Return labels and neighbours of the first queries, all in float64."""
    (bank, labels), (queries, _) = features(kind, ROWS, 1), features(kind, QUERIES, 2)
    return plain(bank.double(), labels, queries[:CHECKED].double())


def knn_way(kind: str, way: str, expected: tuple[Tensor, Tensor]) -> dict:
    torch.set_num_threads(1)
    (bank, labels), (queries, _) = features(kind, ROWS, 1), features(kind, QUERIES, 2)
    before = peak_gib()
    runs = [timed(lambda: WAYS[way](bank, labels, queries)) for _ in range(ROUNDS)]
    (predicted, near), _ = runs[0]
    row = {"features": kind, "way": way, "before_gib": before, "peak_gib": peak_gib()}
    row |= {clock: min(times[clock] for _, times in runs) for clock in ("wall", "cpu")}
    if near is None:
        near = KNNProbe(k=K).fit(bank, labels).neighbours(queries[:CHECKED], K).rows
    row["labels_equal"] = (predicted[:CHECKED] == expected[0]).double().mean().item()
    row["neighbours_equal"] = (near[:CHECKED] == expected[1]).all(1).double().mean().item()
    return row


def knn() -> dict:
    rows = []
    for kind in ("spread", "offset"):
        expected = alone(exact, kind)
        for way in WAYS:
            if way == "faiss" and importlib.util.find_spec("faiss") is None:
                continue
            rows.append(alone(knn_way, kind, way, expected))
            print(json.dumps(rounded(rows[-1], 4)), flush=True)
    settings = {"bank": ROWS, "queries": QUERIES, "dim": DIM, "k": K, "classes": CLASSES, "temperature": TEMPERATURE}
    settings |= {"checked": CHECKED, "rounds": ROUNDS, "threads": 1}
    if importlib.util.find_spec("faiss") is not None:
        settings["faiss"] = metadata.version("faiss-cpu")
    return {"settings": settings, "rows": rows}


def decaying(rows: int) -> tuple[Tensor, Tensor]:
    """Return features whose spectrum falls as 1/i, mixed by a rotation, with the class in all directions."""
    f, labels = features("spread", rows, 1)
    generator = torch.Generator().manual_seed(97)
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0]
    return (f / torch.arange(1, DIM + 1)) @ rotation, labels


def scikit_learn(f: Tensor, y: Tensor, l2: float, tol: float) -> tuple[Tensor, Tensor]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x = StandardScaler().fit_transform(f.numpy())
    found = LogisticRegression(C=1 / (len(x) * l2), tol=tol, max_iter=10_000).fit(x, y.numpy())
    return torch.from_numpy(found.coef_).double(), torch.from_numpy(found.intercept_).double()


def linear_way(f: Tensor, y: Tensor, l2: float, way: str) -> tuple[float, dict[str, float]]:
    """Return the objective in float64 and the times of the fit."""
    f64 = f.double()
    mean, std = f64.mean(0), f64.std(0, correction=0)
    if way == "LinearProbe":
        fitted, times = timed(lambda: LinearProbe(l2=l2).fit(f, y))
        coef, intercept = fitted.coef_ * std, fitted.intercept_ + fitted.coef_ @ mean
    else:
        (coef, intercept), times = timed(lambda: scikit_learn(f, y, l2, float(way.split()[-1])))
    loss = torch.nn.functional.cross_entropy((f64 - mean) / std @ coef.T + intercept, y)
    return float(loss + l2 / 2 * coef.square().sum()), times


def linear() -> dict:
    rows, ways = [], ("LinearProbe", "scikit-learn, tol 1e-4", "scikit-learn, tol 1e-6")
    for kind in ("spread", "decaying"):
        f, y = decaying(ROWS) if kind == "decaying" else features(kind, ROWS, 1)
        for l2 in (1e-1, 1e-3):
            found: dict[str, list] = {way: [] for way in ways}
            for way in ways * ROUNDS:  # in turns: a busy neighbour hits all
                found[way].append(linear_way(f, y, l2, way))
            lowest = min(runs[0][0] for runs in found.values())
            for way, runs in found.items():
                row = {"features": kind, "l2": l2, "way": way, "excess": runs[0][0] / lowest - 1}
                row |= {clock: min(times[clock] for _, times in runs) for clock in ("wall", "cpu")}
                rows.append(row)
                print(json.dumps(rounded(row, 4)), flush=True)
        path, of_path = timed(lambda f=f, y=y: LinearProbe().fit(f, y))
        _, of_one = timed(lambda f=f, y=y, l2=path.l2_: LinearProbe(l2=l2).fit(f, y))
        rows.append({"features": kind, "way": "path", "l2": path.l2_, **of_path, "cpu_of_one": of_one["cpu"]})
        rows[-1]["cpu_ratio"] = of_path["cpu"] / of_one["cpu"]
        print(json.dumps(rounded(rows[-1], 4)), flush=True)
    together, at_once = timed(lambda: ManyRatesProbe(epochs=1).fit(f, y))
    _, in_turn = timed(lambda: [ManyRatesProbe(rates=[rate], epochs=1).fit(f, y) for rate in together.rates])
    rows.append(
        {"way": "rates", **at_once, "cpu_in_turn": in_turn["cpu"], "cpu_ratio": in_turn["cpu"] / at_once["cpu"]}
    )
    print(json.dumps(rounded(rows[-1], 4)), flush=True)
    settings = {"rows": ROWS, "dim": DIM, "classes": CLASSES, "rounds": ROUNDS, "threads": 1}
    return {"settings": settings, "rows": rows}


MEASURES: dict[str, Callable[[], dict]] = {"knn": knn, "linear": linear}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=[*MEASURES, "all"])
    chosen = parser.parse_args().measure
    torch.set_num_threads(1)
    for name in MEASURES if chosen == "all" else [chosen]:
        found = MEASURES[name]() | {"command": command_line(), "versions": installed_versions()}
        content = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
        write_json(OUT, content | {name: rounded(found)})


if __name__ == "__main__":
    main()
