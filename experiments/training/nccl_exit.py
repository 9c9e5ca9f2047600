"""End a process after an error, where others may still wait for it over NCCL.

Lightning destroys the process group when the interpreter exits. With NCCL that waits for collectives that the other
processes have begun. A process that failed alone would stay, and neither torchrun, srun nor Lightning's launcher would
see that it failed before NCCL's timeout, half an hour later.
"""

import atexit
import os
import signal
import sys
from typing import Any, NoReturn

import torch.distributed
from lightning.fabric.utilities.distributed import _destroy_dist_connection


def others_may_wait() -> bool:
    """Whether this process is one of several that are joined by NCCL."""
    group = torch.distributed
    joined = group.is_available() and group.is_initialized() and group.get_world_size() > 1
    return joined and "nccl" in str(group.get_backend())


def end_others(trainer: Any) -> None:
    """Kill the processes that this one has launched, if they may wait for it: nobody else watches over them."""
    if others_may_wait():
        for process in getattr(trainer.strategy.launcher, "procs", []):
            process.send_signal(signal.SIGKILL)


def exit_without_waiting(status: int) -> NoReturn:
    """Do all that is left to do at the exit, such as the end of the W&B run, but for the process group, and exit."""
    atexit.unregister(_destroy_dist_connection)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
