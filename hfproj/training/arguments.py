"""Training arguments: those of `transformers`, with the defaults and the few additions that self-supervision needs."""

import functools
import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import HubStrategy

from hfproj.checking import check_fields, check_ranges, explained, in_our_words, refused_as
from hfproj.data.indexing import POLICIES
from hfproj.errors import UsageError, check_choice, check_type

REFUSED = "transformers refuses the training arguments"
_FRACTION, _LEAST, _MOST = 1 - 2**-53, 5e-324, 2**63
_RANGES = (  # fields, from, to, in words
    ("patch_dropout adam_beta1 adam_beta2", 0, _FRACTION, "a fraction in [0, 1), for example 0.5"),
    ("ema_momentum ema_momentum_end", 0, 1, "a number in [0, 1], for example 0.996"),
    ("learning_rate head_learning_rate adam_epsilon warmup_steps", 0, _MOST, "0 or more"),
    ("dataloader_num_workers", 0, 512, "a number of processes, 0 to 512, best no more than there are cores"),
    ("lars_trust_coefficient eval_knn_temperature num_train_epochs", _LEAST, _MOST, "a number above 0"),
    ("per_device_train_batch_size per_device_eval_batch_size eval_knn_k", 1, _MOST, "1 or more"),
    ("gradient_accumulation_steps", 1, _MOST, "1 or more"),
    ("head_warmup_steps", 0, _MOST, "a number of steps, 0 or more"),
    ("seed", 0, 2**32 - 1, "a number of 32 bits"),
)


@explained
@dataclass
class ProjectionTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` for `ProjectionTrainer`.

    Defaults that differ: ``learning_rate`` 1e-3 with a cosine schedule and 10 % warm-up and ``weight_decay`` 0.05
    (AdamW on a head and a low-rank adapter); ``dataloader_drop_last`` True (a repeated image is a false negative);
    ``remove_unused_columns`` False (items are images, not arguments of the model's forward);
    ``ddp_find_unused_parameters`` False (parameters that the representation does not depend on are frozen).

    Args:
        head_learning_rate: Learning rate of head, predictor and prototypes; None takes `learning_rate`.
        head_warmup_steps: Optimizer steps at first (below 1: a fraction of all) in which the backbone keeps its values,
            so that a fresh head does not spoil them; its rate then rises over as many steps as the schedule warms up.
        fixed_predictor_rate: The schedule leaves the predictor's learning rate alone (SimSiam).
        lars: Train with LARS (timm's, momentum 0.9) instead of `optim`. Made for heads and whole backbones: the second
            factor of a LoRA starts at zero, where LARS does not adapt.
        lars_trust_coefficient: η_t of LARS: 0.001 in MoCo v3 and VICReg, 0.02 in solo-learn's CIFAR runs.
        lars_clip: LARS adapts to at most the learning rate (solo-learn's CIFAR runs).
        ema_momentum: Momentum of the EMA teacher at the start, in [0, 1]; None takes the objective's.
        ema_momentum_end: The same at the end of training, where a cosine leads; None takes the objective's.
        patch_dropout: Fraction of the image patches, in [0, 1), that a ViT does not see in a training step; which ones
            depends on (seed, epoch, image, view) only.
        eval_knn_k: Neighbours of the online k-NN.
        eval_knn_temperature: Temperature of the online k-NN.
        log_representation: Log RankMe, standard deviation and positive-pair cosine of the last batch with the loss, as
            ``batch_rankme_h`` ….
        on_bad_image: What becomes of training images that can't be read: ``"raise"`` ends the run and names the image;
            ``"skip"`` draws another one in its place, see docs/images.md, counts it in the log (``skipped_images``) and
            lists it in results.json.

    ``dataloader_persistent_workers=True`` saves time where workers start more slowly than an epoch of a small data set
    takes; a run with dropout then does not resume bit for bit, since torch draws from the global generator whenever
    workers start.

    Of the options for the Hub, ``hub_strategy`` is ``"end"`` (``trainer.push_to_hub()`` and ``trainer.save_model()``
    push) or ``"every_save"`` (so does each checkpoint, in the background).

    Raises:
        UsageError: If a value is out of its range, or would push pickled files.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay; not for biases, norms and scales."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps; below 1, a fraction of all steps."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last incomplete batch."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: the collator needs the columns."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "DDP: find unused parameters."})
    head_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the head."})
    head_warmup_steps: float = field(default=0.0, metadata={"help": "Steps of the head alone; below 1, a fraction."})
    fixed_predictor_rate: bool = field(default=False, metadata={"help": "No schedule for the predictor's rate."})
    lars: bool = field(default=False, metadata={"help": "Train with LARS instead of optim."})
    lars_trust_coefficient: float = field(default=0.001, metadata={"help": "Trust coefficient of LARS."})
    lars_clip: bool = field(default=False, metadata={"help": "LARS adapts to at most the learning rate."})
    ema_momentum: float | None = field(default=None, metadata={"help": "Momentum of the EMA teacher."})
    ema_momentum_end: float | None = field(default=None, metadata={"help": "The same at the end of training."})
    patch_dropout: float = field(default=0.0, metadata={"help": "Fraction of patches hidden from a ViT."})
    eval_knn_k: int = field(default=20, metadata={"help": "Neighbours of the online k-NN."})
    eval_knn_temperature: float = field(default=0.07, metadata={"help": "Temperature of the online k-NN."})
    log_representation: bool = field(default=True, metadata={"help": "Log RankMe, std and cosine with the loss."})

    on_bad_image: str = field(default="raise", metadata={"help": "Images that can't be read: raise, or skip."})

    def __post_init__(self):
        # A token is not to be quoted; transformers takes more than it says, and its parser gives None for none.
        leave = ("hub_token", "fsdp", *(["debug"] if self.debug is None else []))
        check_fields("the training arguments", ProjectionTrainingArguments, self, leave=leave)
        check_type("fsdp", self.fsdp, (str, bool, list, tuple, type(None)), "for example 'full_shard'")
        for name in ("accelerator_config", "fsdp_config", "deepspeed"):
            value = getattr(self, name)
            if isinstance(value, str) and not value.startswith("{") and not os.path.isfile(value):
                raise UsageError(f"Expected {name} to be a JSON file or a dict, got {value!r}: there is no such file.")
        _defaults()  # now: making arguments resets accelerate's state, which a trainer needs while it trains
        with refused_as(REFUSED), in_our_words(self):
            super().__post_init__()
            get_reporting_integration_callbacks(self.report_to)  # here, and not when the trainer is made
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # else torch warns that there is nothing to pin memory for
        self.check_hub()
        check_choice("on_bad_image", self.on_bad_image, POLICIES)
        check_ranges(self, _RANGES)
        if self.max_steps != -1 and self.max_steps < 1:
            raise UsageError(f"Expected max_steps of 1 or more (-1: num_train_epochs), got {self.max_steps}.")
        self.adam_beta1, self.adam_beta2 = float(self.adam_beta1), float(self.adam_beta2)  # torch takes no whole ones
        if self.remove_unused_columns:
            raise UsageError(
                "remove_unused_columns=True would drop the images before they are collated; leave it False."
            )

    @staticmethod
    def _belongs(name: str, value: object) -> str | None:
        return f"objective={{'name': 'nt_xent', {name!r}: {value!r}}} of the trainer" if name == "temperature" else None

    def check_hub(self) -> None:
        """Refuse to push whole checkpoints, which hold pickles.

        Raises:
            UsageError: If `hub_strategy` is "checkpoint" or "all_checkpoints".
        """
        if self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise UsageError(
                f"hub_strategy={HubStrategy(self.hub_strategy).value!r} would push the pickled states of optimizer and "
                "random generators, and nothing pickled is pushed. Use 'every_save': continue_from= takes any commit."
            )

    def chosen(self) -> dict[str, object]:
        """Return the values that differ from the defaults of `transformers`, for `hfproj.Results.config`."""
        left_out = {"output_dir", "logging_dir", "disable_tqdm", "report_to", "run_name", "seed"}
        left_out |= {"resume_from_checkpoint", "dataloader_pin_memory"}  # they describe this machine
        left_out |= {n for n in self.to_dict() if n == "push_to_hub" or n.startswith("hub_")}  # and where it goes
        return {n: v for n, v in self.to_dict().items() if n not in left_out and v != _defaults().get(n)}


@functools.cache
def _defaults() -> dict[str, object]:
    return TrainingArguments(output_dir="out").to_dict()
