"""Does the collapse alarm ring where a training collapses, and only there? vit_nano on handwritten digits.

    python recipes/benchmarks/collapse.py run     # eight trainings, about fifteen minutes on 2 CPU cores
    python recipes/benchmarks/collapse.py table

Four trainings have one mistake each: BYOL with a predictor that does nothing, a learning rate a hundred times too high,
NT-Xent at a temperature of 10, SimSiam without its stop-gradient. Four have none. Each is watched by a
`CollapseCallback` with its default limits, measuring every `EVERY` steps; it only warns, so that the table can show
where the training went, too. Finished runs are kept below runs/collapse and not run again; ``table`` writes
recipes/benchmarks/results/collapse.json and .md.
"""

import argparse
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

import hfproj
from hfproj.files import installed_versions, write_atomic, write_json
from hfproj.objectives.base import ObjectiveOutput

RUNS = Path("runs/collapse")
OUT = Path(__file__).resolve().parent / "results" / "collapse"
STEPS, BATCH, EVERY, IMAGES, RATE = 100, 64, 5, 128, 1e-3
HEAD = {"head": "mlp", "head_options": {"hidden_dim": 512}, "out_dim": 128}
PREDICTOR = {"head": "mlp", "hidden_dim": 256}
IDENTITY = {"head": "identity"}


class WithoutStopGradient(torch.nn.Module):
    """SimSiam whose projections are not held still."""

    views = (2, 2)
    needs = frozenset({"prediction"})

    def forward(self, z: torch.Tensor, *, prediction: torch.Tensor, **given: object) -> ObjectiveOutput:
        """Return the negative cosine of each prediction with the other view's projection, with a gradient in both."""
        loss = -torch.nn.functional.cosine_similarity(prediction, z.flip(0), dim=-1).mean()
        return ObjectiveOutput(loss, {})


# name → objective, predictor, learning rate, the cause that the alarm should name (None: no alarm)
TRAININGS: dict[str, tuple] = {
    "BYOL without a predictor": ({"name": "byol"}, IDENTITY, RATE, "predictor"),
    "learning rate × 100": ({"name": "nt_xent", "temperature": 0.2}, None, 100 * RATE, "learning rate"),
    "temperature 10": ({"name": "nt_xent", "temperature": 10.0}, None, RATE, "temperature"),
    "SimSiam without stop-gradient": (WithoutStopGradient, PREDICTOR, RATE, "stop-gradient"),
    "NT-Xent": ({"name": "nt_xent", "temperature": 0.2}, None, RATE, None),
    "BYOL": ({"name": "byol"}, PREDICTOR, RATE, None),
    "VICReg": ({"name": "vicreg"}, None, RATE, None),
    "SupCon": ({"name": "supcon"}, None, RATE, None),
}


def train(name: str) -> dict:
    objective, predictor, rate, cause = TRAININGS[name]
    set_seed(0)
    config = hfproj.ProjectionHeadConfig(**HEAD, predictor=predictor, backbone_adapter=LoraConfig(r=8, lora_alpha=8))
    model = get_peft_model(hfproj.load_backbone("vit_nano"), config)
    alarm = hfproj.CollapseCallback()
    trainer = hfproj.ProjectionTrainer(
        model,
        hfproj.ProjectionTrainingArguments(
            output_dir=str(RUNS / "trainer"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            patch_dropout=0.5,
            ema_momentum=0.9,  # a run of few steps
            logging_steps=EVERY,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        objective=objective() if isinstance(objective, type) else objective,
        train_dataset=hfproj.load_image_dataset("digits", split="train"),
        eval_dataset=hfproj.load_image_dataset("digits", split="test"),
        data_collator=hfproj.ImageViews.for_model(model, scale=(0.4, 1.0), flip_probability=0.0),
        callbacks=[hfproj.SpectrumCallback(every=EVERY, images=IMAGES), alarm],
    )
    stopped = None
    try:
        trainer.train()
    except hfproj.NonFiniteLossError as error:
        stopped = str(error)
    return {
        "training": name,
        "expected": cause,
        "alarm": None if alarm.alarm is None else alarm.alarm.to_dict(),
        "stopped": stopped,
        "steps": trainer.state.global_step,
        "history": trainer.history,
    }


def run(names: list[str]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in names:
        file = RUNS / f"{list(TRAININGS).index(name)}.json"
        if file.is_file():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hfproj.errors.CollapseWarning)
            row = train(name)
        write_json(file, row)
        print(name, row["alarm"] and row["alarm"]["what"], flush=True)


def table() -> None:
    rows = [json.loads(file.read_text()) for file in sorted(RUNS.glob("*.json"))]
    settings = {"steps": STEPS, "batch": BATCH, "every": EVERY, "images": IMAGES, "learning_rate": RATE, "head": HEAD}
    content = {"settings": settings, "versions": installed_versions(), "runs": rows}
    lines = ["# The collapse alarm", "", "Written by `recipes/benchmarks/collapse.py table`.", ""]
    lines += [
        f"vit_nano with LoRA on digits, {STEPS} steps of {BATCH} images; {IMAGES} images measured every {EVERY} steps.",
        "",
    ]
    lines += ["| training | alarm at step | metric | named first | also named | RankMe of h, z | std of h, z |"]
    lines += ["|---|---:|---|---|---|---|---|"]
    for row in rows:
        alarm = row["alarm"]
        causes = [cause["name"] for cause in alarm["causes"]] if alarm else []
        measured = [r for r in row["history"] if r.get("rankme_z") is not None]
        first, last = measured[0], measured[-1]
        changes = [
            ", ".join(f"{first[f'{m}_{layer}']:.{d}f} → {last[f'{m}_{layer}']:.{d}f}" for layer in "hz")
            for m, d in (("rankme", 1), ("std", 3))
        ]
        cells = [row["training"], *([str(alarm["step"]), alarm["metric"]] if alarm else ["none", "–"])]
        cells += [causes[0] if causes else "–", ", ".join(causes[1:]) or "–", *changes]
        lines.append("| " + " | ".join(cells) + " |")
    write_json(OUT.with_suffix(".json"), content)
    write_atomic(OUT.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--only", nargs="*", help="Names of trainings; all by default.")
    options = parser.parse_args()
    if options.what == "run":
        run(options.only or list(TRAININGS))
    else:
        table()


if __name__ == "__main__":
    main()
