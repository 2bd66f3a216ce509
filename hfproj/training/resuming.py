"""How `ProjectionTrainer` saves, stops and goes on: whole checkpoints, one run in a folder, signals, place in the data.

Every process calls these methods; the main one decides and writes, and what it finds wrong is raised on all of them.
"""

import logging
import os
import secrets
import shutil
import signal as signals
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME

from hfproj import distributed
from hfproj.data.indexing import StreamDataset
from hfproj.errors import AdapterFileError, UsageError, one_line
from hfproj.features.cache_key import content_of
from hfproj.hub.staging import folder_of
from hfproj.objectives.buffers import BEFORE, load_buffers, read_position, save_buffers
from hfproj.results.history import HISTORY_FILE, write_history
from hfproj.saving import folders
from hfproj.saving.locks import locked
from hfproj.saving.manifest import PREFIX, STATE, flaw, write_manifest
from hfproj.saving.position import Course, counted
from hfproj.saving.signals import EXIT_CODE, StopSignals
from hfproj.saving.taken_up import check_taken_up, settings_of
from hfproj.training.checkpoints import folder_to_resume
from hfproj.training.hub import HubTrainer
from hfproj.tuner.active import active_name

LOG = logging.getLogger("hfproj.training")
_MAY_BE_DISK = (OSError, RuntimeError, SafetensorError)  # torch and safetensors have words of their own for a full disk


class ResumingTrainer(HubTrainer):
    """The part of `ProjectionTrainer` that writes checkpoints and takes them up again."""

    history: list[dict[str, Any]]
    position: Callable
    between_epochs = False
    _staging = ""  # the hidden folder of this run, while a checkpoint is written into it
    _hidden = ""  # its name
    _limit: int | None = None
    _course: Course | None = None
    _saved: tuple[int, int] | None = None  # step and entries of the log at the last checkpoint

    @contextmanager
    def in_folder(self, wanted: str | os.PathLike | bool | None) -> Iterator[str | None]:
        """Hold ``output_dir`` and listen to signals while training; give the checkpoint to go on from, or None."""
        args, folder = self.args, Path(self.args.output_dir)
        self._saved, self._hidden = None, distributed.on_main(lambda: folders.STAGING + secrets.token_hex(4))
        self._limit = args.save_total_limit
        found: str | None
        with ExitStack() as stack:
            found = distributed.on_main(lambda: self._enter(stack, wanted))
            self._course = self._own_course()
            if found is not None:
                found = distributed.on_main(lambda: self._counted(Path(str(found))))
            # transformers would rotate by modification time, and drop the newest for the best at the end.
            args.save_total_limit = None
            stack.callback(setattr, args, "save_total_limit", self._limit)
            self._signals = stack.enter_context(StopSignals())
            if self.is_world_process_zero():
                stack.callback(folders.clear, folder, f"{self._hidden}*")
            yield found

    def _enter(self, stack: ExitStack, wanted: str | os.PathLike | bool | None) -> str | None:
        folder = Path(self.args.output_dir)
        try:
            stack.enter_context(locked(folder))
            folders.recover(folder)
        except OSError as error:
            raise folders.unwritten("A run", folder, folders.why_unwritten(error) or str(error), folder) from error
        if wanted == folders.AUTO and self.args.save_only_model:
            raise UsageError(
                "resume_from_checkpoint='auto' has nothing to go on from where save_only_model=True leaves optimizer, "
                "schedule and random states out of each checkpoint; set save_only_model=False."
            )
        if wanted:
            return folders.checkpoint_to_resume(wanted, folder)
        if (last := folders.last_complete_checkpoint(folder)) is not None:
            LOG.warning(
                f"Starting from the beginning beside {last} of an earlier run, from which "
                "resume_from_checkpoint='auto' would go on. Remove it, or give this run another output_dir."
            )
        return None

    def _own_course(self) -> Course | None:
        """Return how this run goes through its data; None of a stream."""
        if self.train_dataset is None or isinstance(self.train_dataset, StreamDataset):
            return None
        loader, accumulation = self.get_train_dataloader(), self.args.gradient_accumulation_steps
        batch = getattr(loader, "total_batch_size", None) or self.get_total_train_batch_size(self.args) // accumulation
        sampler: Any = self._train_sampler
        return Course(
            length=len(self.train_dataset), batch=batch, images=batch * accumulation,
            steps=max(-(-len(loader) // accumulation), 1), seed=sampler.seed, shuffle=sampler.shuffle,
            data=content_of(self.train_dataset),
        )  # fmt: skip

    def _counted(self, checkpoint: Path) -> str:
        """Return the checkpoint, or a copy whose step is counted in the batches of this run."""
        if isinstance(self.train_dataset, StreamDataset) and not self.args.ignore_data_skip:
            raise UsageError(
                "A stream can't be resumed exactly: what it gave before is not known. Pass ignore_data_skip=True "
                "to start again at its beginning, or use a data set with a length."
            )
        if self.args.ignore_data_skip:
            return str(checkpoint)
        hidden = Path(self.args.output_dir) / f"{self._hidden}-counted"
        return str(counted(checkpoint, self._course, distributed.world_size(), hidden))

    # --- checkpoints ---

    # Private: _save_checkpoint asks for it, and no hook lets a checkpoint be written elsewhere than it is to lie.
    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, self._staging) if self._staging else folder

    # Private: no callback comes between the last file of a checkpoint and the rotation of the others.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        staged, best, failed = folder / self._hidden / f"{PREFIX}-{step}", self.state.best_global_step, None
        if best and (best == step or (folder / f"{PREFIX}-{best}").is_dir()):
            self.state.best_model_checkpoint = str(folder / f"{PREFIX}-{best}")
        try:
            if self.args.should_save:
                folders.check_there(folder)
            self._staging = self._hidden
            self.state.best_global_step = None  # it would look for the best one there, and wait for all processes
            super()._save_checkpoint(model, trial)
        except _MAY_BE_DISK as error:
            failed = folders.why_unwritten(error)
            if failed is None:
                raise
        finally:
            self._staging, self.state.best_global_step = "", best
        failed = distributed.first(failed)
        if failed is None and self.args.should_save:
            try:
                self.state.save_to_json(str(staged / STATE))
                write_manifest(staged, {
                    "step": step, "resumable": not self.args.save_only_model, "processes": distributed.world_size(),
                    "course": asdict(self._course) if self._course else None,
                })  # fmt: skip
                folders.put_in_place(staged, folder)
            except OSError as error:
                failed = folders.why_unwritten(error)
        failed = distributed.first(failed)
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
        if failed is not None:
            raise folders.unwritten(f"The checkpoint of step {step}", folder, failed, folder)
        if self.args.should_save:
            folders.rotate(folder, self._limit, {staged.name, Path(self.state.best_model_checkpoint or "").name})
        self._saved = (step, len(self.state.log_history))

    # Private: a callback can ask for a checkpoint, but save_strategy="best" overrules it, and none comes after it.
    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        signal = self._signals.agreed(self.args.device)
        if signal is None:
            return
        control, over = self.control, self.state.global_step >= self.state.max_steps
        ends = control.should_epoch_stop or control.should_training_stop or float(self.state.epoch or 0).is_integer()
        if not self.between_epochs and ends:
            return  # what is due at the end of the epoch comes first
        if control.should_training_stop and not over:
            return  # a callback ended the training, which a resumed run would not know
        if self._saved != (self.state.global_step, len(self.state.log_history)):
            self._save_checkpoint(self.model_wrapped, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        code, on = EXIT_CODE, "resume_from_checkpoint='auto' goes on from it"
        if self.args.save_only_model:  # nothing to start again: as a process ends that does not handle the signal
            code = 128 + getattr(signals, signal)
            on = "it has no optimizer (save_only_model=True): continue_from= goes on from its adapter with a new one"
        if self.is_world_process_zero():
            LOG.warning(
                f"{signal}: the checkpoint of step {self.state.global_step} is written to {self.args.output_dir}; "
                f"exiting with code {code}. {on[0].upper()}{on[1:]}."
            )
        raise SystemExit(code)

    # Private: save_model, the public form, gathers shards on all processes and then has one of them write, here.
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # only takes part in collectives
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        try:
            with folders.replacing(folder) as part:
                super()._save(str(part), state_dict)
                self._save_beside(part, folder)
        except _MAY_BE_DISK as error:
            why = folders.why_unwritten(error)
            if why is None:
                raise
            raise folders.unwritten("The adapter", folder, why, self.args.output_dir) from error

    def _save_beside(self, part: Path, folder: Path) -> None:
        self.objective.position = self.position()
        beside = folder_of(part, active_name(self.bare_model()))
        save_buffers(self.objective, beside, before=self.started)
        if self.history:
            write_history(self.history, part / HISTORY_FILE)
        if self.ema is not None and folder.name.startswith(PREFIX):
            self.ema.save(beside)
        (part / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, and folders are shared
        if (folder / "README.md").exists():
            (part / "README.md").unlink(missing_ok=True)  # PEFT's empty card is no replacement for a written one

    # Private: transformers takes what a checkpoint holds, whatever optimizer it is of, in place of the arguments.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled or self.optimizer is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        wanted = settings_of(self.optimizer)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"The optimizer of {checkpoint} can't be taken up ({one_line(error)}). Resume with the optimizer and "
                f"the adapter that it was written with; continue_from={checkpoint!r} begins with a new one."
            ) from error
        check_taken_up(self.optimizer, checkpoint, wanted)

    def load_checkpoint(self, checkpoint: str) -> None:
        """Give model, objective and EMA teacher the values of a checkpoint, a folder that this trainer saved.

        Raises:
            AdapterFileError: If the files are damaged, or do not fit the adapter, the objective or the EMA teacher.
        """
        self._load_from_checkpoint(checkpoint)

    # Private: transformers tells no callback when it loads a checkpoint, whose buffers and EMA teacher belong to it.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = folder_to_resume(resume_from_checkpoint, self.bare_model())
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except SafetensorError as error:
            raise AdapterFileError(
                f"{resume_from_checkpoint} holds a damaged adapter ({error}); resume from another checkpoint."
            ) from error
        hint = "resume with the adapter and the objective that it was written with, or without resume_from_checkpoint"
        load_buffers(self.objective, folder, hint=hint)
        self.started = read_position(folder, BEFORE)
        if self.ema is not None:
            self.ema.load(folder, hint=hint)

    # Private: transformers' own finds no adapter under another name than "default", and no objective.
    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        elif why := flaw(best):  # the run is done: its last weights are better than none
            LOG.warning(
                f"The best checkpoint can't be loaded, {best}: {why}. The model keeps the weights of the last step."
            )
        else:
            self._load_from_checkpoint(str(best))
