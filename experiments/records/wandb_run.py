"""A W&B run that outlives W&B's service, the process to which it hands everything."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class SurvivingRun:
    """A W&B run whose calls do nothing once W&B's service has ended; by themselves they would end the training.

    The service ends when the kernel lacks memory, or when a scheduler signals every process of a job.

    Args:
        run: the W&B run.

    Attributes:
        lost: whether W&B's service has ended.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._run, name)
        if name in ("config", "summary"):
            return _Part(value, self._guarded)
        return self._guarded(value) if callable(value) else value

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.lost:
                return None
            try:
                return call(*args, **kwargs)
            except ConnectionError as error:
                self._lose(error)

        return guarded

    def _lose(self, error: ConnectionError) -> None:
        self.lost = True
        with contextlib.suppress(ConnectionError):
            self._run.finish(exit_code=1)  # nobody hears the status, but the run's threads end
        log.warning(
            "W&B's service has ended (%s): what this run still logs is in metrics.csv only; "
            "`wandb sync --include-online %s` uploads what came before",
            *(error, self._run.settings.sync_dir),
        )


class _Part:
    """Configuration or summary of a run, of which items and ``update`` are set."""

    def __init__(self, part: Any, guard: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._part, self._guard = part, guard

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        return self._guard(value) if callable(value) else value

    def __getitem__(self, key: str) -> Any:
        return self._part[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._guard(self._part.__setitem__)(key, value)


def leave_service() -> None:
    """Let this process end without waiting for W&B's service, which ends soon after it."""
    import wandb

    connection = wandb.setup()._connection
    if connection is not None and connection._cleanup is not None:
        connection._cleanup()  # its hook at exit would wait


def drop_service() -> None:
    """Forget a service that has ended; it would fail later runs of this process, and its hook at the exit."""
    import wandb

    with contextlib.suppress(ConnectionError):
        wandb.teardown()
