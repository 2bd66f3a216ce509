"""What heads, objectives, diagnostics and probes cost on one GPU, beside the plain formulas.

    python recipes/benchmarks/gpu.py            # one GPU, about three minutes
    python recipes/benchmarks/gpu.py --quick    # tiny sizes, on the CPU too: only that it runs
    python recipes/benchmarks/gpu.py --only losses step    # these alone; the others stay as they are

Times are those of CUDA events, the median of `ROUNDS` calls after warm-up; memory is the peak that a call allocates
beyond what was there before. Losses are run forward and backward. `plain` is the formula with autograd, `compiled` the
same through torch.compile. Writes recipes/benchmarks/results/gpu.json and .md (with --quick: below runs/).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

import hfproj
from hfproj.data.augment import Augmentation
from hfproj.diagnostics import rankme
from hfproj.files import installed_versions, write_atomic, write_json

ROUNDS, WARM_UP = 7, 2
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
FULL = {
    "pairs": (2048, 8192, 16384), "wide": (1024, 8192), "rankme": (25_600, (384, 768, 1024, 2048)),
    "knn": (50_000, 10_000, 384, 200), "images": (256, (32, 224)), "vit": ("vit_small_patch16_224", 224, 256),
    "trainer": (256, 40),
}  # fmt: skip
QUICK = {
    "pairs": (64,), "wide": (32, 64), "rankme": (200, (16,)), "knn": (300, 40, 16, 5), "images": (8, (32,)),
    "vit": ("vit_tiny_patch16_224", 32, 4), "trainer": (16, 3),
}  # fmt: skip


def measured(call: Callable[[], Any], rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the median milliseconds of a call, all of them, and the MB it needs at its peak."""
    for _ in range(WARM_UP):
        call()
    before = _peak_from_here()
    times = []
    for _ in range(rounds):
        if GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20 if GPU else None
    return {"ms": statistics.median(times), "all_ms": times, "mb": memory}


def _peak_from_here() -> int:
    if not GPU:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def nt_xent(z: Tensor, temperature: float = 0.2) -> Tensor:
    """The formula: cross entropy of each row's pair among all other rows."""
    u = F.normalize(z, dim=-1).flatten(0, 1)
    logits = (u @ u.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(u), device=u.device).roll(len(u) // 2))


def barlow_twins(z: Tensor) -> Tensor:
    a, b = ((view - view.mean(0)) / view.std(0, correction=0) for view in z)
    c = a.T @ b / len(a)
    on = (c.diagonal() - 1).square().sum()
    return on + 0.0051 * (c.square().sum() - c.diagonal().square().sum())


def vicreg(z: Tensor) -> Tensor:
    loss = 25 * F.mse_loss(z[0], z[1])
    for view in z:
        centred = view - view.mean(0)
        loss = loss + 25 * F.relu(1 - (centred.var(0) + 1e-4).sqrt()).mean() / 2
        c = centred.T @ centred / (len(view) - 1)
        loss = loss + (c.square().sum() - c.diagonal().square().sum()) / view.shape[1]
    return loss


def losses(sizes: dict) -> list[dict]:
    cases = [("nt_xent", {"temperature": 0.2}, nt_xent, (pairs, 128)) for pairs in sizes["pairs"]]
    cases += [("barlow_twins", {}, barlow_twins, sizes["wide"]), ("vicreg", {}, vicreg, sizes["wide"])]
    rows = []
    for name, options, formula, (batch, dim) in cases:
        objective = hfproj.create_objective(name, **options)
        z = normal(2, batch, dim).requires_grad_()
        ways: dict[str, Callable[[Tensor], Tensor]] = {"hfproj": lambda z, o=objective: o(z).loss, "plain": formula}
        if GPU:
            ways["compiled"] = torch.compile(formula, dynamic=False)
        for way, loss in ways.items():

            def step(loss: Callable[[Tensor], Tensor] = loss, z: Tensor = z) -> None:
                torch.autograd.grad(loss(z), z)

            row = {"part": "loss", "what": f"{name}, {batch} pairs, dim {dim}", "way": way}
            try:
                rows.append({**row, **measured(step), "value": loss(z).item()})
            except torch.OutOfMemoryError:
                rows.append({**row, "note": "out of memory"})
        del z
    return rows


def rank(sizes: dict) -> list[dict]:
    count, dims = sizes["rankme"]
    rows = []
    for dim in dims:
        f = normal(count, dim)
        ways: dict[str, Callable[[], float]] = {
            "hfproj": lambda f=f: rankme(f),
            "svdvals, float32": lambda f=f: _rankme(torch.linalg.svdvals(f)),
            "svdvals, float64": lambda f=f: _rankme(torch.linalg.svdvals(f.double())),
        }
        for way, call in ways.items():
            found = measured(call, 3)
            rows.append({"part": "rankme", "what": f"{count} × {dim}", "way": way, **found, "value": call()})
    return rows


def _rankme(sigma: Tensor) -> float:
    p = sigma.double()
    return math.exp(torch.special.entr(p / p.sum() + 1e-7).sum().item())


def probes(sizes: dict) -> list[dict]:
    bank, queries, dim, k = sizes["knn"]
    classes = 10
    centres, y, y_test = normal(classes, dim, seed=9), torch.arange(bank) % classes, torch.arange(queries) % classes
    f = centres[y.to(DEVICE)] + 3 * normal(bank, dim, seed=1)
    f_test = centres[y_test.to(DEVICE)] + 3 * normal(queries, dim, seed=2)
    rows = []
    labels = {}
    for way, part, query in (("hfproj", f, f_test), ("hfproj, CPU", f.cpu(), f_test.cpu())):
        if way == "hfproj, CPU" and not GPU:
            continue
        probe = hfproj.KNNProbe(k=k).fit(part, y)
        found = measured(lambda probe=probe, query=query: probe.predict(query), 3 if part.is_cuda else 1)
        labels[way] = probe.predict(query)
        rows.append({"part": "knn", "what": f"{bank} rows, {queries} queries, dim {dim}, k={k}", "way": way, **found})

    def plain() -> Tensor:
        u, v = (F.normalize(x.double(), dim=1) for x in (f, f_test))
        found = []
        for block in v.split(1000):
            cosine, index = (block @ u.T).topk(k, dim=1)
            votes = torch.zeros(len(block), classes, dtype=torch.float64, device=DEVICE)
            votes.scatter_add_(1, y.to(DEVICE)[index], (cosine / 0.07).exp())
            found.append(votes.argmax(1))
        return torch.cat(found).cpu()

    rows.append({**rows[0], "way": "plain, float64", **measured(plain, 3)})
    expected = plain()
    for row in rows:
        if row["way"] in labels:
            row["other_labels"] = int((labels[row["way"]] != expected).sum())
    for way, part in (("hfproj", f), ("hfproj, CPU", f.cpu())):
        if way == "hfproj, CPU" and not GPU:
            continue
        begin = time.perf_counter()
        probe = hfproj.LinearProbe(l2=1e-4).fit(part, y)
        ms = 1e3 * (time.perf_counter() - begin)
        row = {"part": "linear probe", "what": f"{bank} × {dim}, l2=1e-4", "way": way, "ms": ms, "mb": None}
        rows.append({**row, "value": probe.score(f_test.to(part.device), y_test)})
    return rows


def augmentation(sizes: dict) -> list[dict]:
    """SimCLR's views of images in memory; on the device where `Augmentation` takes images there."""
    count, pixels = sizes["images"]
    rows = []
    for size in pixels:
        images = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(count)]
        for place in dict.fromkeys((DEVICE, torch.device("cpu"))):
            moved = [image.to(place) for image in images]

            def views(moved: list[Tensor] = moved, size: int = size) -> None:
                Augmentation()(moved, size=size, index=range(count))

            row = {"part": "augmentation", "what": f"{count} images of {size} px", "way": place.type}
            try:
                found = measured(views, 3)
            except RuntimeError as error:
                rows.append({**row, "note": str(error).splitlines()[0]})
                continue
            rows.append({**row, **found, "value": 1e3 * count / found["ms"], "unit": "images/s"})
    return rows


def training_step(sizes: dict) -> list[dict]:
    """A step of a ViT with random weights, all of it trained in bfloat16; and head with loss alone."""
    import timm

    name, size, batch = sizes["vit"]
    backbone = timm.create_model(name, num_classes=0, img_size=size)
    head = {"head": "mlp", "head_options": {"hidden_dim": 2048}, "out_dim": 128}
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(**head, trainable="full")).to(DEVICE).train()
    alone = hfproj.create_head("mlp", in_dim=backbone.num_features, hidden_dim=2048, out_dim=128).to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x, h = normal(2 * batch, 3, size, size), normal(2, batch, backbone.num_features).requires_grad_()
    objectives = {"nt_xent": {}, "barlow_twins": {}, "vicreg": {}}
    rows = []
    for objective in objectives:
        criterion = hfproj.create_objective(objective)

        def whole(criterion: Any = criterion) -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                z = model(x, num_views=2).projection
            criterion(z.view(2, batch, -1)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def part(criterion: Any = criterion) -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                z = alone(h)
            criterion(z).loss.backward()

        what = f"{name}, {size} px, {batch} images of two views, {objective}"
        step, own = measured(whole), measured(part)
        fraction = own["ms"] / step["ms"]
        row = {"part": "step", "what": what}
        rows.append({**row, "way": "whole step", **step})
        rows.append({**row, "way": "head and loss", **own, "value": fraction, "unit": "of the step"})
    return rows


def trainer(sizes: dict) -> list[dict]:
    """Steps of `ProjectionTrainer` on vit_nano with LoRA, the loader of the images included."""
    from transformers import TrainerCallback

    batch, steps = sizes["trainer"]
    digits = hfproj.load_image_dataset("digits", split="train")
    rows = []
    for workers in (0, 8) if GPU else (0,):
        head = {"head": "mlp", "head_options": {"hidden_dim": 512}, "out_dim": 128}
        config = hfproj.ProjectionHeadConfig(**head, backbone_adapter=LoraConfig(r=8))
        clock: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *args: object, clock: list[float] = clock, **kwargs: object) -> None:
                if GPU:
                    torch.cuda.synchronize()
                clock.append(time.perf_counter())

        hfproj.ProjectionTrainer(
            get_peft_model(hfproj.load_backbone("vit_nano"), config),
            hfproj.ProjectionTrainingArguments(
                output_dir="runs/gpu", max_steps=steps, per_device_train_batch_size=batch, bf16=GPU, use_cpu=not GPU,
                dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0, save_strategy="no",
                report_to="none", disable_tqdm=True,
            ),
            train_dataset=digits, callbacks=[Clock],
        ).train()  # fmt: skip
        lengths = [1e3 * (b - a) for a, b in itertools.pairwise(clock)]
        ms = (clock[-1] - clock[0]) * 1e3 / (len(clock) - 1)  # the mean: a loader that is slow now and then counts
        row = {"part": "trainer", "what": f"vit_nano, LoRA, {batch} images of two views, bf16={GPU}", "mb": None}
        row |= {"way": f"{workers} workers", "ms": ms, "all_ms": lengths, "value": 1e3 / ms, "unit": "steps/s"}
        rows.append(row)
    return rows


def markdown(content: dict) -> str:
    device, torch_version = content["device"], content["versions"].get("torch")
    lines = ["# On a GPU", "", "Written by `recipes/benchmarks/gpu.py`.", ""]
    lines += [
        f"{device}; torch {torch_version}. Medians of up to {ROUNDS} calls; MB beyond inputs; workers persist.",
        "",
    ]
    lines += ["| part | what | way | ms | MB | value |", "|---|---|---|---:|---:|---:|"]
    for row in content["rows"]:
        ms = f"{row['ms']:.2f}" if "ms" in row else row.get("note", "")
        memory = f"{row['mb']:.0f}" if row.get("mb") is not None else ""
        value = f"{row['value']:.4g} {row.get('unit', '')}".strip() if "value" in row else ""
        if "other_labels" in row:
            value = f"{row['other_labels']} labels other than float64's"
        lines.append(f"| {row['part']} | {row['what']} | {row['way']} | {ms} | {memory} | {value} |")
    return "\n".join(lines) + "\n"


PARTS = {
    "losses": losses, "rank": rank, "probes": probes, "step": training_step, "trainer": trainer,
    "augmentation": augmentation,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on the CPU too")
    parser.add_argument("--out", help="where to write, without suffix")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="others stay as they are there")
    options = parser.parse_args()
    if not GPU and not options.quick:
        raise SystemExit("There is no GPU with CUDA; --quick runs tiny sizes on the CPU.")
    default = "runs/gpu_quick" if options.quick else Path(__file__).resolve().parent / "results" / "gpu"
    out = Path(options.out or default)
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if options.quick else FULL
    content: dict[str, Any] = {"rounds": ROUNDS, "quick": options.quick, "versions": installed_versions()}
    content["device"] = torch.cuda.get_device_name() if GPU else "CPU"
    file = out.with_suffix(".json")
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    for name in options.only:
        begin = time.perf_counter()
        found = PARTS[name](sizes)
        order = list(dict.fromkeys(row["part"] for row in rows + found))
        rows = [row for row in rows if row["part"] not in {row["part"] for row in found}] + found
        content["rows"] = rows = sorted(rows, key=lambda row: order.index(row["part"]))
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
        write_json(out.with_suffix(".json"), content)  # after each part: a run that is cut short keeps what it has
        write_atomic(out.with_suffix(".md"), markdown(content).encode())
    print(markdown(content))


if __name__ == "__main__":
    main()
