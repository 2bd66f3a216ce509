"""Adapt a backbone to your own images, which need no labels, and be told whether it helped.

    accelerate launch recipes/adapt.py                                      # vit_nano on digits: no network needed
    accelerate launch recipes/adapt.py --dataset my/images --backbone facebook/dinov2-small
    accelerate launch recipes/adapt.py --dataset my/images --labelled my/sorted    # a few with labels, to judge by
    accelerate launch recipes/adapt.py --dataset my/images --holdout 500 --color_jitter 0 --flip false
    accelerate launch recipes/adapt.py --resume_from_checkpoint auto        # goes on where it was interrupted
    accelerate launch recipes/adapt.py --push_to_hub me/my-adapter --hub_private_repo true

Measures held-out images with the backbone as it is; trains the head alone for the first tenth of the steps, then head
and LoRA together; watches rank and spread of h, and how many of each image's neighbours are still those of the backbone
as it was, on held-out images and without labels, and ends at the last checkpoint before one of these left its limit;
measures again, and says better, worse or cannot tell, with intervals: by k-NN and a linear probe where there are
labels, else by three measures without, with how far these were found to be right. The output folder holds the adapter,
results.json, report.html with pictures of your images (these are not pushed), a card, and arguments.yaml, which takes
the place of all flags.
"""

from hfproj import cli

cli.start(__file__)  # answers --help before anything large is imported

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import set_seed

import hfproj
from hfproj.data import split_off, without_bad_images
from hfproj.features import FixedViews
from hfproj.files import command_line
from hfproj.probes import RANKS, unlabelled_changes
from hfproj.reporting import write_card, write_image_pictures
from hfproj.results import recorded, unlabelled_sense, verdicts

# What --help shows; --help-all shows the others, too.
SHOWN = (
    "backbone dataset labelled image_column label_column holdout train_limit bank_limit objective temperature lora_r "
    "crop_scale flip color_jitter grayscale guard_every least_overlap num_train_epochs max_steps "
    "head_warmup_steps per_device_train_batch_size learning_rate patch_dropout bf16 seed on_bad_image output_dir "
    "resume_from_checkpoint push_to_hub"
)
VERDICTS = {"better": "better", "worse": "worse", "unclear": "cannot tell"}


@dataclass
class Recipe:
    """Flags of this recipe."""

    backbone: str = field(default="vit_nano", metadata={"help": "vit_nano, a Hub id, timm/… or a folder."})
    dataset: str = field(
        default="digits", metadata={"help": "digits, a folder of images, parquet file(s), a Hub id, an IDX folder."}
    )
    labelled: str | None = field(
        default=None, metadata={"help": "Images with labels to judge by, if those of --dataset have none."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, for judging only."})
    use_labels: bool = field(default=True, metadata={"help": "false: as if there were no labels."})
    holdout: int | None = field(
        default=None, metadata={"help": "Images to measure on; by default the test split, else a fifth, at most 1,000."}
    )
    train_limit: int | None = field(default=None, metadata={"help": "Train on this many random images."})
    bank_limit: int = field(default=5000, metadata={"help": "Fit probes on at most so many training images."})
    objective: str = field(default="nt_xent", metadata={"help": "Name of it, see hfproj ls objectives."})
    temperature: float = field(default=0.2, metadata={"help": "Temperature of NT-Xent."})
    hidden_dim: int = field(default=512, metadata={"help": "Hidden width of the head."})
    out_dim: int = field(default=128, metadata={"help": "Width of the projection."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA on the backbone."})
    crop_scale: float = field(default=0.4, metadata={"help": "Smallest fraction of the image that a view shows."})
    flip: bool | None = field(default=None, metadata={"help": "Mirror views; by default not for digits."})
    color_jitter: float = field(default=0.5, metadata={"help": "Strength of the colour jitter; 0 for none."})
    grayscale: float = field(default=0.2, metadata={"help": "Probability of a grey view."})
    guard_every: int = field(default=10, metadata={"help": "Steps between looks at the guards."})
    least_overlap: float = field(default=0.1, metadata={"help": "Guard: fraction of an image's neighbours that stay."})
    knn_k: int = field(default=20, metadata={"help": "Neighbours of the k-NN probe."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub id to push to.", "nargs": "?", "const": ""})


@dataclass
class Training(hfproj.ProjectionTrainingArguments):
    """The trainer's flags, with this recipe's defaults."""

    output_dir: str = field(default="out/adapt", metadata={"help": "Folder for the adapter and the results."})
    num_train_epochs: float = field(default=12, metadata={"help": "Epochs."})
    max_steps: int = field(default=-1, metadata={"help": "Train for this many steps instead; -1: as many as epochs."})
    head_warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of the head alone; below 1, a fraction of all."}
    )
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Images per process and step."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images per process in evaluation."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW."})
    patch_dropout: float = field(default=0.5, metadata={"help": "Fraction of patches hidden from a ViT in training."})
    logging_steps: float = field(default=5, metadata={"help": "Steps between log lines."})
    save_strategy: str = field(default="steps", metadata={"help": "When to write checkpoints, for the guards."})
    save_steps: float = field(default=10, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=5, metadata={"help": "Checkpoints that are kept."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "auto: from the newest whole checkpoint, if there is one; or its path."}
    )
    report_to: str = field(default="none", metadata={"help": "Trackers."})
    push_to_hub: bool = field(default=False, init=False)


class Images(NamedTuple):
    """What is trained and measured on; `bank` and `scored` have labels, or are None."""

    train: Dataset
    held_out: Dataset
    bank: Dataset | None
    scored: Dataset | None


def load_images(recipe: Recipe, skip: bool) -> Images:
    """Return the images, those to measure on apart from those to train on; with `skip` without those not readable."""
    if not 0 <= recipe.least_overlap < 1:
        raise hfproj.UsageError(f"Expected --least_overlap as a fraction in [0, 1), got {recipe.least_overlap}.")
    if recipe.labelled and not recipe.use_labels:
        raise hfproj.UsageError(f"--labelled {recipe.labelled} has no effect with --use_labels false; leave one out.")
    columns = {"image_column": recipe.image_column, "label_column": recipe.label_column}
    train = hfproj.load_image_dataset(recipe.dataset, split="train", **columns)
    held_out = None
    if recipe.holdout is None:
        with suppress(hfproj.UsageError):
            held_out = hfproj.load_image_dataset(recipe.dataset, split="test", **columns, limit=1000)
    if held_out is None:
        count = recipe.holdout or min(1000, len(train) // 5)
        train, held_out = split_off(train, count, seed=0)
    bank, scored = limited(train, recipe.bank_limit), held_out
    if recipe.labelled:
        bank = hfproj.load_image_dataset(recipe.labelled, split="train")
        try:
            scored = hfproj.load_image_dataset(recipe.labelled, split="test")
        except hfproj.UsageError:
            bank, scored = split_off(bank, len(bank) // 2, seed=0)
    labelled = recipe.use_labels and "label" in bank.column_names
    if recipe.labelled and not (labelled and len(set(bank["label"])) > 1):
        what = f"Expected --labelled as two or more folders of images, one a class, got {recipe.labelled}"
        raise hfproj.UsageError(f"{what}, which has {'one class' if labelled else 'no labels'}.")
    measured = [held_out, *((bank, scored) if labelled else (None, None))]
    if skip:  # of those to train on it takes others in their place
        measured = [images and without_bad_images(images)[0] for images in measured]
    return Images(limited(train, recipe.train_limit), *measured)


def limited(images: Dataset, limit: int | None) -> Dataset:
    """Return at most `limit` random images."""
    return split_off(images, limit, seed=0)[1] if limit and limit < len(images) else images


def attach_head(recipe: Recipe, objective: dict) -> PeftModel:
    """Return the backbone with a head that fits the objective, and a LoRA."""
    config = hfproj.ProjectionHeadConfig.for_objective(
        objective,
        head="mlp",
        out_dim=recipe.out_dim,
        head_options={"hidden_dim": recipe.hidden_dim},
        backbone_adapter=LoraConfig(r=recipe.lora_r, lora_alpha=recipe.lora_r),
    )
    return get_peft_model(hfproj.load_backbone(recipe.backbone), config)


def make_views(recipe: Recipe, model: PeftModel, seed: int) -> hfproj.ImageViews:
    """Return the collator that augments the images."""
    return hfproj.ImageViews.for_model(
        model,
        seed=seed,
        scale=(recipe.crop_scale, 1.0) if recipe.crop_scale < 1 else None,
        flip_probability=0.5 if (recipe.dataset != "digits" if recipe.flip is None else recipe.flip) else 0.0,
        color_jitter_strength=recipe.color_jitter,
        grayscale_probability=recipe.grayscale,
    )


def guards(recipe: Recipe, held_out: Dataset) -> list:
    """Return the watch on held-out images, and the alarm that ends the training."""
    metrics = ["rankme", "std", "positive_cosine", "knn_overlap"]
    watch = hfproj.SpectrumCallback(metrics=metrics, every=recipe.guard_every, dataset=held_out)
    return [watch, hfproj.CollapseCallback(action="restore", limits={"knn_overlap_h": recipe.least_overlap})]


def fit_batch(args: Training, images: int) -> None:
    """Lower the batch to half of the images where they are fewer than one batch on all processes."""
    fits = images // (2 * args.world_size)
    if images < args.per_device_train_batch_size * args.world_size and fits >= 2:
        args.per_device_train_batch_size = fits
        if args.process_index == 0:
            print(f"{images} images are fewer than a batch: batches of {fits} on each process instead.", flush=True)


class Measured(NamedTuple):
    """Results, h of the held-out images and of their views, and h of the images to show."""

    results: hfproj.Results
    h: Tensor
    views: Tensor
    shown: Tensor


def judge(results: hfproj.Results, before: Measured, after: Measured) -> list[str]:
    """Return the verdict and what it rests on, a line each; what needs no labels goes into the results."""
    changes = unlabelled_changes(before.h, after.h, views=(before.views, after.views))
    results.geometry["unlabelled"] = recorded(changes)
    known = verdicts(results)
    senses = {verdict.sense for verdict in known} - {"unclear"}
    sense = (senses.pop() if len(senses) == 1 else "unclear") if known else unlabelled_sense(changes)
    lines = [f"Verdict: {VERDICTS[sense]}{'' if known else ', as far as can be told without labels'}."]
    lines += [f"{VERDICTS[verdict.sense].capitalize()}: {verdict.sentence}." for verdict in known]
    for change in changes:
        ranks = "ranked checkpoints as a k-NN did by {:+.2f} ({:+.2f} to {:+.2f})".format(*RANKS[change.name])
        lines.append(f"Without labels, {VERDICTS[change.sense]}: {change}; on digits it {ranks}.")
    return lines


def write_pages(
    results: hfproj.Results, images: Images, h: tuple[Tensor, Tensor], trainer: hfproj.ProjectionTrainer
) -> None:
    """Write card, pictures of the images, with labels where there are some, and report."""
    print("Drawing pictures, card and report …", flush=True)
    folder, seen = Path(trainer.args.output_dir), images.held_out if images.scored is None else images.scored
    write_card(results, folder)
    options = {"views": trainer.data_collator, "label_column": None if images.scored is None else "label"}
    write_image_pictures(folder, trainer.bare_model(), seen, *h, **options)
    hfproj.report(folder)


def main() -> None:
    recipe, args = cli.parse(Recipe, Training, shown=SHOWN)
    if recipe.push_to_hub is not None:
        args.push_to_hub, args.hub_model_id = True, recipe.push_to_hub or args.hub_model_id
    images = load_images(recipe, args.on_bad_image == "skip")
    fit_batch(args, len(images.train))
    objective = {"name": recipe.objective}
    if recipe.objective == "nt_xent":
        objective["temperature"] = recipe.temperature
    set_seed(args.seed)  # the adapter's first values: the same in each run and on each process
    model = attach_head(recipe, objective)
    views = make_views(recipe, model, args.seed)
    watch, alarm = guards(recipe, images.held_out)
    trainer = hfproj.ProjectionTrainer(
        model,
        args,
        objective=objective,
        train_dataset=images.train,
        eval_dataset=images.scored or images.held_out if args.eval_strategy != "no" else None,
        bank_dataset=images.bank if args.eval_strategy != "no" else None,
        data_collator=views,
        callbacks=[watch, alarm, cli.leave_arguments()],
    )
    if trainer.is_world_process_zero():
        print(f"{len(images.train)} images to train on, {len(images.held_out)} others to measure on.", flush=True)
    fixed = FixedViews(images.held_out, views, images=512)

    def measure(when: str) -> Measured:
        options = {"when": when, "dataset": recipe.dataset, "seed": args.seed, "progress": not args.disable_tqdm}
        results = hfproj.evaluate(model, test=images.held_out, labels=None, views=views, **options)
        if images.bank is not None:
            probes, options["dataset"] = [hfproj.KNNProbe(k=recipe.knn_k), "linear"], recipe.labelled or recipe.dataset
            results = results.merge(
                hfproj.evaluate(model, probes=probes, train=images.bank, test=images.scored, **options)
            )
        progress = options["progress"]
        h = shown = hfproj.extract_features(model, images.held_out, progress=progress).h
        if images.scored not in (None, images.held_out):
            shown = hfproj.extract_features(model, images.scored, progress=progress).h
        return Measured(results, h, fixed.features(model)[0], shown)

    before = measure("before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(_internal_call=True)  # before what may fail; the push comes at the end
    after = measure("after")
    results = before.results.merge(after.results)
    results.command, results.log, results.history = command_line(), trainer.state.log_history, trainer.history
    results.config |= {"recipe": vars(recipe), "training": args.chosen()}
    if alarm.alarm is not None:
        results.geometry["collapse"] = alarm.alarm.to_dict()
    trainer.note_skipped(results)
    lines = judge(results, before, after)
    results.notes[:0] = lines
    folder = Path(args.output_dir)
    if trainer.is_world_process_zero():
        write_pages(results, images, (before.shown, after.shown), trainer)
        print(results.table(), *lines, sep="\n")
    if args.push_to_hub:  # on all processes
        trainer.push_to_hub(results=results)
    if trainer.is_world_process_zero():
        print(f"\nSaved to {folder}: the adapter, results.json, report.html, pictures and a card (README.md).")


if __name__ == "__main__":
    cli.run(main)
