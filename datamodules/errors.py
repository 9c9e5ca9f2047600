"""The error that this project raises on purpose."""


class InputError(ValueError):
    """A foreseen error: an option, a file or the machine is not as it must be.

    The message names what is wrong and says what would be right, so the command line prints it as one line. An error
    that nobody foresaw keeps its traceback there.
    """


def is_foreseen(error: BaseException) -> bool:
    """Whether the message alone says enough: ours, those of files, and Lightning's of settings that do not fit."""
    # Lightning's exception is known by its name: to import it would cost every command seconds.
    return isinstance(error, InputError | OSError) or type(error).__name__ == "MisconfigurationException"
