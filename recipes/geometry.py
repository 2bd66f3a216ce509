"""What a head does to the geometry of representations: the experiments of "The Geometry of Projection Heads"
(arXiv 2605.17180) on trained adapters, at the size of two CPU cores, and the analysis of any saved adapter.

    python recipes/geometry.py train          # 27 adapters, with a LoRA on vit_nano or the head alone; 15 minutes
    python recipes/geometry.py guillotine     # what probes read from h and from z; 5 minutes
    python recipes/geometry.py curvature      # of a rotation sweep
    python recipes/geometry.py orbits         # how far h and z move while an image turns
    python recipes/geometry.py depth          # heads of one to three layers
    python recipes/geometry.py adapter --adapter out/simclr_vit      # a folder or a Hub id
    python recipes/geometry.py head --adapter out/dino_vit_s16       # the head alone: J's spectrum, its curvature

Images are scikit-learn's handwritten digits, which have an upright position, so that rotation is a nuisance with a
meaning; ``--dataset`` takes any other. Adapters and finished measurements are kept below runs/geometry and not made
again. Results go to recipes/results/geometry/results.json and into figures beside it (``recipes/geometry_table.py``
makes the text). ``adapter`` and ``head`` write the geometry into the results.json of an adapter, a converted one
(recipes/convert.py) as well, and render its report.html. ``head`` asks of the images nothing but their h, so that it is
the cheaper one for large backbones.
"""

import argparse
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared CPU spinning threads cost more than they save

import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import set_seed

import hfproj
from hfproj import cli, geometry, plots
from hfproj.backbones import image_preprocessing
from hfproj.data import image_ops as ops
from hfproj.files import command_line, installed_versions, measured_once, rounded, write_json
from hfproj.functional.rows import unit_rows

RUNS = Path("runs/geometry")
OUT = Path(__file__).resolve().parent / "results" / "geometry"
SEEDS = (0, 1, 2)
HEAD = {"hidden_dim": 512, "activation": "silu"}  # the paper's at a quarter of its width; BatchNorm in all layers
OUT_DIM = 512
TEMPERATURE, LORA_R = 0.1, 8
VIEWS = {"scale": (0.4, 1.0), "color_jitter_strength": 0.5, "grayscale_probability": 0.2}
# "lora": backbone and head for some steps on images; "head": the head for long, on cached views of a frozen backbone
TRAINING = {
    "lora": {"steps": 80, "batch": 64, "learning_rate": 1e-3, "patch_dropout": 0.5},
    "head": {"steps": 1000, "batch": 256, "learning_rate": 1e-3, "passes": 4},
}


class Model(NamedTuple):
    """Depth of the head, degrees by which views are turned at most (45 in the paper's code), and what is trained."""

    depth: int
    degrees: float
    trained: str | None


MODELS = {
    "rotated views": Model(2, 45.0, "lora"),
    "upright views": Model(2, 0.0, "lora"),
    "rotated views, head only": Model(2, 45.0, "head"),
    "upright views, head only": Model(2, 0.0, "head"),
    "all rotations, head only": Model(2, 180.0, "head"),
    "untrained": Model(2, 0.0, None),
    "depth 1": Model(1, 45.0, "lora"),
    "depth 3": Model(3, 45.0, "lora"),
    "depth 1, head only": Model(1, 45.0, "head"),
    "depth 3, head only": Model(3, 45.0, "head"),
}
COMPARED = tuple(name for name, of in MODELS.items() if of.depth == 2)
DEPTHS = tuple(name for name, of in MODELS.items() if of.degrees == 45.0)
PROBES = {"train": 500, "test": 300, "C": 0.1, "mlp_width": 256, "mlp_epochs": 30}
SWEEP = {"images": 100, "degrees": 45.0, "points": 10}
ORBITS = {"classes": 5, "images": 3, "rotations": 12, "draws": 10}
ANALYSIS = {"images": 64, "orbits": 6, "rotations": 12, "hessian_images": 16, "covariance_dims": 64,
            "head_images": 16}  # fmt: skip
# what an image is changed by → its strength ε, small, in degrees, pixels or shares
TANGENTS: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {
    "rotation": (2.0, lambda x, eps: ops.rotate_translate(x, eps, 0 * eps, 0 * eps)),
    "shift": (0.5, lambda x, eps: ops.rotate_translate(x, 0 * eps, eps, 0 * eps)),
    "brightness": (0.05, lambda x, eps: ops.adjust_brightness(x, 1 - eps)),
    "contrast": (0.05, lambda x, eps: ops.adjust_contrast(x, 1 - eps)),
}


def train(dataset: str, seeds: list[int]) -> None:
    images = hfproj.load_image_dataset(dataset, split="train")
    for seed in seeds:
        for name, of in MODELS.items():
            folder = adapter_folder(dataset, name, seed)
            if of.trained is None or (folder / "adapter_model.safetensors").is_file():
                continue
            settings, data = TRAINING[of.trained], images
            model = attach(name, seed)
            flip = 0.0 if dataset == "digits" else 0.5  # a mirrored digit is no digit
            views = hfproj.ImageViews.for_model(
                model, seed=seed, rotation_degrees=of.degrees, flip_probability=flip, **VIEWS
            )
            if of.trained == "head":
                data = views_once(dataset, model, of.degrees, images, views)
                model, views = attach(name, seed, hfproj.FeatureBackbone.of(model)), hfproj.FeatureViews(seed=seed)
            trainer = hfproj.ProjectionTrainer(
                model,
                hfproj.ProjectionTrainingArguments(
                    output_dir=str(folder),
                    max_steps=settings["steps"],
                    per_device_train_batch_size=settings["batch"],
                    learning_rate=settings["learning_rate"],
                    patch_dropout=settings.get("patch_dropout", 0.0),
                    seed=seed,
                    logging_strategy="no",
                    log_representation=False,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                ),
                objective={"name": "nt_xent", "temperature": TEMPERATURE},
                train_dataset=data,
                data_collator=views,
            )
            trainer.train()
            trainer.save_model(str(folder))
            print("trained", name, seed, flush=True)


def views_once(dataset: str, model: nn.Module, degrees: float, images: Any, views: Any) -> hfproj.CachedFeatures:
    """Return the representations of augmented views, the same for all seeds."""
    file = RUNS / Path(dataset).name / "h" / f"views-{degrees:g}.pt"
    if not file.is_file():
        found = hfproj.cache_features(model, images, views, passes=TRAINING["head"]["passes"])
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found.features, file)
    return hfproj.CachedFeatures(torch.load(file))


def guillotine(dataset: str, seeds: list[int]) -> dict:
    rows = [kept(dataset, "guillotine", probed, name, seed) for seed in seeds for name in MODELS]
    for probe in ("linear", "mlp"):
        groups = {name: pair(rows, name, f"rotation_{probe}") for name in COMPARED}
        plots.plot_groups(groups, f"accuracy on four rotations, {probe} probe", OUT / f"guillotine_{probe}.png")
    return {"settings": PROBES, "rows": rows}


def probed(dataset: str, name: str, seed: int) -> dict[str, float]:
    """Return how well probes tell four rotations, and the class of upright images, from h and from z."""
    model, head = load(dataset, name, seed)
    parts = {}
    for split in ("train", "test"):
        x, labels = pixels(model, hfproj.load_image_dataset(dataset, split=split, limit=PROBES[split]))
        h = features(model, turned(x, (0, 90, 180, 270)), keep=(dataset, name, seed, f"quarters-{split}"))
        parts[split] = {"h": h.double(), "z": geometry.head_orbits(head, h), "labels": labels}
    found = {}
    for layer in ("h", "z"):
        quarters, upright = [], []
        for part in parts.values():
            f = part[layer]
            quarters += [f.flatten(0, 1), torch.arange(4).repeat(len(f))]
            upright += [f[:, 0], part["labels"]]
        linear = LogisticRegression(C=PROBES["C"], max_iter=1000)
        mlp = MLPClassifier((PROBES["mlp_width"],), max_iter=PROBES["mlp_epochs"], random_state=seed)
        found[f"rotation_linear_{layer}"] = accuracy(linear, *quarters)
        found[f"rotation_mlp_{layer}"] = accuracy(mlp, *quarters)
        found[f"label_linear_{layer}"] = accuracy(linear, *upright)
    return found


def accuracy(probe: object, f: Tensor, y: Tensor, f_test: Tensor, y_test: Tensor) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the MLP trains for a set number of epochs
        return make_pipeline(StandardScaler(), probe).fit(f.numpy(), y.numpy()).score(f_test.numpy(), y_test.numpy())


def curvature(dataset: str, seeds: list[int]) -> dict:
    rows = [kept(dataset, "curvature", bent, name, seed) for seed in seeds for name in COMPARED]
    groups = {name: pair(rows, name, "curvature") for name in COMPARED}
    plots.plot_groups(groups, "local curvature of a rotation sweep", OUT / "curvature.png")
    return {"settings": SWEEP, "rows": rows}


def bent(dataset: str, name: str, seed: int) -> dict[str, float]:
    """Return the local curvature of a sweep of rotations in h and in z."""
    model, head = load(dataset, name, seed)
    x, _ = pixels(model, hfproj.load_image_dataset(dataset, split="test", limit=SWEEP["images"]))
    degrees = torch.linspace(0, SWEEP["degrees"], SWEEP["points"]).tolist()
    h = features(model, turned(x, degrees), keep=(dataset, name, seed, "sweep"))
    found = {"h": geometry.local_curvature(h), "z": geometry.local_curvature(geometry.head_orbits(head, h))}
    return {**{f"curvature_{layer}": value for layer, value in found.items()}, "ratio": found["z"] / found["h"]}


def orbits(dataset: str, seeds: list[int]) -> dict:
    rows = [kept(dataset, "orbits", orbited, name, seed) for seed in seeds for name in MODELS]
    drawn = next(row for row in rows if row["model"] == "rotated views")
    names = [f"class {label}" for label in drawn["classes"][::2]]
    plots.plot_orbits(drawn["planes"], OUT / "orbits.png", names=names)
    inputs = {"h as it is": "compression", "h of unit length": "compression_unit_input"}
    groups = {
        name: {shown: mean_std([row[of] for row in rows if row["model"] == name]) for shown, of in inputs.items()}
        for name in COMPARED
    }
    plots.plot_groups(groups, "spread of h / spread of z", OUT / "compression.png", y_scale="log")
    return {"settings": ORBITS, "rows": rows}


def orbited(dataset: str, name: str, seed: int) -> dict:
    """Return the sizes of orbits of rotation in h and in z, and in z of h of unit length, as in the paper's script."""
    model, head = load(dataset, name, seed)
    test = hfproj.load_image_dataset(dataset, split="test")
    labels = torch.tensor(test["label"])
    known = labels.unique()
    classes = known[torch.linspace(0, len(known) - 1, ORBITS["classes"]).long()].tolist()
    count = ORBITS["images"] * ORBITS["draws"]
    chosen = [(labels == label).nonzero().flatten()[:count].tolist() for label in classes]
    x, _ = pixels(model, test.select([i for rows in chosen for i in rows]))
    degrees = [360 * i / ORBITS["rotations"] for i in range(ORBITS["rotations"])]
    h = features(model, turned(x, degrees), keep=(dataset, name, seed, "orbits"))
    h = h.unflatten(0, (len(classes), count)).double()
    z, z_unit = (geometry.head_orbits(head, h, normalize_input=unit) for unit in (False, True))
    found: dict = {"classes": classes}
    for layer, f in (("h", h), ("z", z), ("z_unit_input", z_unit)):
        draws = [geometry.orbit_metrics(part) for part in f.split(ORBITS["images"], dim=1)]
        for measure in draws[0]._fields:
            found[f"{measure}_{layer}"] = statistics.mean(getattr(draw, measure) for draw in draws)
    found["compression"] = geometry.compression(h, z)
    found["compression_unit_input"] = geometry.compression(h, z_unit)
    found["alignment_gain"] = geometry.alignment_gain(h, z)
    if seed == 0:  # one image of every other class, for the picture
        found["planes"] = {layer: plots.orbit_coordinates(unit_rows(f[::2, 0])) for layer, f in (("h", h), ("z", z))}
    return found


def depth(dataset: str, seeds: list[int]) -> dict:
    rows = [kept(dataset, "depth", conditioned, name, seed) for seed in seeds for name in DEPTHS]
    probes = [kept(dataset, "guillotine", probed, name, seed) for seed in seeds for name in DEPTHS]
    shown = {f"depth {MODELS[name].depth}, {MODELS[name].trained}": name for name in DEPTHS}
    groups = {key: pair(probes, shown[key], "rotation_linear") for key in sorted(shown, key=lambda key: key[::-1])}
    plots.plot_groups(groups, "accuracy on four rotations, linear probe", OUT / "depth.png")
    first = {row["model"]: row["layers"] for row in reversed(rows)}
    values = {
        f"depth {MODELS[name].depth}: {layer}": sample
        for name in sorted(DEPTHS, key=lambda name: MODELS[name].depth) if MODELS[name].trained == "lora"
        for layer, sample in first[name].items() if not layer.endswith("act")
    }  # fmt: skip
    plots.plot_metric_condition(values, OUT / "depth_condition.png")
    return {"rows": rows}


def conditioned(dataset: str, name: str, seed: int) -> dict:
    """Return the conditioning of the pullback metric after each layer of the head, at some test images."""
    model, head = load(dataset, name, seed)
    x, _ = pixels(model, hfproj.load_image_dataset(dataset, split="test", limit=ANALYSIS["images"]))
    h = features(model, x, keep=(dataset, name, seed, "upright"))
    layers = geometry.layerwise_condition_number(head, h)
    last = list(layers.values())[-1]
    return {
        "condition_number": float(last.condition_number.median()),
        "nullity": int(last.nullity.max()),
        "variation": geometry.metric_variation(head, h),
        "layers": {layer: found.condition_number.tolist() for layer, found in layers.items()},
    }


def adapter(path: str, dataset: str, output_dir: str | None, *, head_only: bool = False) -> None:
    """Write the geometry of a saved adapter into its results.json, or a new one, and render the report."""
    folder = Path(output_dir or (path if Path(path).is_dir() else "out/geometry"))
    model = hfproj.from_pretrained(path)
    images = hfproj.load_image_dataset(dataset, split="test", limit=ANALYSIS["images"])
    there = [place for place in (folder, Path(path)) if (place / "results.json").is_file()]
    if there:
        results = hfproj.Results.load(there[0])
    else:
        results = hfproj.evaluate(model, probes=[], train=images, test=images, dataset=dataset)
        results.command = command_line()
    measure = of_the_head if head_only else analysed
    results.geometry.update(rounded(measure(model, hfproj.detach(model).eval(), images)))
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder)
    print("\n".join(f"{name}: {value:.4g}" for name, value in results.geometry["scalars"].items()))
    print(f"Saved to {hfproj.report(folder)}, and into results.json beside it.")


def analysed(model: nn.Module, head: nn.Module, images: Sequence[dict]) -> dict:
    """Return the geometry of a head on some images, under the names of `hfproj.Results.geometry`."""
    x, _ = pixels(model, images)
    h = features(model, x)
    z = geometry.head_orbits(head, h)
    conditions, scalars = conditioning(head, h)
    moved = [
        geometry.augmentation_tangents(h, features(model, change(x, torch.full((len(x),), eps))), eps)
        for eps, change in TANGENTS.values()
    ]
    v = torch.stack(moved, 1)
    for name, ratios in zip(TANGENTS, geometry.metric_degeneracy(head, h, v).unbind(1)):
        scalars[f"degeneracy along {name} (0: forgotten, 1: average)"] = float(ratios.nanmedian())
    overlap = geometry.bottom_overlap(head, h, v)
    scalars["tangents in the bottom eigenspace, share"] = float(overlap.overlap.nanmedian())
    scalars["the same of random directions"] = float(overlap.chance.median())

    degrees = [360 * i / ANALYSIS["rotations"] for i in range(ANALYSIS["rotations"])]
    turning = features(model, turned(x[: ANALYSIS["orbits"]], degrees))
    both = {"h": turning.double(), "z": geometry.head_orbits(head, turning)}
    scalars["compression of rotation orbits"] = geometry.compression(both["h"], both["z"])
    scalars |= hessian_ends(head, h, features(model, turned(x, [15.0])).squeeze(1))
    covariances = {layer: torch.cov(f[:, : ANALYSIS["covariance_dims"]].T) for layer, f in (("h", h), ("z", z))}
    return {
        "metric_condition_number": conditions,
        "orbits": {layer: plots.orbit_coordinates(unit_rows(f)) for layer, f in both.items()},
        "covariance": {layer: covariance.tolist() for layer, covariance in covariances.items()},
        "scalars": scalars,
    }


def conditioning(head: nn.Module, h: Tensor) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return condition numbers of the metric after each layer, and scalars of the metric."""
    try:
        conditions = geometry.layerwise_condition_number(head, h)
    except hfproj.UsageError:  # no chain of layers
        conditions = {"z": geometry.metric_condition_number(head, h)}
    last = list(conditions.values())[-1]
    return {name: found.condition_number.tolist() for name, found in conditions.items()}, {
        "rank of the metric (median)": float(last.rank.double().median()),
        "nullity of the metric (median)": float(last.nullity.double().median()),
        "condition number of the metric (median)": float(last.condition_number.nanmedian()),
        "variation of the metric over samples": geometry.metric_variation(head, h),
    }


def of_the_head(model: nn.Module, head: nn.Module, images: Sequence[dict]) -> dict:
    """Return the spectrum of J, the conditioning of the metric and the curvature of a head at the h of some images."""
    x, _ = pixels(model, [images[i] for i in range(min(len(images), ANALYSIS["head_images"]))])
    h = features(model, x)
    singular = geometry.metric_spectrum(head, h).sqrt()
    share = singular / singular.sum(1, keepdim=True)
    conditions, scalars = conditioning(head, h)
    return {
        "metric_condition_number": conditions,
        "jacobian": {"singular_values": singular.median(0).values.tolist()},
        "scalars": {
            "largest singular value of J (median)": float(singular[:, 0].median()),
            "effective rank of J (median)": float(torch.special.entr(share).sum(1).exp().median()),
            **scalars,
            **hessian_ends(head, h, h.roll(1, 0)),  # towards another image
        },
    }


def hessian_ends(head: nn.Module, h: Tensor, h_other: Tensor) -> dict[str, float]:
    """Return extreme eigenvalues of H_eff = G_L + M for L = ½‖z − t‖², t the projection of `h_other`.

    H_L is the identity there: what is negative comes from the head's own curvature, M.
    """
    rows = slice(0, ANALYSIS["hessian_images"])
    target = geometry.head_orbits(head, h_other[rows])
    hessian = geometry.EffectiveHessianOperator(head, lambda z: (z - target).square().sum(1) / 2, h[rows])
    found = {}
    for name, matvec in (("the effective Hessian", hessian.matvec), ("its part M", hessian.M)):
        ends = geometry.extreme_eigenvalues(matvec, hessian.dim, tol=1e-4)
        found |= {f"smallest eigenvalue of {name}": ends.min, f"largest eigenvalue of {name}": ends.max}
    return found


def attach(name: str, seed: int, backbone: nn.Module | None = None) -> nn.Module:
    """Return vit_nano with the head of a model, before training."""
    set_seed(seed)
    of = MODELS[name]
    return get_peft_model(
        hfproj.load_backbone("vit_nano") if backbone is None else backbone,
        hfproj.ProjectionHeadConfig(
            head="geometry_mlp",
            head_options={**HEAD, "depth": of.depth},
            out_dim=OUT_DIM,
            trainable="head" if of.trained == "head" else "adapter",
            backbone_adapter=LoraConfig(r=LORA_R, lora_alpha=LORA_R) if of.trained == "lora" else None,
        ),
    )


def load(dataset: str, name: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """Return a model and its head; an untrained head's BatchNorm has seen the raw h of training images."""
    if MODELS[name].trained:
        folder = adapter_folder(dataset, name, seed)
        if not folder.is_dir():
            raise hfproj.UsageError(f"There is no adapter {str(folder)!r}: run `recipes/geometry.py train` first.")
        model = hfproj.from_pretrained(folder)
        return model, hfproj.detach(model).eval()
    model = attach(name, seed).eval()
    head = hfproj.detach(model).train()
    x, _ = pixels(model, hfproj.load_image_dataset(dataset, split="train", limit=PROBES["train"]))
    h = features(model, x, keep=(dataset, name, seed, "calibration"))
    with torch.no_grad():
        for _ in range(50):  # running statistics move by a tenth of the way each time
            head(h)
    return model, head.eval()


def adapter_folder(dataset: str, name: str, seed: int) -> Path:
    return RUNS / Path(dataset).name / "adapters" / f"{name.replace(' ', '_')}-{seed}"


def pixels(model: nn.Module, images: Sequence[dict]) -> tuple[Tensor, Tensor | None]:
    """Return images at the size of the backbone, in [0, 1], and their labels if they have any."""
    batch = hfproj.EvalImages.for_model(model, mean=(0.0,) * 3, std=(1.0,) * 3)([images[i] for i in range(len(images))])
    return batch["pixel_values"], batch.get("labels")


def turned(x: Tensor, degrees: Sequence[float]) -> Tensor:
    """Return each image under each rotation, ``[images, rotations, 3, size, size]``; corners are black."""
    zero = torch.zeros(len(x))
    return torch.stack([ops.rotate_translate(x, zero + angle, zero, zero) for angle in degrees], 1)


def features(model: nn.Module, x: Tensor, keep: tuple[str, str, int, str] | None = None) -> Tensor:
    """Return h of images in [0, 1], ``[…, 3, size, size]`` → ``[…, dim]``.

    With `keep`, (data set, model, seed, what the images are), it is kept: models with a frozen backbone share it.
    """
    if keep is not None:
        dataset, name, seed, what = keep
        whose = f"{name.replace(' ', '_')}-{seed}" if MODELS[name].trained == "lora" else "frozen"
        file = RUNS / Path(dataset).name / "h" / f"{whose}-{what}.pt"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(features(model, x), file)
        return torch.load(file)
    own = image_preprocessing(model)
    mean, std = (torch.tensor(values)[:, None, None] for values in (own.mean, own.std))
    found = hfproj.extract_features(
        model, x.flatten(0, -4), collator=lambda rows: {"pixel_values": (torch.stack(rows) - mean) / std}
    )
    return found.h.unflatten(0, x.shape[:-3])


def kept(dataset: str, what: str, measure: Callable[[str, str, int], dict], name: str, seed: int) -> dict:
    """Return what was measured of a model, now or in an earlier run."""
    file = RUNS / Path(dataset).name / what / f"{name.replace(' ', '_')}-{seed}.json"
    if not file.is_file():
        print(what, name, seed, flush=True)
    return measured_once(file, lambda: {"model": name, "seed": seed, **measure(dataset, name, seed)})


def pair(rows: list[dict], name: str, measure: str) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation over seeds of a measure of h and of z."""
    found = [row for row in rows if row["model"] == name]
    return {layer: mean_std([row[f"{measure}_{layer}"] for row in found]) for layer in ("h", "z")}


def mean_std(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def save(dataset: str, what: str, content: dict) -> None:
    """Put what was measured into results.json, beside what is there."""
    file = OUT / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    results.setdefault(Path(dataset).name, {})[what] = {**content, "versions": installed_versions()}
    write_json(file, results)


def main() -> None:
    measures = {"guillotine": guillotine, "curvature": curvature, "orbits": orbits, "depth": depth}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", *measures, "adapter", "head"))
    parser.add_argument("--dataset", default="digits", help="What hfproj.load_image_dataset takes.")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--adapter", help="Of adapter and head: a folder that holds one, or a Hub id.")
    parser.add_argument("--output_dir", help="Of adapter and head: where to write, if not into its folder.")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*|.*lr_scheduler.step.*|keep_original=False.*")
    if options.what == "train":
        train(options.dataset, options.seeds)
    elif options.what in measures:
        save(options.dataset, options.what, measures[options.what](options.dataset, options.seeds))
    elif options.adapter is None:
        parser.error(f"{options.what} needs --adapter")
    else:
        adapter(options.adapter, options.dataset, options.output_dir, head_only=options.what == "head")


if __name__ == "__main__":
    cli.run(main)
