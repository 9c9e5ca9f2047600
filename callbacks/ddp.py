"""Access to Lightning's strategy: inputs of DDP, unwrapping a model from it, wrapping it again, comparing ranks.

It was checked against Lightning 2.6 (``DDPStrategy.configure_ddp`` and ``_setup_model``, ``Strategy.model``);
``tests/callbacks/test_ddp.py`` fails if either changes. No other code uses the strategy.
"""

import errno
import hashlib
from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.errors import InputError, numbered

CHECKED_AGAINST = "2.6."


def require_lightning(version: str = L.__version__) -> None:
    """Refuse a version of Lightning for which the internals that the callbacks rely on were not checked.

    Raises:
        InputError: the version is not 2.6.
    """
    if not version.startswith(CHECKED_AGAINST):
        raise InputError(
            f"lightning {version} is installed, but growth, resume and checkpoints rely on internals of "
            f"{CHECKED_AGAINST}x: pip install 'lightning>=2.6,!=2.6.2,!=2.6.3,<2.7'"
        )


def require_supported(trainer: L.Trainer) -> None:
    """Refuse versions of Lightning and strategies under which a model cannot grow in mid-run."""
    require_lightning()
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
        raise InputError(
            f"StackingCallback cannot grow a model under {type(strategy).__name__}: use a single device or "
            "trainer.strategy=ddp (a student of 27M parameters needs no sharding)"
        )
    if getattr(strategy, "_ddp_comm_state", None) is not None:
        raise InputError(
            "ddp_comm_state holds tensors of the gradients' buckets, which a growth changes: leave it out, or use a "
            "hook without a state, such as bf16_compress_hook"
        )
    kwargs = getattr(strategy, "_ddp_kwargs", {})
    if kwargs.get("static_graph"):
        raise InputError("static_graph=True cannot follow a growing model: use trainer.strategy=ddp")
    if kwargs.get("find_unused_parameters"):
        raise InputError(
            "find_unused_parameters=True would hide a layer that a growth left without gradients, at a cost in every "
            "step: use trainer.strategy=ddp"
        )


def leave_inputs(trainer: L.Trainer) -> None:
    """Let DDP leave the inputs of a step where the data module put them; call it before the model is wrapped.

    Told its device, DDP moves all tensors to it, also the lengths that the step reads on the host, and each read waits
    for the GPU. Lightning then also builds it on a stream of its own, of which torch 2.11 warns in every backward.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.determine_ddp_device_ids = lambda: None  # type: ignore[method-assign]


def unwrap(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Drop the DDP wrapper, and with it its reducer and its hooks on the parameters."""
    trainer.strategy.model = module


def rewrap(trainer: L.Trainer) -> None:
    """Wrap the grown model again, so that the gradients of the new parameters are reduced over the ranks too.

    Without this the weights of the ranks would diverge without an error or a warning.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.configure_ddp()


def checksum(module: nn.Module, optimizer: Optimizer) -> Tensor:
    """SHA-256 of all parameters, buffers and optimizer state, as 4 int64 numbers."""
    digest = hashlib.sha256()
    for tensor in _tensors(module, optimizer):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64)


def _tensors(module: nn.Module, optimizer: Optimizer) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            yield from (state[key] for key in sorted(state) if torch.is_tensor(state[key]))


def verify_ranks(trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
    """Stop the run unless all ranks have bit-identical parameters and optimizer state (one all-gather)."""
    if trainer.world_size == 1:
        return
    own = checksum(module, optimizer).to(trainer.strategy.root_device)
    gathered = trainer.strategy.all_gather(own)
    differing = [rank for rank in range(trainer.world_size) if not torch.equal(gathered[rank], gathered[0])]
    if differing:
        raise InputError(
            f"after the growth at epoch {trainer.current_epoch} ranks {differing} hold other parameters or optimizer "
            "state than rank 0: stop, and resume from a checkpoint made before it"
        )


def require_same_step(trainer: L.Trainer, step: int) -> None:
    """Stop the run unless all ranks have read a checkpoint of the same optimizer step (one all-gather).

    Each rank reads its own. DDP makes weights alike, but not the optimizer's state. On storage over a network a machine
    may not see the newest checkpoint at once.

    Args:
        trainer: trainer whose processes are joined.
        step: optimizer steps of the checkpoint that this rank has read; 0 without one.

    Raises:
        OSError: the steps differ; its number is that of a stale file.
    """
    if trainer.world_size == 1:
        return
    gathered = trainer.strategy.all_gather(torch.tensor(step, device=trainer.strategy.root_device))
    steps = sorted({int(found) for found in gathered})
    if len(steps) > 1:
        text = (
            f"ranks go on from checkpoints of different steps ({', '.join(map(str, steps))}): the run's folder must be "
            "the same on all machines. If it is, start the command again: one did not see the newest checkpoint yet"
        )
        raise numbered(text, errno.ESTALE)  # an error of storage, after which a job's script starts again
