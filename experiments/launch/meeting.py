"""How the processes of a run find each other: what ``torchrun`` needs to start them again, and several machines."""

import ipaddress
import logging
import os
import socket

from datamodules.errors import InputError

log = logging.getLogger(__name__)


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


def warn_if_unreachable(num_nodes: int, local_rank: int) -> None:
    """Warn where other machines could not reach this one by the address that gloo chooses, that of its name.

    Lightning uses gloo beside NCCL. On Debian and Ubuntu a machine's own name is often 127.0.1.1 in ``/etc/hosts``.

    Args:
        num_nodes: machines of the run.
        local_rank: rank within this machine; the first one warns.
    """
    if num_nodes < 2 or local_rank or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        address = "127.0.0.1"  # gloo's choice too
    if ipaddress.ip_address(address).is_loopback:
        log.warning(
            "the name of this machine, %s, leads to %s, where the other %d cannot reach it: set GLOO_SOCKET_IFNAME to "
            "its network interface (`ip addr` lists them), unless all processes are on this machine",
            *(name, address, num_nodes - 1),
        )
