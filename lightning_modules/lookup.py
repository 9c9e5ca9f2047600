"""Choosing one of several by name: what ships, or a user's own by module path."""

import importlib
from collections.abc import Mapping
from typing import Any

from datamodules.errors import InputError


def find_named(name: str, known: Mapping[str, Any], what: str, own: str) -> Any:
    """``known[name]``, or what the dotted path ``name`` (``my_module.my_function``) leads to.

    Args:
        name: as typed.
        known: what ships.
        what: the option, for the message.
        own: what a path may lead to, for the message.

    Raises:
        ValueError: there is neither; the message lists those that there are.
    """
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ValueError, ImportError, AttributeError) as error:
        reason = f" ({error})" if module else ""
        raise InputError(
            f"unknown {what} {name!r}{reason}: choose one of {', '.join(sorted(known))}, or give the path of {own}"
        ) from None
