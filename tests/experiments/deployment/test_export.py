"""``interstack export``: what it says, and which options it refuses."""

import logging
from pathlib import Path

import pytest

from experiments.cli import run
from tests.lightning_modules.test_export import checkpoint_of, save, tiny_hubert


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path, checkpoint_of(tiny_hubert(3)))


def test_says_what_it_wrote(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "student")]
    with caplog.at_level(logging.INFO, logger="experiments.deployment.export"):
        run(arguments)
        run([*arguments, "--layers", "2", "--dtype", "float16", "--overwrite"])
    for layers in (3, 2):
        count = tiny_hubert(layers).num_parameters()
        assert f"exported {layers} layers, {count} parameters to {tmp_path / 'student'}" in caplog.text


@pytest.mark.slow  # test_export_head.py has this command, test_onnx_export.py the file
def test_says_what_an_onnx_file_is(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "student"), "--format", "onnx"]
    with caplog.at_level(logging.INFO, logger="experiments.deployment.export"):
        run([*arguments, "--layers", "1"])
    assert {file.name for file in (tmp_path / "student").iterdir()} == {"README.md", "interstack.json", "model.onnx"}
    assert f"exported 1 layers, {tiny_hubert(1).num_parameters()} parameters" in caplog.text
    assert "MB in float32; on noise a relative error of " in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onnx", "--dtype", "float16"], "--dtype float16 is for --format huggingface"),
        (["--states", "all", "--quantize", "int8"], "--states, --quantize: only for --format onnx"),
        (["--opset", "18"], "--opset: only for --format onnx"),
        (["--format", "onnx", "--opset", "17"], "opset=17: choose from 18"),
        (["--layers", "4"], "layers=4, but the encoder has 3"),
    ],
)
def test_refusals(options: list[str], message: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "student"), *options])
    assert list(tmp_path.iterdir()) == [checkpoint]
