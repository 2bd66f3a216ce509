"""What somebody probably meant: the name of a list that is nearest to a wrong one, and names of other libraries."""

import difflib
import re
from collections.abc import Collection

# What other libraries and papers call it → what it is called here, where a list has that.
_ELSEWHERE: dict[str, tuple[str, ...]] = {
    # objectives and heads
    "simclr": ("nt_xent",), "infonce": ("info_nce",), "contrastive": ("nt_xent",), "siglip": ("sigmoid",),
    "dinov2": ("dino",), "barlow": ("barlow_twins",), "mocov2": ("moco",),
    "projection": ("mlp",), "fc": ("linear",),
    # probes and pooling
    "logisticregression": ("linear",), "logreg": ("linear",), "linearprobe": ("linear",), "finetune": ("fine_tune",),
    "avg": ("mean",), "average": ("mean",), "gap": ("mean",), "classtoken": ("cls",),
    # options
    "tau": ("temperature",), "temp": ("temperature",), "nneighbors": ("k",), "neighbors": ("k",), "knnk": ("k",),
    "projectiondim": ("out_dim",), "outputdim": ("out_dim",), "dim": ("in_dim", "out_dim"), "inputdim": ("in_dim",),
    "outfeatures": ("out_dim",), "infeatures": ("in_dim",), "hidden": ("hidden_dim",), "numlayers": ("depth",),
    "layers": ("depth",), "cropscale": ("scale",), "nviews": ("num_views",), "views": ("num_views",),
    "numcrops": ("num_views",), "imagesize": ("size",), "imgsize": ("size",), "maxlen": ("max_length",),
    "peftconfig": ("backbone_adapter",), "lora": ("backbone_adapter",), "loraconfig": ("backbone_adapter",),
    # training
    "lr": ("learning_rate",), "epochs": ("num_train_epochs", "epochs"), "steps": ("max_steps", "every"),
    "batchsize": ("per_device_train_batch_size", "batch_size"), "bs": ("per_device_train_batch_size", "batch_size"),
    "numepochs": ("num_train_epochs", "epochs"), "numsteps": ("max_steps",), "evaluationstrategy": ("eval_strategy",),
    "workers": ("dataloader_num_workers", "num_workers"), "outdir": ("output_dir",), "wd": ("weight_decay",),
    "warmup": ("warmup_steps", "warmup"), "optimizer": ("optim", "optimizers"), "loss": ("objective",),
    "criterion": ("objective",), "tokenizer": ("processing_class",), "collatefn": ("data_collator", "collator"),
    "datacollator": ("data_collator", "collator"), "trainset": ("train_dataset", "train"),
    "traindataset": ("train_dataset", "train"), "evaldataset": ("eval_dataset", "test"), "testdataset": ("test",),
    "data": ("dataset",), "everynsteps": ("every",), "adam": ("adamw_torch",), "adamw": ("adamw_torch",),
    "repo": ("repo_id",), "name": ("adapter_name",), "augment": ("augmentation",), "transform": ("augmentation",),
    "transforms": ("augmentation",), "checkpoint": ("resume_from_checkpoint",),
}  # fmt: skip
_ENDINGS = ("projectionhead", "criterion", "objective", "loss", "head", "probe", "callback")
_SHOWN = 30  # of a list of names


def plain_name(name: object) -> str:
    """Return a name without what spellings differ in: case, hyphens and underscores.

    Example:
        >>> plain_name("NT-Xent"), plain_name("nt_xent")
        ('ntxent', 'ntxent')
    """
    return re.sub(r"[^a-z0-9]", "", str(name)[:200].lower())


def known_elsewhere(name: object, available: Collection[str]) -> str | None:
    """Return what is called `name` in other libraries and papers, if `available` has it.

    Example:
        >>> known_elsewhere("--lr", ["lr_scheduler_type", "learning_rate"])
        'learning_rate'
    """
    return next((here for here in _ELSEWHERE.get(plain_name(name), ()) if here in available), None)


def nearest(name: object, available: Collection[str]) -> str | None:
    """Return the name of `available` that was probably meant, or None.

    Example:
        >>> nearest("NTXentLoss", ["nt_xent", "simcse"]), nearest("simclr", ["nt_xent", "simcse"])
        ('nt_xent', 'nt_xent')
    """
    if name is None:
        return None
    if close := difflib.get_close_matches(str(name), available, n=1, cutoff=0.9):
        return close[0]
    of_plain = {plain_name(n): n for n in sorted(available, reverse=True)}
    plain = plain_name(name)
    bare = next((plain.removesuffix(end) for end in _ENDINGS if plain.endswith(end) and plain != end), plain)
    for tried in dict.fromkeys((plain, bare)):
        if tried in of_plain:
            return of_plain[tried]
        if here := known_elsewhere(tried, available):
            return here
    if not difflib.get_close_matches(plain, of_plain, n=1, cutoff=0.8):  # else a misspelt name of elsewhere
        for other in difflib.get_close_matches(plain, _ELSEWHERE, n=1, cutoff=0.85):
            if here := known_elsewhere(other, available):
                return here
    close = difflib.get_close_matches(plain, of_plain, n=1) or difflib.get_close_matches(bare, of_plain, n=1)
    return of_plain[close[0]] if close else None


def listed(name: object, available: Collection[str]) -> str:
    """Return the names in words, of a long list those that are most alike `name`.

    Example:
        >>> listed("b", ["a", "b"])
        'a, b'
    """
    names = sorted(available)
    if len(names) <= _SHOWN:
        return ", ".join(names)
    alike = difflib.get_close_matches(str(name).lower(), names, n=_SHOWN // 3, cutoff=0.0)
    return f"{', '.join(sorted(alike))} and {len(names) - len(alike)} more"
