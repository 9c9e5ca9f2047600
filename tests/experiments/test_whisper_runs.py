"""Commands on a run whose teacher is a Whisper: cache of targets, analysis, export; and the probe of one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoFeatureExtractor, HubertModel

from datamodules.speech_data import AudioBatch
from experiments.analysis.similarity import read_waveforms, similarity
from experiments.cli import run
from experiments.superb.command import superb_probe
from experiments.superb.options import TaskData
from lightning_modules.distillation import DistillationModule
from tests.aligned_corpus import save_aligned_corpus
from tests.helpers import save_corpus, save_whisper
from tests.tiny_run import TINY

WHISPER = [
    *("--model.teacher", "lightning_modules.whisper.WhisperTeacher", "--model.student.front_end_init", "random"),
    *("--model.student.conv_channels", "8", "--model.objective.normalize_targets", "standardize"),
    *("--data.crop", "fixed"),
]


def options(inputs: Path, *more: str) -> list[str]:
    places = ["--data.root", str(inputs / "corpus"), "--data.cache_dir", str(inputs / "cache")]
    return [*TINY, *WHISPER, *places, "--model.teacher.init_args.model", str(inputs / "teacher"), *more]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``teacher``, a ``corpus``, the ``targets`` of both, and the ``run`` that was trained on them."""
    folder = tmp_path_factory.mktemp("inputs")
    save_whisper(folder / "teacher")
    save_corpus(folder / "corpus", {"train": 8, "dev": 2})
    run(["cache-targets", *options(folder), "--output", str(folder / "targets")])
    targets = ["--data.targets", str(folder / "targets")]
    run(["fit", *options(folder), "--runs_dir", str(folder), "--name", "run", *targets])
    return folder


def test_a_run_reads_its_cache_and_no_other_whispers(inputs: Path, tmp_path: Path) -> None:
    summary = json.loads((inputs / "run" / "summary.json").read_text())
    assert (summary["depth"], summary["steps"], summary["teacher_precision"]) == (4, 8, "32")
    pads = ["--data.targets", str(inputs / "targets"), "--model.teacher.init_args.pad_to_30_seconds", "true"]
    with pytest.raises((SystemExit, ValueError), match="pad_to_30_seconds"):
        run(["fit", *options(inputs), "--runs_dir", str(tmp_path), *pads])


def test_its_layers_are_compared_and_its_loss_is_that_of_training(inputs: Path, tmp_path: Path) -> None:
    similarity([str(inputs / "run")], str(inputs / "corpus"), str(tmp_path), utterances=1)
    (found,) = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert [len(stage["cka_teacher"][0]) for stage in found["stages"]] == [4] * 4
    checkpoint = torch.load(inputs / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    module = DistillationModule(**checkpoint["interstack"]["recipe"]).eval()
    module.load_state_dict(checkpoint["state_dict"])
    (waveform_T,) = read_waveforms(inputs / "corpus", 1, 10.0)
    length = torch.tensor([len(waveform_T)])
    batch = AudioBatch(waveform_T[None], length, length)
    with torch.no_grad():
        loss = float(module.losses(batch).output)  # type: ignore[arg-type]
        module.objective.normalizer.kind = "none"
        raw = float(module.losses(batch).output)  # type: ignore[arg-type]
    assert found["stages"][-1]["depth_use"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert raw != pytest.approx(loss, rel=0.01)  # control


def test_its_student_is_exported_with_its_teachers_name(inputs: Path, tmp_path: Path) -> None:
    checkpoint = str(inputs / "run" / "checkpoints" / "last.ckpt")
    run(["export", "--checkpoint", checkpoint, "--output", str(tmp_path / "student")])
    student = HubertModel.from_pretrained(tmp_path / "student")
    assert (student.config.num_hidden_layers, student.config.conv_dim[0]) == (4, 8)
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "student").do_normalize is False
    assert f"distilled from `{inputs / 'teacher'}`" in (tmp_path / "student" / "README.md").read_text()


def test_a_whisper_is_probed(inputs: Path, tmp_path: Path) -> None:
    root = save_aligned_corpus(tmp_path / "tones", {"train": 8, "test": 2})
    data = TaskData(str(root), train_splits=["train"], dev_splits=["test"], test_splits=["test"], num_workers=0)
    result = superb_probe(str(inputs / "teacher"), data, str(tmp_path / "out"), updates=20)
    assert (result["hidden_states"], result["width"]) == (5, 16)
    assert 0 <= result["test"]["per"] <= 100
