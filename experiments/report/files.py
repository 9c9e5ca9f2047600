"""Writing a file so that a reader never sees half of it."""

import os
from pathlib import Path


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Write beside ``path`` under a temporary name, then rename; makes missing folders. Returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
