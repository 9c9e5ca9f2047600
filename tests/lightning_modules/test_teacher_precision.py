"""A teacher in bf16: its targets, the check that it is safe, and how the run says what it used."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks.summary import RunSummary
from lightning_modules import precision
from lightning_modules.precision import BF16_TOLERANCE, relative_error
from lightning_modules.teacher import HuggingFaceTeacher, TeacherTargets
from tests.helpers import make_data, make_module, make_trainer, save_corpus, save_teacher
from tests.lightning_modules.teachers import FAMILIES, PADDED, padded_waveforms, save_model, waveforms

CPU = torch.device("cpu")


def prepared(folder: Path, asked: str, **config: Any) -> HuggingFaceTeacher:
    made = HuggingFaceTeacher(str(folder), precision=asked)  # type: ignore[arg-type]
    made.select_layers([1, 3], None)
    made.prepare(CPU)
    return made


def errors(targets: TeacherTargets, reference: TeacherTargets) -> list[float]:
    exact = reference.named()
    return [relative_error(target_BFD, exact[name]) for name, target_BFD in targets.named().items()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights as small as they are in an encoder at the start of training; those of ``folders`` are extreme."""
    return save_teacher(tmp_path / "teacher", layers=5)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("lengths", [None, PADDED], ids=["no_mask", "mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_targets_are_near_those_of_float32(
    family: str, lengths: Tensor | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The weights are those that transformers draws, others in each version, and not a trained teacher's.
    monkeypatch.setattr(precision, "BF16_TOLERANCE", 2 * BF16_TOLERANCE)
    config = FAMILIES[family]()
    config.initializer_range = 0.02
    folder = save_model(tmp_path, config)
    half, exact = prepared(folder, "bf16"), prepared(folder, "32")
    assert (half.precision_used, exact.precision_used) == ("bf16", "32")
    inputs_BT = waveforms() if lengths is None else padded_waveforms()
    targets, reference = half(inputs_BT, lengths), exact(inputs_BT, lengths)
    assert {target_BFD.dtype for target_BFD in targets.named().values()} == {torch.float32}
    assert min(errors(targets, reference)) > 1e-5  # control: it is computed in another precision
    assert max(errors(targets, reference)) < 2 * BF16_TOLERANCE
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}


class TestCheck:
    def test_too_large_an_error_falls_back_with_a_warning(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(precision, "BF16_TOLERANCE", 1e-5)
        fallen, exact = prepared(folder, "bf16"), prepared(folder, "32")
        assert fallen.precision_used == "32"
        assert torch.equal(fallen(waveforms()).output_BFD, exact(waveforms()).output_BFD)
        (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert "computes in float32 on cpu: bf16 has relative errors of" in record.message

    def test_what_is_not_finite_falls_back(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        made = HuggingFaceTeacher(str(folder), precision="bf16")

        def overflow(_layer: nn.Module, _args: Any, output_BFD: Tensor) -> Tensor:
            return output_BFD * (float("inf") if torch.is_autocast_enabled("cpu") else 1)

        made.model.encoder.layers[3].register_forward_hook(overflow)
        made.prepare(CPU)
        assert made.precision_used == "32"
        assert "nan (output)" in caplog.text
        assert made(waveforms()).output_BFD.isfinite().all()

    def test_it_is_made_once_per_device(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "lightning_modules.precision")
        made = prepared(folder, "bf16")
        made.prepare(CPU)
        assert caplog.text.count("computes in bf16 on cpu: relative errors of its targets are") == 1
        assert "(layer 1)" in caplog.text
        assert "(output)" in caplog.text


def test_auto_is_float32_on_a_cpu_and_bf16_where_there_are_units_for_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert precision.best_precision(CPU) == "32"
    assert prepared(folder, "auto").precision_used == "32"
    monkeypatch.setattr(precision, "best_precision", lambda device: "bf16")
    assert prepared(folder, "auto").precision_used == "bf16"
    assert prepared(folder, "32").precision_used == "32"


@pytest.mark.parametrize(("features", "warnings"), [(("avx2",), 1), (("avx2", "avx512_bf16"), 0), ((), 0)])
def test_bf16_on_a_cpu_without_units_for_it_is_warned_of_once(
    features: tuple[str, ...],
    warnings: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(precision, "cpu_features", lambda: features)
    precision.warn_if_bf16_is_slow.__wrapped__.cache_clear()  # type: ignore[attr-defined]
    for _ in range(2):
        prepared(folder, "bf16")
    prepared(folder, "auto")
    precision.warn_if_bf16_is_slow(torch.device("cuda"), "trainer.precision=bf16-mixed", "32-true")
    slow = "model.teacher.init_args.precision=bf16 is slower than float32 on this CPU, which has no units for bf16"
    assert caplog.text.count(slow) == caplog.text.count("slower than") == warnings
    assert caplog.text.count("set model.teacher.init_args.precision=32\n") == warnings


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nflags\t: none\n",
            ("avx2", "avx512f", "avx512_bf16"),
        ),
        ("Features\t: fp asimd bf16 sve\n", ("asimd", "sve", "bf16")),
        ("flags : avx512_bf16x\nbugs : avx2\n", ()),
    ],
)
def test_features_of_a_processor_are_read_as_linux_names_them(
    text: str, features: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert precision.cpu_features(tmp_path / "cpuinfo") == features
    assert precision.cpu_features(tmp_path / "none") == ()


def test_the_trainers_autocast_does_not_reach_it(folder: Path) -> None:
    made = prepared(folder, "32")
    expected = made(waveforms()).output_BFD
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(waveforms()).output_BFD, expected)
        unguarded = made.model(waveforms()).last_hidden_state  # control
    assert relative_error(unguarded, expected) > 1e-4


def test_an_unknown_precision_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.teacher\.init_args\.precision='16': choose auto, 32 or bf16"):
        HuggingFaceTeacher(str(folder), precision="16")  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", ["bf16", "auto"])
def test_a_run_says_what_was_used(asked: str, folder: Path, tmp_path: Path) -> None:
    corpus = save_corpus(tmp_path / "corpus", {"train": 8, "dev": 3})
    module = make_module(folder, teacher_settings={"precision": asked})
    trainer = make_trainer(tmp_path, RunSummary(), max_epochs=1)
    trainer.fit(module, datamodule=make_data(corpus, tmp_path / "cache"))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    used = {"bf16": "bf16", "auto": "32"}[asked]
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["interstack"]["teacher_precision"] == used
    assert json.loads((tmp_path / "summary.json").read_text())["teacher_precision"] == used
