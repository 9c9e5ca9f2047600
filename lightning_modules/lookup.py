"""Look up a built-in choice by name, or a user's own object by its module path."""

import importlib
from collections.abc import Mapping
from typing import Any

from datamodules.errors import InputError


def find_named(name: str, known: Mapping[str, Any], what: str, own: str) -> Any:
    """Return ``known[name]``, or import the object at the dotted path ``name`` (``my_module.my_function``).

    Args:
        name: a known name, or the dotted path of an object.
        known: the built-in choices by name.
        what: name of the option, for the message.
        own: description of what a dotted path may point to, for the message.

    Raises:
        InputError: the name is neither; the message lists the known names.
    """
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ValueError, ImportError, AttributeError) as error:
        reason, names = f" ({error})" if module else "", ", ".join(sorted(known))
        raise InputError(
            f"unknown {what} {name!r}{reason}: {f'choose one of {names}, or ' if names else ''}give the path of {own}"
        ) from None
