"""A user's own teacher, from a module in the working directory, is scored as any other encoder."""

import json
from pathlib import Path

import pytest

from experiments.cli import run
from tests.aligned_corpus import save_aligned_corpus

# The energy at each tone of the corpus, and its rise. Only the second of its three layers hears anything.
OWN_TEACHER = """
import torch

from lightning_modules.teacher import Teacher, TeacherTargets

TONES, RATE = (300, 900, 2000, 4000), 16_000


class Tones(Teacher):
    loudness = 1.0

    def __init__(self):
        super().__init__()
        self.sample_rate, self.num_layers, self.hidden_size, self.init_args = RATE, 3, 8, {}

    def num_frames(self, num_samples_B):
        return ((num_samples_B - 400) // 320 + 1).clamp(min=0)

    def forward(self, waveforms_BT, num_samples_B=None):
        windows_BFT = self.loudness * waveforms_BT.unfold(1, 400, 320) * torch.hann_window(400)
        bins = [round(frequency * 400 / RATE) for frequency in TONES]
        energy_BFD = torch.fft.rfft(windows_BFT).abs()[..., bins].log1p()
        rise_BFD = energy_BFD.diff(dim=1, prepend=energy_BFD[:, :1]).relu()
        heard_BFD = torch.cat([energy_BFD, rise_BFD], -1)
        deaf_BFD = torch.zeros_like(heard_BFD)
        layers = {1: deaf_BFD, 2: heard_BFD, 3: deaf_BFD}
        return TeacherTargets(layers[self.output_layer], {layer: layers[layer] for layer in self.hidden_layers})


class Deaf(Tones):
    loudness = 0.0
"""


@pytest.mark.ci
def test_a_class_path_is_scored_by_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tone_teachers.py").write_text(OWN_TEACHER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    splits = {f"--data.{part}_splits": f"[{split}]" for part, split in (("train", "train"), ("dev", "test"))}
    root = save_aligned_corpus(tmp_path / "tones", {"train": 16, "test": 4})
    settings = splits | {"--data.test_splits": "[test]", "--data.num_workers": "0", "--data.root": str(root)}
    settings |= {"--trainer.accelerator": "cpu", "--trainer.progress_bar": "false", "--wandb.mode": "disabled"}
    results = {}
    for name in ("Tones", "Deaf"):
        arguments = ["superb", "--preset", "probe", "--task", "pr", "--upstream", f"tone_teachers.{name}"]
        run([*arguments, *(text for pair in settings.items() for text in pair)])
        results[name] = json.loads((tmp_path / f"runs/superb/tone_teachers.{name}/result.json").read_text())
    assert results["Tones"]["metrics"]["per"] < 5
    weights = results["Tones"]["layer_weights"]
    assert len(weights) == 3
    assert weights[1] == max(weights) > 0.4
    assert results["Deaf"]["metrics"]["per"] > 40  # control
    digests = {result["config"]["upstream_digest"] for result in results.values()}
    assert len(digests) == 2
