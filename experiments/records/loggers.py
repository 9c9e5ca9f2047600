"""Loggers of a run: ``RUN/metrics.csv`` always, Weights & Biases unless it is disabled."""

import logging
import netrc
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Literal
from urllib.parse import urlsplit

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from callbacks.requeue import EXIT_SIGTERM, MOST_SECONDS_BEFORE, announced, before_requeue
from datamodules.errors import InputError
from experiments.records.csv_logger import AppendingCSVLogger
from experiments.records.wandb_run import ServiceGuard, drop_service, is_end_of_service, leave_service

log = logging.getLogger(__name__)


@dataclass
class WandbSettings:
    """Settings of Weights & Biases.

    Args:
        mode: ``auto`` is online if a key is set, else offline (upload later with ``wandb sync``); ``disabled`` does not
            even import it.
        project: project of the run.
        entity: user or team; default: that of the key.
        group: group of runs shown together in the dashboard, for example the seeds of one recipe.
        tags: labels of the run.
        id: run id; default: generated once and kept over every resume.
        init_timeout_seconds: seconds to wait for an unreachable server (some 10 s more in practice) before the run
            continues offline.
        finish_timeout_seconds: seconds to wait at the end of a run for the upload of its data; what is left then stays
            in the run's folder, and a warning tells how to upload it.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "interstack"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    id: str | None = None
    init_timeout_seconds: float = 30.0
    finish_timeout_seconds: float = 45.0

    def __post_init__(self) -> None:
        for name in ("init_timeout_seconds", "finish_timeout_seconds"):
            if (value := getattr(self, name)) <= 0:  # W&B takes 0 for no limit
                raise InputError(f"wandb.{name}={value:g} must be more than 0")


SERVICE_SECONDS = 10.0
"""For W&B's service to answer after its own time limit, and for a run to end after another one has waited in vain."""


class ResilientWandbLogger(WandbLogger):
    """A ``WandbLogger`` that goes offline when the server does not answer, and ends its run with the fit.

    If W&B's service ends, the training goes on without it (see `ServiceGuard`).

    All metrics are shown against ``trainer/global_step``, the optimizer steps done.

    Args:
        finish_timeout_seconds: as in `WandbSettings`.
        config: resolved configuration of the run.
        kwargs: as for ``WandbLogger``, which hands most of them to ``wandb.init``.

    Attributes:
        unreachable: whether the server failed to answer any run of this process.
    """

    unreachable = False
    _running = 0  # runs of this process that have started and not ended

    def __init__(self, finish_timeout_seconds: float, config: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._config = config
        self._finish_timeout_seconds = finish_timeout_seconds
        del self._wandb_init["anonymous"]  # W&B warns of it at every start

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started at the first access, on rank zero."""
        if self._experiment is None:
            self._start()
            self._guard = ServiceGuard(self._experiment)
            ResilientWandbLogger._running += 1
            self._forget = before_requeue(self.suspend)
        return self._experiment

    def _start(self) -> None:
        import wandb

        if ResilientWandbLogger.unreachable and self._wandb_init["mode"] == "online":
            # Another failure would end W&B's service, and with it the runs of this process that log offline.
            self._wandb_init["mode"] = "offline"
        earlier = self._folders()
        try:
            self._begin()
            return
        except wandb.errors.Error as error:
            if self._wandb_init["mode"] != "online":
                raise
            reason = str(error).splitlines()[0]
            log.warning("W&B could not start online (%s): it logs offline, `wandb sync` uploads", reason)
        ResilientWandbLogger.unreachable = True
        # W&B's service still holds the run's id. It can only be ended where it serves no other run.
        if ResilientWandbLogger._running:
            self._wandb_init["id"] += "-offline"
        else:
            wandb.teardown()
        self._remove_since(earlier)
        self._wandb_init["mode"] = "offline"
        self._experiment = super().experiment

    def _begin(self) -> None:
        """Start the run, with a new service if the one of earlier runs has ended."""
        earlier = self._folders()
        try:
            self._experiment = super().experiment
        except Exception as error:
            if ResilientWandbLogger._running or not is_end_of_service(error):
                raise
            drop_service()
            self._remove_since(earlier)
            self._experiment = super().experiment

    def _folders(self) -> set[Path]:
        return set((Path(self.save_dir or ".") / "wandb").glob("*run-*"))

    def _remove_since(self, earlier: set[Path]) -> None:
        """Remove the folder of a run that could not start: it holds no metrics, and looks like a run to upload."""
        for folder in self._folders() - earlier:
            shutil.rmtree(folder, ignore_errors=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row; before the first one, send the configuration.

        ``wandb.init`` would change the configuration of a run whose resume is then refused, or that was finished.
        """
        if self._config:
            self.experiment.config.update(self._config, allow_val_change=True)  # a resumed run may have another
            self._config = {}
        super().log_metrics(metrics, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run: the next one in this process must not be written into it.

        Args:
            status: ``success``; any other marks the run as failed, unless its job returns to SLURM's queue.
        """
        super().finalize(status)
        if announced():
            self.suspend(MOST_SECONDS_BEFORE)
        else:
            self.finish(0 if status == "success" else 1, self._finish_timeout_seconds + SERVICE_SECONDS)

    @rank_zero_only
    def suspend(self, seconds: float) -> None:
        """End the run in this process; W&B shows it as preempted until another process continues it.

        Args:
            seconds: the most seconds that this call may take.
        """
        if self._experiment is not None:
            self._experiment.mark_preempting()
        self.finish(EXIT_SIGTERM, seconds)

    @rank_zero_only
    def finish(self, exit_code: int, timeout_seconds: float) -> None:
        """End the run in limited time, if there is one; what was not uploaded by then stays in the run's folder.

        W&B keeps the limit ``finish_timeout_seconds`` itself, and then has every row on disk. With a shorter one here
        the upload goes on until this process ends, which does not wait for it: W&B's last rows (32 kB) may be lost.

        Args:
            exit_code: 0 unless the run failed.
            timeout_seconds: the most seconds that this call may take.
        """
        run, self._experiment = self._experiment, None
        if run is None:
            return
        self._forget()
        ResilientWandbLogger._running -= 1
        problems: list[Exception] = []

        def end() -> None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:  # whatever happens to W&B must not fail a finished run
                problems.append(error)

        thread = Thread(target=end, daemon=True)
        thread.start()
        # Several students end one after another: only the first waits long for a server that is away.
        thread.join(min(timeout_seconds, SERVICE_SECONDS) if ResilientWandbLogger.unreachable else timeout_seconds)
        if thread.is_alive():
            problems.append(TimeoutError("it is still uploading"))
            if timeout_seconds < self._finish_timeout_seconds:
                leave_service()
        if problems and is_end_of_service(problems[0]):
            self._guard.lose(problems[0])
            if not ResilientWandbLogger._running:
                drop_service()
        elif problems:
            ResilientWandbLogger.unreachable = True
            log.warning(
                "W&B did not get all data (%s): `wandb sync --include-online %s` uploads the run; later runs of this "
                "process log offline",
                *(problems[0], run.settings.sync_dir),
            )


class LateLogger(Callback):
    """Adds a logger to the trainer when the training starts, or when ``fit`` ends without any.

    Lightning starts every logger's run before it reads the checkpoint. If this is then refused, or of a finished run,
    W&B would show as failed, or as run again, what had ended well.

    Args:
        logger: the logger, whose run must not start before there is something to log.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.loggers.append(self._logger)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The summary of a run that was killed after its last checkpoint is still to be logged.
        if self._logger not in trainer.loggers:
            trainer.loggers.append(self._logger)


def build_loggers(
    run_dir: Path,
    name: str,
    wandb: WandbSettings,
    run_id: str | None = None,
    config: dict[str, Any] | None = None,
) -> list[Logger]:
    """Build the loggers of a run; nothing is written or started before the run is set up.

    Args:
        run_dir: folder of the run; ``metrics.csv`` and ``wandb/`` lie in it.
        name: name of the run in W&B.
        wandb: settings of W&B.
        run_id: W&B run id to continue or to start; ``wandb.id`` overrides it.
        config: resolved configuration in plain values, for W&B.
    """
    loggers: list[Logger] = [AppendingCSVLogger(run_dir)]
    if wandb.mode != "disabled":
        loggers.append(_wandb_logger(run_dir, name, wandb, wandb.id or run_id, config or {}))
    return loggers


def _wandb_logger(
    run_dir: Path, name: str, settings: WandbSettings, run_id: str | None, config: dict[str, Any]
) -> WandbLogger:
    # W&B would report its own errors by OpenTelemetry, which fills the log with retries while the server is away.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    mode: str = settings.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        if mode == "offline":
            rank_zero_only(log.info)(
                "W&B logs offline into %s: no key is set (`wandb login`), or WANDB_MODE=offline", run_dir
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    return ResilientWandbLogger(
        settings.finish_timeout_seconds,
        config,
        name=name,
        save_dir=run_dir,
        project=settings.project,
        id=run_id,
        mode=mode,
        entity=settings.entity,
        group=settings.group,
        tags=settings.tags,
        reinit="create_new",  # else a run that is active in this process would be continued
        settings=wandb.Settings(
            init_timeout=settings.init_timeout_seconds,
            finish_timeout=settings.finish_timeout_seconds,
            finish_timeout_raises=True,
        ),
    )


def has_key() -> bool:
    """Whether W&B can log in without a prompt, by a key in the environment, its settings, or netrc."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = wandb.setup().settings
    hosts = [urlsplit(settings.base_url).netloc]
    if "WANDB_BASE_URL" not in os.environ:
        hosts.append("api.wandb.ai")  # where `wandb login` of any version puts the key of the public server
    return bool(settings.api_key) or any(_in_netrc(host) for host in hosts)


def _in_netrc(host: str) -> bool:
    paths = [Path(os.environ.get("NETRC") or "~/.netrc").expanduser(), Path("~/_netrc").expanduser()]
    path = next((path for path in paths if path.is_file()), None)
    try:
        return path is not None and netrc.netrc(path).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False
