"""Checkpoints from which a grown run resumes exactly, and a clean stop with a checkpoint when a signal arrives.

It does not use Lightning's ``ModelCheckpoint``. A file that it saves in ``on_train_batch_end`` of an epoch's last
batch makes the *next* resume replay data. Right after a resume it can save in the middle of an accumulation window,
which loses the partial gradients. (Both were reproduced on Lightning 2.6.6 without any growth.) This callback saves
only between optimizer steps, and at an epoch's end only in ``on_train_epoch_end``.

It does not use Lightning's file writing, which moves a file from the system's temporary folder. On another file system
that is a copy, not an atomic rename, and a kill leaves the temporary file behind.

Signals are recorded (:mod:`callbacks.stop_signals`) and handled between optimizer steps.
"""

import logging
import os
import pickle
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.ddp import require_lightning, require_same_step
from callbacks.lookup import find_callback
from callbacks.requeue import EXIT_SIGTERM, is_preempted, requeue
from callbacks.stacking import StackingCallback
from callbacks.stop_signals import REASONS, REQUEUE, SHOULD_STOP, TERMINATE, StopSignals
from callbacks.validation import require_same_clock, validation_is_due
from datamodules.errors import InputError, numbered
from datamodules.files import clear_temporaries, replacing
from lightning_modules.checkpoint_files import global_step, serialised

log = logging.getLogger(__name__)


class RunCheckpoint(Checkpoint):
    """Saves every N optimizer steps, at every epoch's end (before a growth), once per stage, and at a stop.

    Files in ``RUN/checkpoints``: ``step=000001234.ckpt`` (the newest ``keep`` of this attempt), ``last.ckpt`` (the
    newest of them), ``stage_3.ckpt`` (the end of each stage, kept). A file is written under a temporary name and
    renamed. So a kill or a full disk at any moment leaves a ``last.ckpt`` that loads, and at most one temporary file,
    which the next attempt removes.

    It removes only files that this attempt has written. An attempt that begins at an older checkpoint moves the later
    ones to ``checkpoints/abandoned_TIME`` before it writes its first.

    A validation that is due after the step comes first: Lightning would take it for done when it resumes.

    Stop: a run stops after SIGTERM to any rank, after ``trainer.max_time``, or when a callback sets
    ``trainer.should_stop``. It writes a checkpoint at the next optimizer step (with several ranks, the one after that)
    that is not an epoch's last, else at the epoch's end (after its validation). A growth that writes features breaks
    off as soon as the first process has the signal: the checkpoint of the epoch before holds all. The first process of
    each node exits with status 143, the others with 0, because Lightning's launcher would treat another status as a
    crash and kill the first. Under ``torchrun --max_restarts`` all exit with 0 unless a signal stopped them. The same
    command with ``--ckpt_path last`` continues the run.

    SLURM: Lightning chooses ``SLURMEnvironment`` under ``srun`` (one task per device, job not named bash or
    interactive); ``sbatch --requeue --signal=SIGUSR1@120`` sends the signal two minutes before the end. Then the run
    writes a checkpoint as above, calls ``scontrol requeue``, and exits as above, but with 143 from the first process
    alone: ``srun --kill-on-bad-exit`` would end it when another exits so. Lightning's handler is not used: it ends the
    loggers first, however long one waits for its server. A job that SLURM preempts gets SIGTERM at the start of its
    grace time. The run then does the same, because SLURM would take its exit for a failure. Before training starts,
    :func:`callbacks.requeue.listen` answers the signal. For another signal, or none, set ``trainer.plugins`` to a
    ``SLURMEnvironment`` with other ``requeue_signal`` or ``auto_requeue``. The command must have ``--ckpt_path last``
    from the start.

    Args:
        every_n_steps: optimizer steps between files; 0 saves at epochs' ends only.
        keep: number of step files to keep; at least 1.
        keep_stages: also keep the model at the end of each stage.

    Raises:
        OSError: a checkpoint cannot be written. All ranks raise it, and it names the folder. Or ranks go on from
            different steps.
        InputError: ``trainer.should_stop`` is set before the first step.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 2, keep_stages: bool = True) -> None:
        if every_n_steps < 0 or keep < 1:
            raise InputError(
                f"checkpoint.every_n_steps={every_n_steps} must be at least 0, checkpoint.keep={keep} at least 1"
            )
        require_lightning()
        self.every_n_steps, self.keep, self.keep_stages = every_n_steps, keep, keep_stages
        self.signals = StopSignals()
        self._loaded_step, self._began_at, self._written = 0, 0, list[Path]()
        self._after_validation: int | None = None  # reason of a stop, or 0, while a checkpoint waits for a validation

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]
        if trainer.state.fn == "fit" and "loops" in checkpoint:
            rescale_progress(checkpoint["loops"]["fit_loop"], trainer.accumulate_grad_batches)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals = StopSignals()
        self.signals.give_back(trainer)
        require_same_step(trainer, self._loaded_step)
        require_same_clock(trainer)
        if trainer.should_stop and trainer.fit_loop._can_stop_early:
            raise InputError(
                "the run would stop before its first step: trainer.max_time counts the time of all attempts, so raise "
                "it to go on (or a callback has set trainer.should_stop)"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.listen(trainer)
        self._began_at, self._written = trainer.global_step, []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.take_over(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.take_over(trainer)
        if self._after_validation is not None:
            stop, self._after_validation = self._after_validation, None
            self._save_and_stop(trainer, stop)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.signals.take_over(trainer)
        window_done = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not window_done or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        stop = self.signals.agreed_before(trainer)
        if not stop and (not self.every_n_steps or trainer.global_step % self.every_n_steps):
            return
        if validation_is_due(trainer):
            self._after_validation = stop
        else:
            self._save_and_stop(trainer, stop)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.take_over(trainer)
        path = self._save(trainer, *self._stage_name(trainer))
        stop = self.signals.agreed(trainer)
        if stop and trainer.current_epoch + 1 != trainer.max_epochs:
            self._stop(trainer, stop, path)

    def _stage_name(self, trainer: L.Trainer) -> list[str]:
        """Name of the stage that ends with this epoch, if one does."""
        stacking = find_callback(trainer, StackingCallback)
        if stacking is None or not stacking.stages or not self.keep_stages:
            return []
        epoch, last = trainer.current_epoch, (trainer.max_epochs or 0) - 1
        depth = stacking.depth_at(epoch)
        ends = epoch == last or stacking.depth_at(epoch + 1) != depth
        return [f"stage_{depth}.ckpt"] if ends else []

    def _save_and_stop(self, trainer: L.Trainer, stop: int) -> None:
        path = self._save(trainer)
        if stop:
            self._stop(trainer, stop, path)

    def _stop(self, trainer: L.Trainer, reason: int, path: Path) -> None:
        if trainer.is_global_zero:
            log.warning(
                "stopped %s after step %d; %s holds all of it: continue with the same command and --ckpt_path last",
                *(REASONS[reason], trainer.global_step, path),
            )
        raise SIGTERMException(self._leave(trainer, reason))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave as after a stop where a signal has ended a growth, or Lightning the run before its first batch."""
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = self._leave(trainer, max(self.signals.received, TERMINATE))

    def _leave(self, trainer: L.Trainer, reason: int) -> int:
        """Return the job to SLURM's queue if that is wanted; the exit status of this process."""
        reason = max(reason, self.signals.received)  # of several ranks the reason is a step old
        if trainer.is_global_zero and (
            reason == REQUEUE or (reason == TERMINATE and self.signals.requeues and is_preempted())
        ):
            requeue()
        # torchrun would take the status for a failure, start the run again and so undo the stop.
        wanted = reason == SHOULD_STOP and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        return EXIT_SIGTERM if _reports(trainer) and not wanted else 0

    def _save(self, trainer: L.Trainer, *more_names: str) -> Path:
        """Write the checkpoint of this step, also under ``last.ckpt`` and ``more_names``; on all ranks."""
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"step={trainer.global_step:09d}.ckpt"
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        problem = None
        if trainer.is_global_zero:
            try:
                if not self._written:
                    _clear(folder, self._began_at)
                _write(checkpoint, path)
                for name in (*more_names, "last.ckpt"):
                    _link(path, folder / name)
                self._prune(path)
            except OSError as error:
                problem = error.errno, _describe(error, folder)
        # The other ranks wait here and stop on a failure too, instead of waiting in the next collective.
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise numbered(problem[1], problem[0])
        return path

    def _prune(self, newest: Path) -> None:
        """Delete all but the newest ``keep`` of the step files that this attempt has written."""
        self._written = [path for path in self._written if path != newest] + [newest]
        for path in self._written[: -self.keep]:
            path.unlink(missing_ok=True)
        self._written = self._written[-self.keep :]


def _reports(trainer: L.Trainer) -> bool:
    """Whether this process is the one that exits with a status other than 0: one per launcher that waits for it."""
    environment = trainer._accelerator_connector.cluster_environment
    return trainer.is_global_zero if isinstance(environment, SLURMEnvironment) else trainer.local_rank == 0


def rescale_progress(fit_loop: dict[str, Any], accumulate: int) -> None:
    """Convert a mid-epoch position, which Lightning counts in micro-batches, to another accumulation; in place.

    A checkpoint is made between optimizer steps, and the global batch is the same however it is split, so finished
    steps stay finished. A position that is not a whole number of steps is not changed; the loader checks it.
    """
    for loader in fit_loop["state_dict"].get("combined_loader", []):
        saved, done = loader.get("accumulate", accumulate), loader.get("yielded", 0)
        if saved == accumulate or done % saved or done >= loader["length"]:
            continue
        extra = done // saved * (accumulate - saved)
        loader |= {
            "yielded": done + extra,
            "length": loader["length"] // saved * accumulate,
            "accumulate": accumulate,
        }
        for counts in (fit_loop["epoch_loop.batch_progress"][name] for name in ("current", "total")):
            counts |= {name: count + extra for name, count in counts.items()}


def _describe(error: OSError, folder: Path) -> str:
    last = folder / "last.ckpt"
    left = f"{last} is untouched" if last.is_file() else "there is none from before"
    return (
        f"cannot write a checkpoint to {folder} ({error.strerror or error}); {left}: make room or make the "
        "folder writable, then continue with --ckpt_path last"
    )


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    """Serialise in memory, write under a temporary name of its own folder, rename."""
    content = serialised(checkpoint)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # some file systems report a full disk only here


def _link(source: Path, target: Path) -> None:
    """Give ``source`` a second name, atomically and without a second copy where the file system allows it."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _clear(folder: Path, step: int) -> None:
    """Move later checkpoints aside before an attempt that began at ``step`` writes its first one.

    It also deletes temporary files. They belong to a process that was killed, as no other process uses the folder.
    """
    clear_temporaries(folder)
    later = [path for path in folder.glob("*.ckpt") if _is_later(path, step)]
    if not later:
        return
    aside = folder / f"abandoned_{datetime.now(UTC):%Y%m%dT%H%M%S}"
    for path in later:
        _link(path, aside / path.name)
        if path.name != "last.ckpt":  # must exist at any time
            path.unlink()
    log.warning("this attempt began at step %d: %d later checkpoints are now in %s", step, len(later), aside)


def _is_later(path: Path, step: int) -> bool:
    try:
        return global_step(path) > step
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError):
        return True  # a damaged file is moved aside too
