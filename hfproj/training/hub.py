"""How `ProjectionTrainer` pushes: the adapter with our card, the objective's buffers and the EMA teacher.

`transformers`' own methods would push the whole output folder with pickled settings, and a card of their own over ours.
"""

import dataclasses
import logging
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hfproj import distributed
from hfproj.backbones.preprocessing import ImagePreprocessing
from hfproj.errors import HfprojError, HubError, UsageError
from hfproj.hub.failures import FAILURES, explain, retry
from hfproj.hub.push import Target, check_repo_id, send, usable_token
from hfproj.hub.staging import check_pushable, described, stage
from hfproj.objectives.buffers import Position
from hfproj.reporting.card import write_card
from hfproj.results import Results
from hfproj.training.evaluation import MeasuringTrainer
from hfproj.tuner.active import active_name
from hfproj.tuner.description import known_preprocessing

LOG = logging.getLogger("hfproj.training")


class HubTrainer(MeasuringTrainer):
    """The part of `ProjectionTrainer` that pushes; only the main process does."""

    objective: Any
    ema: Any
    started: Position
    data_collator: Any
    _pool: ThreadPoolExecutor | None = None
    _pushes: tuple[Future, ...] = ()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check that pushing can work, and set ``hub_model_id``; the repository is made by the first push.

        Raises:
            UsageError: If the process is offline, no token allows to write there, or the model can't be pushed.
            HubError: If the Hub refuses or can't be reached.
        """
        found: str | HfprojError | None = None
        if self.is_world_process_zero():
            try:
                found = self._repository(usable_token(token if token is not None else self.args.hub_token))
            except HfprojError as error:
                found = error
        found = distributed.broadcast_object(found)
        if isinstance(found, HfprojError):
            raise found
        self.hub_model_id = found

    def _repository(self, token: str) -> str:
        self.args.check_hub()
        check_pushable(self.bare_model())
        try:
            who = retry(HfApi(token=token).whoami)
        except FAILURES as error:
            raise HubError(f"Asking the Hub whose access token this is failed: {explain(error, '')}.") from error
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        name = name if "/" in name else f"{who['name']}/{name}"
        check_repo_id(name)
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        owners = {who["name"], *(org["name"] for org in who.get("orgs", ()))}
        if role == "read":
            where = "https://huggingface.co/settings/tokens"
            raise UsageError(f"The access token of {who['name']} may only read; make one that may write ({where}).")
        owner = name.split("/")[0]
        if role == "write" and owner not in owners:  # the Hub does not list all rights of fine-grained tokens here
            hint = f"set hub_model_id to a repository of {' or '.join(sorted(owners))}"
            raise UsageError(f"The access token is that of {who['name']}, who can't write to {owner}; {hint}.")
        return name

    def create_model_card(
        self, *, results: Results | None = None, license: str | None = None, **unsupported: Any
    ) -> None:
        """Write the adapter's card into ``output_dir``, with `results.json` and the pictures.

        Args:
            results: What was measured (`hfproj.evaluate`); None: the card says that nothing was.
            license: Of the adapter, as the Hub writes it ("apache-2.0").
            **unsupported: Other arguments of ``transformers.Trainer.create_model_card`` are refused.

        Raises:
            UsageError: If there are other arguments.
        """
        _refuse("create_model_card", unsupported)
        if not self.is_world_process_zero():
            return
        model = self.bare_model()
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if results is not None:
            self.note_skipped(results)
        write_card(
            results if results is not None else self._unmeasured(), folder, repo_id=self.hub_model_id,
            license=license, adapters=list(model.peft_config), adapter=active_name(model),
            keep_results=results is not None,
        )  # fmt: skip

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None,
        revision: str | None = None, private: bool | None = None, *,
        results: Results | None = None, license: str | None = None, commit_description: str | None = None,
        create_pr: bool = False, eval_results: bool = False, state: bool = True, **unsupported: Any,
    ) -> CommitInfo | Future | None:  # fmt: skip
        """Save the adapter with its card in ``output_dir`` and push it; every process has to call it.

        Args:
            commit_message: Title of the commit.
            blocking: Return only when it is pushed; else a ``Future``.
            token: Access token. Default: ``args.hub_token``, or that of `hf auth login` or ``HF_TOKEN``.
            revision: Branch. Default: ``args.hub_revision``, or main.
            private: Whether a new repository is private. Default: ``args.hub_private_repo``.
            results: What was measured (`hfproj.evaluate`); None: the card says that nothing was.
            license: Of the adapter, as the Hub writes it ("apache-2.0").
            commit_description: Text of the commit.
            create_pr: Open a pull request instead.
            eval_results: Write ``.eval_results``, too.
            state: Push the objective's buffers and the EMA teacher, too, for ``continue_from``.
            **unsupported: Other arguments of ``transformers.Trainer.push_to_hub`` are refused.

        Returns:
            The commit; a future of it where not `blocking`; None on other processes than the main one.

        Raises:
            UsageError: If it can't be pushed, see `hfproj.push_to_hub`; nothing was sent.
            HubError: If the Hub refused or could not be reached; the adapter is saved in ``output_dir``.
        """
        _refuse("push_to_hub", unsupported)
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        token = token if token is not None else args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(results=results, license=license)
        self._finish_current_push()
        target = Target(
            str(self.hub_model_id), token=token, revision=revision if revision is not None else args.hub_revision,
            create_pr=create_pr, private=private if private is not None else args.hub_private_repo,
        )  # fmt: skip
        options = {"results": results, "license": license, "eval_results": eval_results}
        push = self._staged(Path(args.output_dir), target, commit_message, commit_description, state=state, **options)
        return push() if blocking else self._in_background(push)

    # Private: transformers calls it at each checkpoint if args.push_to_hub, and its own pushes pickled files.
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the adapter of a checkpoint in the background; errors are logged, and training goes on."""
        args, state = self.args, self.state
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and any(not push.done() for push in self._pushes):
            return
        self.callback_handler.on_push_begin(args, state, self.control)
        by_step = args.save_strategy == SaveStrategy.STEPS
        where = f"step {state.global_step}" if by_step else f"epoch {int(state.epoch or 0)}"
        target = Target(
            str(self.hub_model_id), token=args.hub_token, revision=args.hub_revision, private=args.hub_private_repo
        )
        try:
            push = self._staged(Path(checkpoint_folder), target, f"Training in progress, {where}", None)
        except HfprojError as error:
            return LOG.warning("Training goes on without its push at %s. %s", where, error)

        def quietly() -> None:
            try:
                push()
            except HfprojError as error:
                LOG.warning("Training went on without its push at %s. %s", where, error)

        self._in_background(quietly)

    # Private: transformers calls it at the end of training, and its own waits for one push only.
    def _finish_current_push(self) -> None:
        """Wait for what is being pushed in the background."""
        wait(self._pushes)
        self._pushes = ()

    def _staged(
        self, saved: Path, target: Target, message: str | None, description: str | None, *,
        state: bool = True, **kwargs: Any,
    ) -> Callable[[], CommitInfo]:  # fmt: skip
        """Stage what is sent, from a folder in which the adapters are saved; return the call that sends it."""
        folder = tempfile.TemporaryDirectory(prefix="hfproj-")
        try:
            staged = stage(
                self.bare_model(), Path(folder.name), target.repo_id, unmeasured=self._unmeasured(),
                objective=self.objective if state else None, ema=self.ema if state else None, before=self.started,
                preprocessing=self._preprocessing(), saved=saved, **kwargs,
            )  # fmt: skip
        except BaseException:
            folder.cleanup()
            raise

        def push() -> CommitInfo:
            with folder:
                return send(staged, target, commit_message=message, commit_description=description)

        return push

    def _in_background(self, call: Callable[[], Any]) -> Future:
        self._pool = self._pool or ThreadPoolExecutor(max_workers=1, thread_name_prefix="hfproj-push")
        future = self._pool.submit(call)
        self._pushes = (*(push for push in self._pushes if not push.done()), future)
        return future

    def _unmeasured(self) -> Results:
        """Return what is known of the run without a measurement."""
        results = described(self.bare_model(), active_name(self.bare_model()))
        results.config["training"] = self.args.chosen()
        results.seeds, results.history = [self.args.seed], self.history
        self.note_skipped(results)
        return results

    def _preprocessing(self) -> ImagePreprocessing | None:
        """Return how the images of this run were prepared: size, mean and std are the collator's."""
        known = known_preprocessing(self.bare_model(), active_name(self.bare_model()))
        collator = self.data_collator
        if not all(hasattr(collator, name) for name in ("size", "mean", "std")):
            return known
        mean, std = (tuple(round(v, 6) for v in getattr(collator, n).flatten().tolist()) for n in ("mean", "std"))
        known = ImagePreprocessing(collator.size, mean, std) if known is None else known.at(collator.size)
        return dataclasses.replace(known, mean=mean, std=std)


def _refuse(method: str, unsupported: dict[str, Any]) -> None:
    if unsupported:
        raise UsageError(
            f"{method} takes no {', '.join(unsupported)}: the card is made of results= and license= alone "
            "(results.config may hold 'dataset', 'license', 'language')."
        )
