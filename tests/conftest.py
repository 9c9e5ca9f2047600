"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real speech (LibriSpeech subsets); tests that need it skip, saying so, where it is absent."""
    folder = Path(os.environ.get("INTERSTACK_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "LibriSpeech").is_dir():
        pytest.skip(f"no real speech at {folder}: set INTERSTACK_DATA to a folder that holds LibriSpeech/")
    return folder
