"""Write and read settings as YAML by the same rules, so that every string is read back unchanged.

PyYAML writes by the rules of YAML 1.1, in which ``5e-4`` is a string, and leaves it without quotes. jsonargparse reads
by wider rules, in which it is a number. Importing this module makes jsonargparse write by its own rules.
"""

from typing import Any

import yaml
from jsonargparse import get_loader, set_dumper, set_loader

_load = get_loader("yaml")


def load_settings(text: str) -> Any:
    """Parse YAML text by jsonargparse's rules.

    A single line that YAML reads as only a comment or an anchor is a string: ``--wandb.group '#3'`` is not ``null``.

    Raises:
        yaml.YAMLError: the text is not valid YAML.
    """
    value = _load(text)
    nothing = value is None and "\n" not in text and text.strip().lower() not in ("", "~", "null")
    return text if nothing else value


class _Dumper(yaml.SafeDumper):
    """Puts quotes around strings that Python reads as numbers; PyYAML handles all others."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="'" if _is_number(data) else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def dump_settings(value: Any) -> str:
    """Write plain values as YAML in their order; :func:`load_settings` reads the same values back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


set_dumper("yaml", dump_settings)
set_loader("yaml", load_settings, exceptions=(yaml.YAMLError,))
