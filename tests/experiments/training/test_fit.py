"""What the command line of training refuses before anything is loaded, and what it takes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.cli import run
from experiments.training.fit import DistillationCLI, default_precision
from tests.helpers import save_corpus, save_teacher
from tests.tiny_run import TINY


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "no --ckpt_path is given"),
        (["--ckpt_path", "last"], "there is no checkpoint in .*/runs/run yet"),
        (["--ckpt_path", "none.ckpt"], "--ckpt_path none.ckpt is not a file"),
    ],
)
def test_validate_wants_a_trained_student(more: list[str], message: str, tmp_path: Path) -> None:
    arguments = ["validate", "--data.root", str(tmp_path), "--runs_dir", str(tmp_path / "runs"), *more]
    with pytest.raises(ValueError, match=f"{message}: give a trained student's checkpoint"):
        run(arguments)


@pytest.mark.ci
def test_validate_measures_what_fit_has_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_corpus(tmp_path / "corpus", {"train": 12, "dev": 4})
    arguments = [*TINY, "--data.root", str(tmp_path / "corpus"), "--data.cache_dir", str(tmp_path / "cache")]
    arguments += ["--model.teacher.init_args.model", str(save_teacher(tmp_path / "teacher"))]
    arguments += ["--runs_dir", str(tmp_path / "runs"), "--ckpt_path", "last"]
    trained, measured = (
        float(DistillationCLI([command, *arguments]).trainer.callback_metrics["val/loss"])
        for command in ("fit", "validate")
    )
    assert measured == pytest.approx(trained, abs=1e-6)
    printed = capsys.readouterr().out
    assert f"val/loss {measured:.6g}\n" in printed
    assert "val/output " in printed


@pytest.mark.parametrize(
    ("accelerator", "bf16", "plugin", "expected"),
    [
        ("auto", "computed", None, "bf16-mixed"),
        ("cuda", "computed", None, "bf16-mixed"),
        ("cpu", "computed", None, "32-true"),
        ("auto", "emulated", None, "32-true"),
        ("auto", "computed", "lightning.pytorch.plugins.MixedPrecision", None),
        ("auto", "computed", "lightning.pytorch.plugins.TorchSyncBatchNorm", "bf16-mixed"),
    ],
)
def test_default_precision(
    accelerator: str, bf16: str, plugin: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def is_supported(including_emulation: bool = True) -> bool:
        return bf16 == "computed" or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    plugins = [SimpleNamespace(class_path=plugin)] if plugin else None
    assert default_precision(SimpleNamespace(accelerator=accelerator, plugins=plugins)) == expected
