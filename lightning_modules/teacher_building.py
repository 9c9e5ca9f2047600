"""Building a teacher from its class path and arguments."""

import importlib
from typing import Any

from datamodules.errors import InputError
from lightning_modules.teacher import Teacher


def build_teacher(spec: dict[str, Any] | Teacher) -> Teacher:
    """Build a frozen teacher from ``{"class_path": ..., "init_args": {...}}``; a given teacher is frozen and returned.

    Raises:
        InputError: ``class_path`` cannot be imported, is not a :class:`Teacher`, or does not set an attribute.
    """
    if not isinstance(spec, Teacher):
        spec = teacher_class(str(spec.get("class_path")))(**spec.get("init_args") or {})
    for name in ("sample_rate", "num_layers", "hidden_size", "init_args"):
        if not hasattr(spec, name):
            raise InputError(f"{type(spec).__name__} must set self.{name} in its __init__")
    return spec.requires_grad_(False).eval()


def found_at(spec: dict[str, Any], model: str) -> dict[str, Any]:
    """The spec of the same teacher in another place; a revision of the hub belongs to the place before."""
    kept = {name: value for name, value in (spec.get("init_args") or {}).items() if name != "revision"}
    return {**spec, "init_args": {**kept, "model": model}}


def teacher_class(class_path: str) -> type[Teacher]:
    """Import the subclass of :class:`Teacher` at ``class_path``; anything else is an :class:`InputError`."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"teacher class_path {class_path!r} cannot be imported ({error}): give package.module.ClassName"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Teacher)):
        raise InputError(f"teacher class_path {class_path!r} is not a subclass of {Teacher.__module__}.Teacher")
    return found
