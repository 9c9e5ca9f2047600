"""Requests to stop a run: recorded when they arrive, and agreed on by all ranks without waiting for a device.

Lightning's own handlers (2.6.6, ``signal_connector.py``) act at whatever point the program has reached. The handler of
SIGTERM calls a collective, a deadlock when only one rank gets the signal, and training stops after any micro-batch.
SLURM's saves in the middle of an accumulation window or even of an optimizer step.
"""

import signal
import threading
from types import FrameType

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import Tensor

from callbacks.requeue import stop_listening

SHOULD_STOP, TERMINATE, REQUEUE = 1, 2, 3
REASONS = {
    SHOULD_STOP: "by trainer.max_time (which counts the time of all attempts) or by a callback",
    TERMINATE: "by a signal",
    REQUEUE: "by SLURM's signal",
}


class StopSignals:
    """The strongest request of this rank, and of all ranks.

    Requests are SIGTERM and SLURM's requeue signal, whose handlers replace Lightning's until ``fit`` ends; then
    Lightning restores the handlers from before. ``trainer.should_stop``, which ``max_time`` and callbacks set, is
    another. Lightning would end the epoch at once, after any micro-batch, as if it were complete.

    Every rank must ask for the agreement at the same points, which are outside the backward pass, so that its
    all-reduce cannot interleave with DDP's own.

    Attributes:
        received: the strongest request of this rank; 0 if there is none.
        requeues: whether the run returns its own job to SLURM's queue.
    """

    def __init__(self) -> None:
        self.received = 0
        self.requeues = False
        self._listens = False
        self._under_way: _Reduction | None = None

    def listen(self, trainer: L.Trainer) -> None:
        """Start to record signals, unless this run does so already.

        Outside the main thread, where Python allows no handlers, none is recorded.
        """
        if self._listens or threading.current_thread() is not threading.main_thread():
            return
        self.received = TERMINATE if trainer.received_sigterm else 0
        environment = trainer._accelerator_connector.cluster_environment
        stop_listening()
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            self.requeues = True
            signal.signal(environment.requeue_signal, self._note_requeue)
        signal.signal(signal.SIGTERM, self._note_sigterm)
        self._listens = True

    def give_back(self, trainer: L.Trainer) -> None:
        """Let Lightning broadcast again after an earlier ``fit`` of this trainer: until ``listen`` its handlers act."""
        vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)

    def take_over(self, trainer: L.Trainer) -> None:
        """Record ``trainer.should_stop`` and reset it; before ``min_epochs`` or ``min_steps`` it is left as it is."""
        if trainer.should_stop and trainer.fit_loop._can_stop_early:
            trainer.should_stop = False
            self.received = max(self.received, SHOULD_STOP)

    def _note_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self.received = max(self.received, TERMINATE)

    def _note_requeue(self, signum: int, frame: FrameType | None) -> None:
        self.received = REQUEUE

    def agreed(self, trainer: L.Trainer) -> int:
        """The strongest request of any rank until now. The host waits for the device."""
        self._under_way = None
        return self.received if trainer.world_size == 1 else _Reduction(trainer, self.received).result()

    def agreed_before(self, trainer: L.Trainer) -> int:
        """The strongest request of any rank at the last call, 0 in the first; with one rank, the request until now.

        Each call starts an all-reduce of 4 bytes and reads that of the last call. So the host is up to one optimizer
        step ahead of its device, which never runs out of work. Lightning's loop would wait for the device before each
        micro-batch, to tell all ranks whether rank zero has got SIGTERM. From the first step on this is left out, since
        its handler is replaced.
        """
        if trainer.world_size == 1:
            return self.received
        if self._listens:
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        before, self._under_way = self._under_way, _Reduction(trainer, self.received)
        return 0 if before is None else before.result()


class _Reduction:
    """The largest of all ranks' numbers. A GPU computes it while the host goes on."""

    def __init__(self, trainer: L.Trainer, own: int) -> None:
        device = trainer.strategy.root_device
        on_cuda = device.type == "cuda"
        number = torch.tensor(own, dtype=torch.int32, pin_memory=on_cuda).to(device, non_blocking=on_cuda)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        self._number: Tensor = number.to("cpu", non_blocking=on_cuda)
        self._copied = torch.cuda.current_stream(device).record_event() if on_cuda else None

    def result(self) -> int:
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._number)


def _nothing() -> None:
    """Replaces Lightning's broadcast."""


def signals_of(trainer: L.Trainer) -> StopSignals | None:
    """The signals that a callback of this trainer records, if one does."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    recorded = (getattr(callback, "signals", None) for callback in callbacks)
    return next((one for one in recorded if isinstance(one, StopSignals)), None)
