"""W&B's service, the process to which a run hands everything: what happens when it ends before the run does."""

import contextlib
import logging
from typing import Any

log = logging.getLogger(__name__)


def is_end_of_service(error: BaseException) -> bool:
    """Whether W&B raises this because its service has ended: at what is sent, or while an answer is awaited."""
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return isinstance(error, ConnectionError | HandleAbandonedError | MailboxClosedError)


class ServiceGuard:
    """Lets a run go on without W&B's service: all that it sends afterwards is dropped, with one warning.

    The service ends when the kernel lacks memory, or when a scheduler signals every process of a job. By itself W&B
    then raises at the next logged row, and so ends the training.

    Args:
        run: the W&B run.
    """

    def __init__(self, run: Any) -> None:
        self._run, self._lost = run, False
        # Rows, configuration, summary, metrics' definitions and the console's lines. A disabled run sends nothing, and
        # another version of W&B may send by another name: then its runs are as W&B makes them.
        interface = getattr(run, "_interface", None)
        send = getattr(interface, "_publish", None)
        if interface is None or send is None:
            return

        def guarded(*args: Any, **kwargs: Any) -> None:
            if self._lost:
                return
            try:
                send(*args, **kwargs)
            except ConnectionError as error:
                self.lose(error)

        interface._publish = guarded

    def lose(self, error: BaseException) -> None:
        """Note that the service has ended, and warn once."""
        if not self._lost:
            log.warning(
                "W&B's service has ended (%s): what this run still logs is in metrics.csv only; "
                "`wandb sync --include-online %s` uploads what came before",
                *(str(error) or type(error).__name__, self._run.settings.sync_dir),
            )
        self._lost = True


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
