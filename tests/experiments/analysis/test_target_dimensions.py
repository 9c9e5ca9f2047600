"""Which dimensions of the targets a student predicts."""

from pathlib import Path

import pytest
import torch

from datamodules.speech_data import AudioBatch
from experiments.analysis.similarity import read_waveforms
from experiments.analysis.target_dimensions import Dimensions, measure, target_dimensions
from tests.lightning_modules.teachers import FAMILIES, save_model
from tests.tiny_run import fit


def test_the_largest_dimension_is_told_from_the_others() -> None:
    target_ND = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 1.0, 1.0])
    learnt = target_ND.mean(0).expand_as(target_ND).clone()
    learnt[:, 1] = target_ND[:, 1] * 0.9
    found = Dimensions.of(learnt, target_ND)
    assert found.variance_share == pytest.approx(100 / 103, abs=0.02)
    assert found.largest_r2 == pytest.approx(0.99, abs=0.001)
    assert found.median_r2 == pytest.approx(0.0, abs=1e-5)
    assert found.loss_share == pytest.approx(1 / 4, abs=0.05)
    assert Dimensions.of(target_ND, target_ND).median_r2 == 1.0


@pytest.mark.parametrize(
    "options", ["", "--model.objective.intermediate l2l --growth.stages [2,4]", "--model.objective.projection shared"]
)
def test_losses_are_those_of_training(
    options: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--name", tmp_path.name, "--model.objective.normalize_targets", "layer", *options.split()]
    module = fit(inputs, *words).model.eval()
    checkpoint = inputs / "runs" / tmp_path.name / "checkpoints" / "last.ckpt"
    waveforms = read_waveforms(inputs / "corpus" / "dev", 1, 5.0)
    num_samples = torch.tensor([len(waveforms[0])])
    batch = AudioBatch(waveforms[0][None], num_samples, num_samples)
    with torch.no_grad():
        terms = module.losses(batch)
    found = measure(checkpoint, waveforms)
    assert found["output"].loss == pytest.approx(float(terms.output), rel=1e-5)
    assert found["layer 2"].loss == pytest.approx(float(terms.intermediate), rel=1e-5)
    assert found["layer 2"].loss != pytest.approx(found["output"].loss, rel=1e-5)  # control
    target_dimensions([str(checkpoint)], str(inputs / "corpus"), utterances=2, teacher=str(inputs / "teacher"))
    printed = capsys.readouterr().out
    assert all(words in printed for words in (str(checkpoint), "output", "layer 2"))


def test_the_student_hears_what_it_heard_in_training(inputs: Path, tmp_path: Path) -> None:
    """Normalised speech, whose mean and scale matter to a front end with layer norms."""
    teacher = str(save_model(tmp_path / "large", FAMILIES["hubert_large"]()))
    words = ["--model.teacher.init_args.model", teacher, "--model.teacher.init_args.normalize", "true"]
    module = fit(inputs, "--name", "large", *words, "--model.objective.layers", "[1]").model.eval()
    (waveform_T,) = (each + 0.3 for each in read_waveforms(inputs / "corpus" / "dev", 1, 5.0))
    num_samples = torch.tensor([len(waveform_T)])
    with torch.no_grad():
        expected = module.losses(AudioBatch(waveform_T[None], num_samples, num_samples)).output
    found = measure(inputs / "runs" / "large" / "checkpoints" / "last.ckpt", [waveform_T])
    assert found["output"].loss == pytest.approx(float(expected), rel=1e-5)
