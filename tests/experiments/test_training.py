"""What the command line of training refuses before anything is loaded."""

from pathlib import Path

import pytest
import torch

from experiments.training import DistillationCLI


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
@pytest.mark.parametrize("precision", ["16-mixed", "16"])
def test_half_precision_on_a_cpu_is_refused(
    accelerator: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = ["fit", "--data.root", str(tmp_path), "--runs_dir", str(tmp_path / "runs")]
    arguments += ["--trainer.accelerator", accelerator, "--trainer.precision", precision]
    with pytest.raises(ValueError, match=f"trainer.precision={precision} needs a GPU, and this run is on a CPU"):
        DistillationCLI(arguments)
    assert not (tmp_path / "runs").exists()
