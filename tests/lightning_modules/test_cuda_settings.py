"""CUDA's process-wide switches; they can be set and read without a GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_modules.precision import CudaSettings, float32_mode
from tests.helpers import make_module, save_teacher

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before[:2]
    torch.backends.cuda.enable_cudnn_sdp(before[2])


def test_one_switch_sets_products_and_convolutions() -> None:
    assert float32_mode() == "ieee in matrix products, tf32 in convolutions"  # torch's own default
    for mode in ("tf32", "ieee"):
        CudaSettings(float32=mode).apply(CUDA)
        assert float32_mode() == mode
        # Lightning and inductor ask this way; after torch's newer switches it is an error.
        assert torch.get_float32_matmul_precision() == {"tf32": "high", "ieee": "highest"}[mode]


def test_cudnns_attention_is_left_out_unless_asked_for() -> None:
    for attention, enabled in (("cudnn", True), ("flash", False)):
        CudaSettings(attention=attention).apply(CUDA)
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled


def test_a_cpu_leaves_them_alone() -> None:
    before = float32_mode(), torch.backends.cuda.cudnn_sdp_enabled()
    CudaSettings("ieee", "flash").apply(torch.device("cpu"))
    assert (float32_mode(), torch.backends.cuda.cudnn_sdp_enabled()) == before


def test_a_module_applies_its_settings_when_a_fit_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(save_teacher(tmp_path))
    assert module.hparams["cuda"] == {"float32": "tf32", "attention": "flash"}
    applied = []
    monkeypatch.setattr(CudaSettings, "apply", lambda self, device: applied.append((self, device.type)))
    module.on_fit_start()
    module.on_validation_start()
    assert applied == [(CudaSettings(), "cpu")] * 2
