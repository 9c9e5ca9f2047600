"""The process of one encoder: what it computes, and what it replies."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

from datamodules.errors import InputError
from experiments.deployment import worker
from experiments.deployment.worker import OnnxEncoder, TorchEncoder, noise, run
from lightning_modules.superb.upstream import load_upstream
from lightning_modules.teacher import Teacher, TeacherTargets
from tests.conftest import REPOSITORY
from tests.experiments.deployment.tiny_onnx import save_onnx
from tests.helpers import save_teacher, save_whisper

QUANTISATION = "ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"


@pytest.fixture(scope="module", params=["hubert", "whisper"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / request.param
    return save_teacher(folder) if request.param == "hubert" else save_whisper(folder)


def expected(folder: Path, batch: int) -> np.ndarray:
    """The last hidden state of the same noise, as a probe reads it."""
    return load_upstream(str(folder))(list(torch.from_numpy(noise(batch, 0.5))))[-1].numpy()


def test_float32_is_the_last_state_of_the_upstream(encoder: Path) -> None:
    found = TorchEncoder(str(encoder), "float32", 1)
    np.testing.assert_allclose(found(noise(2, 0.5)), expected(encoder, 2), atol=1e-5)
    assert np.abs(found(2 * noise(2, 0.5)) - expected(encoder, 2)).max() > 1e-3  # control: another input
    assert found.parameters == sum(each.numel() for each in load_upstream(str(encoder)).parameters())


@pytest.mark.filterwarnings(QUANTISATION)
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_lower_precision_is_near_and_smaller(encoder: Path, precision: str) -> None:
    exact, found = TorchEncoder(str(encoder), "float32", 1), TorchEncoder(str(encoder), precision, 1)
    output_BFD, wanted_BFD = found(noise(2, 0.5)), expected(encoder, 2)
    assert output_BFD.dtype == np.float32
    assert 1e-4 < np.linalg.norm(output_BFD - wanted_BFD) / np.linalg.norm(wanted_BFD) < 0.1
    if precision == "bfloat16":  # of such a small encoder int8 saves less than its scales take
        weights = [each.dtype for each in found.teacher.parameters()]
        assert set(weights) == {torch.bfloat16}
        assert found.weights_bytes() < 0.8 * exact.weights_bytes()
    else:
        kinds = {type(each).__module__ for each in found.teacher.modules()}
        assert any("quantized.dynamic" in kind for kind in kinds)


def test_int8_of_wavlm_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    WavLMModel(WavLMConfig(**sizes, conv_dim=(8,) * 7, num_conv_pos_embedding_groups=2)).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    assert TorchEncoder(str(tmp_path), "bfloat16", 1).parameters
    with pytest.raises(InputError, match="torch cannot quantise WavLM"):
        TorchEncoder(str(tmp_path), "int8", 1)


def test_weights_are_as_large_as_their_file(encoder: Path, tmp_path: Path) -> None:
    found = TorchEncoder(str(encoder), "float32", 1)
    torch.save(found.teacher.state_dict(), tmp_path / "weights.pt")
    assert found.weights_bytes() == pytest.approx((tmp_path / "weights.pt").stat().st_size, rel=0.02)  # names in it


class Quiet(Teacher):
    """A teacher of one hidden state, which is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.sample_rate, self.num_layers, self.hidden_size, self.init_args = 16000, 1, 4, {}

    def num_frames(self, num_samples_B: torch.Tensor) -> torch.Tensor:
        return num_samples_B // 320

    def forward(self, waveforms_BT: torch.Tensor, num_samples_B: torch.Tensor | None = None) -> TeacherTargets:
        return TeacherTargets(torch.zeros(len(waveforms_BT), waveforms_BT.shape[1] // 320, 4), {})


def test_own_teacher_is_measured_in_float32_only() -> None:
    path = f"{__name__}.Quiet"
    assert TorchEncoder(path, "float32", 1)(noise(1, 0.5)).shape == (1, 25, 4)
    with pytest.raises(InputError, match="Quiet can be measured in float32 only: leave out int8"):
        TorchEncoder(path, "int8", 1)


@pytest.mark.parametrize("output", ["last_hidden_state", "hidden_states"])
def test_onnx(output: str, tmp_path: Path) -> None:
    found = OnnxEncoder(str(save_onnx(tmp_path / "a", output=output)), "float32", 1)
    assert found(noise(3, 0.5)).shape == (3, 24, 8)
    assert found.computes == ("last hidden state" if output == "last_hidden_state" else "all hidden states")
    assert found.weights_bytes() == (tmp_path / "a" / "model.onnx").stat().st_size


def test_onnx_files_that_are_refused(tmp_path: Path) -> None:
    other = save_onnx(tmp_path / "other", output="logits")
    with pytest.raises(InputError, match="outputs logits, num_frames: the inputs must be waveforms and num_samples"):
        OnnxEncoder(str(other), "float32", 1)
    (other / "model.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"model\.onnx is no ONNX file that onnxruntime can read"):
        OnnxEncoder(str(other), "float32", 1)


def test_a_run_is_repeated_until_its_time_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: len(seen) / 16))
    reply = run(lambda waveforms_BT: seen.append(waveforms_BT.shape), 2, 0.5)
    assert worker.LEAST_SECONDS == 0.2
    assert seen == 4 * [(2, 8000)]
    assert reply["laps"] == 4 * [1 / 16]
    assert 1.01 * reply["peak_mb"] > reply["now_mb"] > 0  # the kernel counts them one after the other


def talk(specification: dict[str, Any], *requests: dict[str, Any]) -> list[dict[str, Any]]:
    result = subprocess.run(
        [sys.executable, "-m", "experiments.deployment.worker", json.dumps(specification)],
        input="".join(f"{json.dumps(each)}\n" for each in requests),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_replies_of_a_process(tmp_path: Path) -> None:
    folder = save_onnx(tmp_path / "a")
    specification = {
        "path": str(folder), "format": "ONNX", "precision": "float32", "threads": 1, "seconds": 0.5,
        "output": str(tmp_path / "output.npy"), "spawned": 0.0,
    }  # fmt: skip
    first, laps, size = talk(specification, {"batch": 2, "seconds": 1.0}, {})
    times = first["start"]
    assert sum(times[part] for part in ("interpreter", "imports", "load", "first_run")) == pytest.approx(times["total"])
    assert laps["peak_mb"] > first["libraries_mb"] > 0
    assert laps["peak_mb"] < 250  # torch is not imported: it alone takes more
    assert size == {"weights_bytes": (folder / "model.onnx").stat().st_size}
    assert np.load(tmp_path / "output.npy").shape == (1, 24, 8)
    (broken,) = talk(specification | {"path": str(tmp_path)})
    assert broken["foreseen"]
    assert "no ONNX file" in broken["error"]
