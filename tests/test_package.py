"""The wheel works outside the clone."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import NEEDS_CLONE, REPOSITORY
from tests.patience import PATIENCE


@NEEDS_CLONE
@pytest.mark.ci
def test_wheel_holds_code_and_data_and_runs_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "source"  # without build/, from which setuptools would pack what is no longer asked for
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=PATIENCE)
    (wheel,) = tmp_path.glob("interstack-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    for needed in (
        "experiments/configs/interleave_equal.yaml",
        "experiments/studies/table1.yaml",
        "experiments/report/page.html",
        "datamodules/grammar.txt",
        *(f"{package}/py.typed" for package in ("lightning_modules", "datamodules", "callbacks", "experiments")),
    ):
        assert needed in names
    assert not [name for name in names if name.startswith("tests/")]
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import experiments.training.fit as t;"
        f"assert t.__file__.startswith({str(site)!r}), t.__file__;"
        "t.DistillationCLI(['fit', '--config', 'interleave_equal', '--data.root', 'x', '--print_config'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    assert "policy: interleaved" in result.stdout
