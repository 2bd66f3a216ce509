"""A projection head and a LoRA on a pretrained backbone, trained on unlabelled images, probed before and after: SimCLR,
or any other objective.

    accelerate launch recipes/simclr_vit.py                        # vit_nano on handwritten digits: no network needed
    accelerate launch recipes/simclr_vit.py --backbone facebook/dinov2-small --dataset uoft-cs/cifar10
    accelerate launch recipes/simclr_vit.py --objective vicreg --regularizers werank=0.01
    accelerate launch recipes/simclr_vit.py --watch_metrics rankme,std,uniformity --curvature true --on_collapse stop
    accelerate launch recipes/simclr_vit.py --preset byol_cifar --lars false --learning_rate 1e-3 --num_train_epochs 12
    accelerate launch recipes/simclr_vit.py --preset simclr_cifar --backbone preset --dataset uoft-cs/cifar10
    accelerate launch recipes/simclr_vit.py --push_to_hub me/digits-simclr --hub_private_repo true
    accelerate launch recipes/simclr_vit.py --continue_from me/digits-simclr --output_dir out/longer
    accelerate launch recipes/simclr_vit.py --save_strategy epoch --resume_from_checkpoint auto    # docs/checkpoints.md
    accelerate launch recipes/simclr_vit.py out/simclr_vit/arguments.yaml --seed 1 --output_dir out/seed_1
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 recipes/simclr_vit.py    # 2 CPU processes

Labels are only used to score, by weighted k-NN and a linear probe of representation h and projection z, and to mark
neighbours in the page's pictures of your images, which are not pushed. The output folder holds
the adapter, results.json (every number with its protocol), history.parquet (what was watched while it trained),
report.html, pictures, a card, and arguments.yaml, which takes the place of all flags. All options of `transformers`'
TrainingArguments are flags too (--weight_decay, --warmup_steps, --report_to, --hub_private_repo …).
"""

from hfproj import cli

cli.start(__file__)  # answers --help before anything large is imported

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import TrainerCallback, set_seed

import hfproj
from hfproj.data import split_off, without_bad_images
from hfproj.files import command_line
from hfproj.reporting import write_card, write_image_pictures

# What --help shows; --help-all shows the others, too.
SHOWN = (
    "backbone dataset head hidden_dim out_dim lora_r trainable objective temperature regularizers preset views "
    "crop_scale color_jitter train_limit test_limit num_train_epochs max_steps per_device_train_batch_size "
    "learning_rate patch_dropout bf16 seed watch_every on_collapse output_dir save_strategy resume_from_checkpoint "
    "continue_from push_to_hub"
)
SEEN = 1000  # test images in the gallery of neighbours and the map


@dataclass
class Recipe:
    """Flags of this recipe."""

    backbone: str = field(
        default="vit_nano", metadata={"help": "vit_nano, a Hub id, timm/…, a folder; preset: that of --preset."}
    )
    backbone_options: str | None = field(
        default=None, metadata={"help": "pretrained=false,stem=cifar,width=0.25 … of hfproj.load_backbone."}
    )
    dataset: str = field(
        default="digits", metadata={"help": "digits, a Hub id, parquet file(s), an image or IDX folder."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, for scoring only."})
    train_limit: int | None = field(default=None, metadata={"help": "Take this many random training images."})
    test_limit: int | None = field(default=None, metadata={"help": "Take this many random test images."})
    holdout: int = field(default=0, metadata={"help": "Score on this many images held out of train, not on test."})
    preset: str | None = field(default=None, metadata={"help": "Settings of a paper, see hfproj.list_presets()."})
    head: str = field(default="mlp", metadata={"help": "Name of the head, see hfproj.list_heads()."})
    head_options: str | None = field(default=None, metadata={"help": "depth=3,norm=null … or JSON."})
    head_depth: int = field(default=2, metadata={"help": "Linear layers of an mlp head."})
    hidden_dim: int = field(default=512, metadata={"help": "Hidden width of an mlp head."})
    out_dim: int | None = field(default=128, metadata={"help": "Width of the projection."})
    predictor: str | None = field(default=None, metadata={"help": "head=mlp,hidden_dim=256 …, for BYOL and others."})
    prototypes: str | None = field(default=None, metadata={"help": "Number, or count=300,learn_norm=true, for DINO …"})
    pooling: str | None = field(default=None, metadata={"help": "cls, mean, cls_mean, max, pooler."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA on the backbone; 0 for none."})
    trainable: str = field(default="adapter", metadata={"help": "head, adapter, full, or a number of blocks."})
    objective: str = field(default="nt_xent", metadata={"help": "Name of it, see hfproj.list_objectives()."})
    objective_options: str | None = field(default=None, metadata={"help": "gather=false … or JSON."})
    temperature: float = field(default=0.2, metadata={"help": "Temperature of NT-Xent."})
    regularizers: str | None = field(
        default=None, metadata={"help": "werank=0.1,koleo.weight=0.1,koleo.on=z …, see hfproj.list_regularizers()."}
    )
    views: str | None = field(default=None, metadata={"help": "Further options of hfproj.ImageViews: num_views=4 …"})
    crop_scale: float = field(
        default=0.4, metadata={"help": "Smallest fraction of the image that a view shows; 1 for all."}
    )
    flip: bool | None = field(default=None, metadata={"help": "Mirror views; by default not for digits."})
    color_jitter: float = field(default=0.5, metadata={"help": "Strength of the colour jitter; 0 for none."})
    grayscale: float = field(default=0.2, metadata={"help": "Probability of a grey view."})
    rotation: float = field(default=0.0, metadata={"help": "Views are turned by up to this many degrees."})
    bank_limit: int | None = field(default=None, metadata={"help": "Search this many random training images by k-NN."})
    knn_k: int = field(default=20, metadata={"help": "Neighbours of the k-NN probe."})
    watch_every: int = field(default=5, metadata={"help": "Steps between measurements while it trains; 0: none."})
    watch_metrics: str = field(default="rankme,std,positive_cosine", metadata={"help": "Of hfproj.SpectrumCallback."})
    curvature: bool = field(default=False, metadata={"help": "Watch extreme eigenvalues of the head's Hessian, too."})
    on_collapse: str = field(default="warn", metadata={"help": "warn, stop, or restore a checkpoint."})
    continue_from: str | None = field(
        default=None, metadata={"help": "An adapter to go on from: a folder, a Hub id, or repo=me/x,revision=dev …"}
    )
    push_to_hub: str | None = field(
        default=None,
        metadata={"help": "Hub id to push to; without a value that of the output folder.", "nargs": "?", "const": ""},
    )


@dataclass
class Training(hfproj.ProjectionTrainingArguments):
    """The trainer's flags, with this recipe's defaults."""

    output_dir: str = field(default="out/simclr_vit", metadata={"help": "Folder for the adapter and the results."})
    num_train_epochs: float = field(default=12, metadata={"help": "Epochs."})
    max_steps: int = field(default=-1, metadata={"help": "Train for this many steps instead; -1: as many as epochs."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Images per process and step."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images per process in evaluation."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW."})
    patch_dropout: float = field(default=0.5, metadata={"help": "Fraction of patches hidden from a ViT in training."})
    logging_steps: float = field(default=5, metadata={"help": "Steps between log lines."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints: no, steps, epoch, best."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "auto: from the newest whole checkpoint, if there is one; or its path."}
    )
    report_to: str = field(default="none", metadata={"help": "Trackers."})
    push_to_hub: bool = field(default=False, init=False)


def load_images(recipe: Recipe) -> tuple[Dataset, Dataset, str]:
    """Return the training and the test images, and what the test images are called."""
    columns = {"image_column": recipe.image_column, "label_column": recipe.label_column}
    train = hfproj.load_image_dataset(recipe.dataset, split="train", **columns)
    if recipe.holdout:
        train, test = split_off(train, recipe.holdout, seed=0)
        name = f"{recipe.dataset}, {recipe.holdout} held out of train"
    else:
        test = hfproj.load_image_dataset(recipe.dataset, split="test", **columns, limit=recipe.test_limit)
        name = recipe.dataset
    if recipe.train_limit and recipe.train_limit < len(train):
        _, train = split_off(train, recipe.train_limit, seed=0)
    return train, test, name


def attach_head(recipe: Recipe, objective: dict) -> PeftModel:
    """Return the backbone with its head, and a LoRA if asked for."""
    head_options, prototypes = cli.options(recipe.head_options), recipe.prototypes or ""
    if recipe.head == "mlp":
        head_options = {"hidden_dim": recipe.hidden_dim, "depth": recipe.head_depth, **head_options}
    config = hfproj.ProjectionHeadConfig.for_objective(
        objective,
        head=recipe.head,
        out_dim=None if recipe.head == "identity" else recipe.out_dim,
        head_options=head_options,
        predictor=cli.options(recipe.predictor) or None,
        prototypes=int(prototypes) if prototypes.isdigit() else cli.options(prototypes) or None,
        backbone_adapter=LoraConfig(r=recipe.lora_r, lora_alpha=recipe.lora_r) if recipe.lora_r else None,
        trainable=int(recipe.trainable) if recipe.trainable.isdigit() else recipe.trainable,
        pooling=recipe.pooling,
    )
    options = cli.options(recipe.backbone_options)
    if recipe.backbone == "preset":
        return get_peft_model(hfproj.get_preset(recipe.preset or "").load_backbone(**options), config)
    return get_peft_model(hfproj.load_backbone(recipe.backbone, **options), config)


def make_views(recipe: Recipe, model: PeftModel, seed: int) -> hfproj.ImageViews:
    """Return the collator that augments the images."""
    flip = recipe.flip if recipe.flip is not None else recipe.dataset != "digits"  # a mirrored digit is no digit
    augmentation = {
        "scale": (recipe.crop_scale, 1.0) if recipe.crop_scale < 1 else None,
        "flip_probability": 0.5 if flip else 0.0,
        "color_jitter_strength": recipe.color_jitter,
        "grayscale_probability": recipe.grayscale,
        "rotation_degrees": recipe.rotation,
    }
    return hfproj.ImageViews.for_model(model, seed=seed, **{**augmentation, **cli.options(recipe.views)})


def watchers(recipe: Recipe, alarm: hfproj.CollapseCallback) -> list[TrainerCallback]:
    """Return what is measured while the head trains."""
    if not recipe.watch_every:
        return []
    metrics = recipe.watch_metrics.split(",")
    watches = [hfproj.SpectrumCallback(metrics=metrics, every=recipe.watch_every), alarm]
    return [*watches, hfproj.CurvatureCallback(every=recipe.watch_every)] if recipe.curvature else watches


def write(trainer: hfproj.ProjectionTrainer, results: hfproj.Results, shown: Dataset, h: list[Tensor]) -> None:
    """Write results, pictures, card and page beside the adapter; push them, but for pictures of images, if asked for.

    `h` are those of the images `shown`, before and after training.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        print("Drawing pictures, card and report …", flush=True)
        write_card(results, folder)
        write_image_pictures(folder, trainer.bare_model(), shown, *h, views=trainer.data_collator)
        hfproj.report(folder)
        print(results.table())
    if args.push_to_hub:  # on all processes; it saves, too
        commit = trainer.push_to_hub(results=results)
        if commit is not None:
            print(f"\nPushed to {commit.repo_url.url}")
    if trainer.is_world_process_zero():
        print(f"\nSaved to {folder}: the adapter, results.json, report.html, pictures and a card (README.md).")


def main() -> None:
    recipe, args = cli.parse(Recipe, Training, defaults=cli.preset_flags, shown=SHOWN)
    if recipe.push_to_hub is not None:
        args.push_to_hub, args.hub_model_id = True, recipe.push_to_hub or args.hub_model_id
    train, test, test_name = load_images(recipe)
    bank, left_out = split_off(train, recipe.bank_limit, seed=0)[1] if recipe.bank_limit else train, 0
    if args.on_bad_image == "skip":  # the trainer does it in training; evaluation goes without these images
        (bank, no_bank), (test, no_test) = without_bad_images(bank), without_bad_images(test)
        left_out = len(no_bank) + len(no_test)

    objective = {"name": recipe.objective, **cli.options(recipe.objective_options)}
    if recipe.objective == "nt_xent":
        objective = {"temperature": recipe.temperature, **objective}
    set_seed(args.seed)  # the adapter's first values: the same in each run and on each process
    model = attach_head(recipe, objective)
    views, alarm = make_views(recipe, model, args.seed), hfproj.CollapseCallback(action=recipe.on_collapse)
    go_on = recipe.continue_from
    trainer = hfproj.ProjectionTrainer(
        model,
        args,
        objective=objective,
        regularizers=cli.options(recipe.regularizers),
        train_dataset=train,
        eval_dataset=test if args.eval_strategy != "no" else None,
        data_collator=views,
        callbacks=[*watchers(recipe, alarm), cli.leave_arguments()],
        continue_from=cli.options(go_on) if go_on and "=" in go_on else go_on,
    )
    if trainer.is_world_process_zero():
        model.print_trainable_parameters()

    shown = split_off(test, SEEN, seed=0)[1] if len(test) > SEEN else test
    h = []

    def measure(when: str) -> hfproj.Results:
        probes = [hfproj.KNNProbe(k=recipe.knn_k), "linear"] if "label" in train.column_names else []
        options = {"when": when, "dataset": test_name, "seed": args.seed, "progress": not args.disable_tqdm}
        h.append(hfproj.extract_features(model, shown, progress=options["progress"]).h)
        return hfproj.evaluate(model, probes=probes, train=bank, test=test, views=views, **options)

    before = measure("before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint in ("True", "true") or args.resume_from_checkpoint)
    trainer.save_model(_internal_call=True)  # before what may fail; the push comes at the end
    results = before.merge(measure("after"))
    results.command = command_line()
    results.config["recipe"] = vars(recipe)
    results.config["training"] = args.chosen()
    results.log, results.history = trainer.state.log_history, trainer.history
    if recipe.curvature:
        results.config["curvature_of"] = "head"
    if alarm.alarm is not None:
        results.geometry["collapse"] = alarm.alarm.to_dict()
    trainer.note_skipped(results)
    if left_out:
        results.notes.append(f"{left_out} images of bank and test set could not be read and are left out.")
    if go_on:
        results.notes.append(f"Training went on from {go_on}: what is said of before it is of that adapter.")
    write(trainer, results, shown, h)


if __name__ == "__main__":
    cli.run(main)
