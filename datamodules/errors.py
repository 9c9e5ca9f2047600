"""The error that this project raises on purpose."""

import errno

STORAGE_ERRNOS = {
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO", "EKEYEXPIRED", "ENODEV"),
        *("ENXIO", "EMFILE", "ENFILE", "ENOMEM"),
    )
    if hasattr(errno, name)
}
"""Numbers of errors that come from the storage or the machine and may be gone at the next start."""


class InputError(ValueError):
    """A foreseen error: an option, a file or the machine does not meet a requirement.

    The message names the problem and the remedy, so the command line prints it as one line. An unforeseen error keeps
    its traceback there.
    """


def numbered(text: str, number: int | None) -> OSError:
    """Make an error of the system with a number that its text does not begin with."""
    error = OSError(text)
    error.errno = number
    return error


def is_storage_error(error: BaseException) -> bool:
    """Whether the storage or the machine failed, not the file that was asked for."""
    return isinstance(error, OSError) and error.errno in STORAGE_ERRNOS


def is_foreseen(error: BaseException) -> bool:
    """Whether the message is enough without a traceback: our errors, file errors, Lightning's errors of settings."""
    # Lightning's exception is recognised by its name, because importing it would cost every command seconds.
    return isinstance(error, InputError | OSError) or type(error).__name__ == "MisconfigurationException"
