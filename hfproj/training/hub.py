"""How `ProjectionTrainer` pushes: the adapter with our card, the objective's buffers and the moving average.

`transformers`' own would push the whole output folder with pickled settings, and a card of its own over ours.
"""

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
from hfproj.hub.staging import check_pushable, described, stage, without_tokens
from hfproj.objectives.buffers import Position
from hfproj.reporting.card import write_card
from hfproj.results import Results
from hfproj.training import methods
from hfproj.tuner.description import known_preprocessing

LOG = logging.getLogger("hfproj.training")


class PushesToHub:
    """What `ProjectionTrainer` overrides of ``transformers.Trainer`` to push; only the main process does."""

    args: Any
    state: Any
    control: Any
    callback_handler: Any
    data_collator: Any
    objective: Any
    ema: Any
    history: list[dict[str, Any]]
    started: Position
    hub_model_id: str | None
    bare_model: Callable[[], Any]
    save_model: Callable[..., None]
    is_world_process_zero: Callable[[], bool]
    _pool: ThreadPoolExecutor | None = None
    _pushes: tuple[Future, ...] = ()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check that pushing can work, and set ``hub_model_id``; the repository is made by the first push.

        Raises:
            UsageError: offline, no token, a token that may only read or of somebody else, or a model that can't be
                pushed.
            HubError: the Hub refuses or can't be reached.
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
            raise UsageError(
                f"The access token of {who['name']} may only read; make one with the right to write "
                "(https://huggingface.co/settings/tokens)."
            )
        owner = name.split("/")[0]
        if role == "write" and owner not in owners:  # of fine-grained tokens not all rights are told here
            raise UsageError(
                f"The access token is that of {who['name']}, who can't write to {owner}; set hub_model_id to a "
                f"repository of {' or '.join(sorted(owners))}."
            )
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
            UsageError: so it is.
        """
        if unsupported:
            raise UsageError(
                f"create_model_card takes no {', '.join(unsupported)}: the card is made of results= and license= alone "
                "(results.config may hold 'dataset', 'license', 'language')."
            )
        if not self.is_world_process_zero():
            return
        model = self.bare_model()
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_card(
            without_tokens(results) if results is not None else self._unmeasured(),
            folder,
            repo_id=self.hub_model_id,
            license=license,
            adapters=list(model.peft_config),
            adapter=methods.active_name(model),
            keep_results=results is not None,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        results: Results | None = None,
        license: str | None = None,
        commit_description: str | None = None,
        create_pr: bool = False,
        eval_results: bool = False,
        state: bool = True,
        **unsupported: Any,
    ) -> CommitInfo | Future | None:
        """Save the adapter with its card in ``output_dir`` and push it; every process has to call it.

        Args:
            commit_message: Title of the commit.
            blocking: Return only when it is pushed; else a ``Future``.
            token: Access token. Default: ``args.hub_token``, or that of `hf auth login` or ``HF_TOKEN``.
            revision: Branch. Default: ``args.hub_revision``, or main.
            private: Whether a repository that is made is private. Default: ``args.hub_private_repo``.
            results: What was measured (`hfproj.evaluate`); None: the card says that nothing was.
            license: Of the adapter, as the Hub writes it ("apache-2.0").
            commit_description: Text of the commit.
            create_pr: Open a pull request instead.
            eval_results: Write ``.eval_results``, too.
            state: The objective's buffers and the moving average go along, for ``continue_from``.
            **unsupported: Other arguments of ``transformers.Trainer.push_to_hub`` are refused.

        Returns:
            The commit; a future of it where not `blocking`; None on other processes than the main one.

        Raises:
            UsageError: it can't work, see `hfproj.push_to_hub`; nothing was sent.
            HubError: the Hub refused or could not be reached; the adapter is saved in ``output_dir``.
        """
        if unsupported:
            raise UsageError(
                f"push_to_hub takes no {', '.join(unsupported)}: the card is made of results= and license= alone "
                "(results.config may hold 'dataset', 'license', 'language')."
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(results=results, license=license)
        self._finish_current_push()
        push = self._packed(
            Path(self.args.output_dir),
            Target(
                str(self.hub_model_id),
                token=token,
                revision=revision if revision is not None else self.args.hub_revision,
                create_pr=create_pr,
                private=private if private is not None else self.args.hub_private_repo,
            ),
            commit_message,
            commit_description,
            results=results,
            license=license,
            eval_results=eval_results,
            state=state,
        )
        return push() if blocking else self._in_background(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the adapter of a checkpoint in the background; what goes wrong is logged, and training goes on."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and any(not push.done() for push in self._pushes):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        state = self.state
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        where = f"step {state.global_step}" if by_step else f"epoch {int(state.epoch or 0)}"
        try:
            target = Target(
                str(self.hub_model_id),
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                private=self.args.hub_private_repo,
            )
            push = self._packed(Path(checkpoint_folder), target, f"Training in progress, {where}", None)
        except HfprojError as error:
            LOG.warning("Training goes on without its push at %s. %s", where, error)
            return

        def quietly() -> None:
            try:
                push()
            except HfprojError as error:
                LOG.warning("Training went on without its push at %s. %s", where, error)

        self._in_background(quietly)

    def _finish_current_push(self) -> None:
        """Wait for what is being pushed in the background."""
        wait(self._pushes)
        self._pushes = ()

    def _packed(
        self,
        saved: Path,
        target: Target,
        message: str | None,
        description: str | None,
        *,
        results: Results | None = None,
        license: str | None = None,
        eval_results: bool = False,
        state: bool = True,
    ) -> Callable[[], CommitInfo]:
        """Make the folder to send from one in which the adapters are saved; return the call that sends it."""
        model = self.bare_model()
        folder = tempfile.TemporaryDirectory(prefix="hfproj-")
        try:
            staged = stage(
                model,
                Path(folder.name),
                target.repo_id,
                results=results,
                unmeasured=self._unmeasured(),
                objective=self.objective if state else None,
                ema=self.ema if state else None,
                before=self.started,
                license=license,
                eval_results=eval_results,
                preprocessing=self._preprocessing(),
                saved=saved,
            )
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
        model = self.bare_model()
        results = described(model, methods.active_name(model))
        results.config["training"] = self.args.chosen()
        results.seeds = [self.args.seed]
        results.history = self.history
        return results

    def _preprocessing(self) -> ImagePreprocessing | None:
        """Return how the images of this run were made ready: size, mean and std are the collator's."""
        model = self.bare_model()
        known = known_preprocessing(model, methods.active_name(model))
        collator = self.data_collator
        if not all(hasattr(collator, name) for name in ("size", "mean", "std")):
            return known
        mean, std = (tuple(round(v, 6) for v in getattr(collator, n).flatten().tolist()) for n in ("mean", "std"))
        interpolation = known.interpolation if known is not None else "bicubic"
        return ImagePreprocessing(collator.size, mean, std, interpolation)
