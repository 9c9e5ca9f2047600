"""Derive accumulation steps from the number of utterances that one device holds; the global batch is unchanged."""

from datamodules.errors import InputError

GB_PER_AUDIO_SECOND = {"bf16-mixed": 0.0595, "32-true": 0.0895}
"""Memory of a step of the paper's sizes at full depth, by the trainer's precision (teacher in bf16 or float32).

Measured on a CPU by `interstack bench --depths "[12]"` at 2 x 5 s and 6 x 5 s; not on a GPU.
"""
FIXED_GB = 2.0
"""Memory of weights of teacher and student, gradients and AdamW's moments (1 GB together), and of CUDA itself."""
USABLE = 0.9
"""Share of a GPU's memory to plan with: lengths vary, and the allocator leaves gaps."""


def utterances_that_fit(memory_gb: float, seconds: float, precision: str) -> int:
    """Number of utterances of ``seconds`` that a GPU of ``memory_gb`` (10^9 bytes) holds at once, at least one."""
    each = GB_PER_AUDIO_SECOND.get(precision, GB_PER_AUDIO_SECOND["32-true"]) * seconds
    return max(1, int((USABLE * memory_gb - FIXED_GB) / each))


def accumulation_steps(
    batch_size: int | None,
    num_devices: int,
    max_batch_per_device: int,
    given: int = 1,
    limit: int | float | None = None,
) -> int:
    """Compute the fewest micro-batches per optimizer step with which no device holds too many utterances at once.

    Args:
        batch_size: utterances per optimizer step over all devices; ``None`` if batches are not measured in utterances.
        num_devices: number of devices over all nodes.
        max_batch_per_device: utterances that one device holds at once.
        given: the user's ``trainer.accumulate_grad_batches``; its default is 1.
        limit: the user's ``trainer.limit_train_batches``.

    Raises:
        InputError: batches are not measured in utterances, or accumulation is given as well, or the epoch is limited in
            micro-batches, which would make its optimizer steps depend on the number of devices.
    """
    if batch_size is None:
        raise InputError(
            f"max_batch_per_device={max_batch_per_device} counts utterances, but data.batch_size is not set: set "
            "trainer.accumulate_grad_batches instead"
        )
    if given != 1:
        raise InputError(
            f"max_batch_per_device={max_batch_per_device} derives trainer.accumulate_grad_batches, which is also "
            f"given ({given}): leave one of them out"
        )
    if isinstance(limit, int) or (limit is not None and limit < 1):
        raise InputError(
            f"trainer.limit_train_batches={limit} counts micro-batches; with "
            f"max_batch_per_device={max_batch_per_device} their number per optimizer step depends on the number of "
            "devices: set data.batches_per_epoch, which counts optimizer steps"
        )
    return -(-batch_size // (num_devices * max_batch_per_device))
