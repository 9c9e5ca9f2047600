"""Requests to stop: those since the ranks agreed, and what is taken from Lightning and given back."""

from pathlib import Path

import pytest

from callbacks.checkpointing import RunCheckpoint
from callbacks.stop_signals import REQUEUE, TERMINATE, StopSignals
from tests.helpers import make_trainer
from tests.slurm_task import pretend_task


@pytest.mark.parametrize("since", [0, REQUEUE])
def test_a_signal_since_the_ranks_agreed_counts(since: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend_task(tmp_path, monkeypatch)
    checkpoints = RunCheckpoint()
    checkpoints.signals.received = since
    checkpoints._leave(make_trainer(tmp_path), TERMINATE)
    assert asked.exists() == (since == REQUEUE)


def test_a_second_fit_of_a_trainer_begins_with_lightnings_broadcast(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    loop = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    StopSignals().give_back(trainer)
    assert loop._broadcast_sigterm_tensor.__func__ is type(loop)._broadcast_sigterm_tensor
