"""``interstack bench profile``: parts add up, kernels have a kind, rows are kept; all of it on a CPU."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments.bench import profile
from experiments.bench.profile import KINDS, TIMED, bench_profile, by_kind, host_bound_below, text
from experiments.cli import run
from lightning_modules.student_config import StudentConfig
from tests.helpers import save_teacher


def test_a_profile_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, output = save_teacher(tmp_path / "teacher", layers=3), tmp_path / "profile.json"
    common = ["--teacher", str(teacher), "--student", json.dumps(asdict(StudentConfig(16, 24, 2)))]
    common += ["--accelerator", "cpu", "--batch_size", "2", "--seconds", "0.3", "--depth", "3", "--rounds", "1"]
    common += ["--output", str(output)]
    run(["bench", "profile", "--precision", "32-true", *common])
    (row,) = json.loads(output.read_text())
    assert sum(row[part] for part in TIMED) == pytest.approx(row["step_ms"])  # exact for a single step
    assert {"conv", "gemm", "gelu", "optimizer"} <= set(row["kinds"])
    assert row["kernels"] == sum(sums["calls"] for sums in row["kinds"].values()) > 100
    assert row["kernel_ms"] == pytest.approx(sum(sums["ms"] for sums in row["kinds"].values()))
    assert (row["mfu"] > 0, row["memory_gb"]) == (True, None)
    assert "audio seconds per second" in capsys.readouterr().out
    assert " ms " in (tmp_path / "profile_2x0.3_32-true_depth3_trained_eager.txt").read_text()
    monkeypatch.setattr(profile, "matmul_peak", lambda *_: 1e9)  # measured above; bf16 takes seconds on many CPUs
    run(["bench", "profile", "--precision", "bf16-mixed", *common])
    assert [row["precision"] for row in json.loads(output.read_text())] == ["32-true", "bf16-mixed"]
    run(["bench", "profile", "--precision", "32-true", "--cached", "features", "--front_end", "frozen", *common])
    cached = json.loads(output.read_text())[-1]
    assert cached["gflop_per_audio_s"] < row["gflop_per_audio_s"]
    assert "fourier" in cached["kinds"], "the positional convolution"
    assert "conv" not in cached["kinds"], "no other is left"
    monkeypatch.setattr(profile, "measure", None)  # a row that is there is not measured again
    run(["bench", "profile", "--precision", "32-true", *common])
    assert "conv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "conv"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized>", "conv"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16>", "layout"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("void at::native::RowwiseMomentsCUDAKernel<float>", "group norm"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor>", "optimizer"),
        ("triton_poi_fused_gelu_0", "triton"),
        ("triton_poi_fused_convolution_gelu_3", "triton"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_2", "triton"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "gelu"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copy/cast"),
        ("Memcpy HtoD (Pinned -> Device)", "copy/cast"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("something new", "other"),
    ],
)
def test_kernels_have_kinds(name: str, kind: str) -> None:
    assert by_kind({name: (2.0, 3)}) == {kind: {"ms": 2.0, "calls": 3}}


def test_every_kind_is_named_once() -> None:
    assert len({kind for kind, _ in KINDS}) == len(KINDS)


def row_of(**changes: Any) -> dict[str, Any]:
    plain = {"hardware": "1 x GPU", "batch_size": 16, "seconds": 15.0, "host_submit_ms": 100.0, "kernel_ms": 200.0}
    return plain | changes


def test_the_host_is_the_bound_where_kernels_need_less_time_than_it() -> None:
    assert host_bound_below(row_of()) == 120
    assert host_bound_below(row_of(kernel_ms=400.0)) == 60
    assert host_bound_below(row_of(hardware="x86_64 CPU, 1 threads of 2 cores")) is None


def test_the_bound_is_printed() -> None:
    row = row_of(**dict.fromkeys([*TIMED, "step_ms", "spread_ms", "first_step_s", "audio_s_per_s"], 1.0))
    row |= dict.fromkeys(["gflop_per_audio_s", "mfu", "matmul_peak_gflops", "memory_gb", "kernels", "depth"], 1)
    row |= dict.fromkeys(["precision", "front_end", "cached", "torch", "float32", "commit"], "x") | {
        "compile": True,
        "kinds": {},
    }
    assert "the host is the bound below 120 audio seconds per step" in text(row)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        bench_profile(rounds=0)
