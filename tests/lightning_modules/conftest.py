"""Fixtures that several files share."""

from pathlib import Path

import pytest

from tests.lightning_modules.teachers import FAMILIES, save_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, config()) for name, config in FAMILIES.items()}
