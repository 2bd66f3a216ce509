"""What a whole checkpoint costs: seconds per checkpoint with and without its manifest, digests and fsync.

    python recipes/benchmarks/checkpoints.py [folder of the checkpoints, default: a temporary one]

A checkpoint of `ProjectionTrainer` after one step, of vit_nano with a LoRA and of a ViT-B/16 (random weights) that is
trained in full; and the seconds that resuming takes to verify it. What is left out is left out by replacing the
functions for this measurement; there is no setting for it. Medians over saves in turns.

Writes checkpoints.json below recipes/benchmarks/results.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared CPU spinning threads cost more than they save

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import hfproj
from hfproj import files
from hfproj.files import installed_versions, write_json
from hfproj.saving import folders, manifest
from hfproj.training import resuming

OUT = Path(__file__).resolve().parent / "results" / "checkpoints.json"
ROUNDS = {"vit_nano, LoRA": 20, "ViT-B/16, full": 5}


def vit_nano() -> PeftModel:
    config = hfproj.ProjectionHeadConfig(head="mlp", out_dim=128, backbone_adapter=LoraConfig(r=8))
    return get_peft_model(hfproj.load_backbone("vit_nano"), config)


def vit_base() -> PeftModel:
    import timm

    backbone: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=0)
    return get_peft_model(backbone, hfproj.ProjectionHeadConfig(head="mlp", out_dim=128, trainable="full"))


def trained(model: PeftModel, folder: Path) -> hfproj.ProjectionTrainer:
    """Return a trainer after one step, so that the optimizer has its moments."""
    arguments = hfproj.ProjectionTrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    images = hfproj.load_image_dataset("digits", split="train").select(range(2))
    trainer = hfproj.ProjectionTrainer(model, arguments, objective="nt_xent", train_dataset=images)
    trainer.train()
    return trainer


def nothing(*args: object) -> None:
    return None


LEFT_OUT = {
    "before": [(manifest, "sync"), (folders, "sync"), (files, "sync"), (os, "fsync"), (resuming, "write_manifest")],
    "with manifest and digests": [(manifest, "sync"), (folders, "sync"), (files, "sync"), (os, "fsync")],
    "with manifest and fsync": [(manifest, "digest")],
    "after": [],
}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(make: Callable[[], PeftModel], rounds: int, folder: Path) -> dict[str, object]:
    trainer = trained(make(), folder)
    times: dict[str, list[float]] = {name: [] for name in LEFT_OUT}
    for turn in range(rounds + 1):
        for name, replaced in LEFT_OUT.items():
            patches = [mock.patch.object(module, called, nothing) for module, called in replaced]
            for patch in patches:
                patch.start()
            trainer.state.global_step += 1
            taken = seconds(lambda: trainer._save_checkpoint(trainer.model, None))
            for patch in patches:
                patch.stop()
            if turn:  # the first one warms up
                times[name].append(taken)
            folders.rotate(folder, 1, set())
    checkpoint = folders.checkpoints(folder)[trainer.state.global_step]
    size = sum(p.stat().st_size for p in checkpoint.iterdir())
    verified = statistics.median(seconds(lambda: manifest.flaw(checkpoint)) for _ in range(5))
    medians = {name: round(statistics.median(values), 4) for name, values in times.items()}
    return {"bytes": size, "seconds": medians, "seconds to verify": round(verified, 4), "saves": rounds}


def main() -> None:
    found: dict[str, object] = {}
    for name, make in {"vit_nano, LoRA": vit_nano, "ViT-B/16, full": vit_base}.items():
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
            found[name] = measure(make, ROUNDS[name], Path(folder))
        print(name, found[name])
    write_json(OUT, {**found, "versions": installed_versions()})


if __name__ == "__main__":
    main()
