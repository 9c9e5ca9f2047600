"""What ``torchrun`` needs to start ranks again."""

import os

from datamodules.errors import InputError


def refuse_shared_store() -> None:
    """Check that ranks which ``torchrun --max_restarts`` starts again will find each other.

    By default all starts share one store in the launcher's process (seen in torch 2.11). A rank then reads the address
    that another one left there in the start before, and fails to connect, unless the new address comes first. See
    https://github.com/pytorch/pytorch/issues/135712.

    Raises:
        InputError: they may not.
    """
    restarts, ranks = (int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_MAX_RESTARTS", "WORLD_SIZE"))
    if restarts and ranks > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise InputError(
            f"torchrun --max_restarts {restarts}: ranks that are started again may read addresses of the start before "
            "and fail to connect; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, with --standalone or "
            "--rdzv_backend c10d, or leave --max_restarts out"
        )
