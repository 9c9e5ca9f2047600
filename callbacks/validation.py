"""When Lightning validates within an epoch, by ``trainer.val_check_interval``."""

import lightning as L

from datamodules.errors import InputError


def require_same_clock(trainer: L.Trainer) -> None:
    """Refuse an interval of time between validations with several ranks.

    Each rank looks at a clock of its own (Lightning 2.6.6), so one could validate while another goes on, and both wait
    for each other for ever.

    Raises:
        InputError: ``trainer.val_check_interval`` is a time, and there are several ranks.
    """
    if trainer.world_size > 1 and trainer._val_check_time_interval is not None:  # type: ignore[attr-defined]
        raise InputError(
            "--trainer.val_check_interval is a time, which each of the "
            f"{trainer.world_size} processes takes from a clock of its own: give a number of batches, or a share of an "
            "epoch"
        )


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether Lightning will validate after this batch of training by an interval in batches."""
    loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
    if every is None or every == float("inf") or not loop._should_check_val_epoch() or loop.val_loop.skip:
        return False
    return _counted_batches(trainer) % every == 0


def validate_after_this_batch(trainer: L.Trainer) -> None:
    """Let Lightning validate after this batch of training, the last one of an epoch, whatever the interval is."""
    if trainer.check_val_every_n_epoch is not None:
        trainer.check_val_every_n_epoch = 1
    if trainer.val_check_batch != float("inf"):  # where Lightning validates at the end of the epoch anyway
        trainer.val_check_batch = _counted_batches(trainer)
        trainer._val_check_time_interval = None  # type: ignore[attr-defined]


def _counted_batches(trainer: L.Trainer) -> int:
    """Batches up to this one, of the epoch or of the run, that the interval counts."""
    loop = trainer.fit_loop.epoch_loop
    return 1 + (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx)
