"""The probe preset: a linear head finds the layer that hears, from the start of the best constant classifier."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from datamodules.alignments import Segment, write_alignment
from datamodules.superb.aligned import read_aligned
from experiments.superb import running
from experiments.superb.command import superb_probe
from experiments.superb.options import TaskData
from lightning_modules.superb.ctc_tasks import blank_logit
from lightning_modules.superb.feature_cache import FeatureCache
from lightning_modules.superb.featurizer import Featurizer
from lightning_modules.superb.tasks import ProbeStart
from lightning_modules.superb.upstream import Upstream
from tests.aligned_corpus import RATE, TONES, save_aligned_corpus, swap_alignments
from tests.datamodules.superb import corpora


class Spectrum(Upstream):
    """Three hidden states; only the middle one hears anything: the energy at each tone, and its rise."""

    name, rate, num_states, width = "spectrum", 320, 3, 8

    def num_frames(self, num_samples: int) -> int:
        return max(0, (num_samples - 400) // 320 + 1)

    def forward(self, waveforms: Sequence[Tensor], longest: int | None = None) -> list[Tensor]:
        (waveform_T,) = waveforms
        windows_1FT = waveform_T[None].unfold(1, 400, 320) * torch.hann_window(400)
        bins = [round(frequency * 400 / RATE) for frequency in TONES.values()]
        energy_1FD = torch.fft.rfft(windows_1FT).abs()[..., bins].log1p()
        # Its rise too: over frames that are all the same, a linear head can only repeat itself, and CTC settles on
        # naming each with a small probability.
        tones_1FD = torch.cat([energy_1FD, energy_1FD.diff(dim=1, prepend=energy_1FD[:, :1]).relu()], -1)
        deaf_1FD = torch.zeros_like(tones_1FD)
        return [deaf_1FD, tones_1FD, deaf_1FD]


def probe(root: Path, output: Path, **more: Any) -> dict[str, Any]:
    data = TaskData(str(root), train_splits=["train"], dev_splits=["test"], test_splits=["test"], num_workers=0)
    return superb_probe(Spectrum(), data, str(output), **more)


@pytest.mark.ci
def test_probe_finds_the_layer_that_hears(tmp_path: Path) -> None:
    result = probe(save_aligned_corpus(tmp_path / "tones", {"train": 16, "test": 4}), tmp_path / "out")
    assert result["preset"] == "probe"
    assert result["test"]["per"] < 5
    assert result["layer_weights"][1] == max(result["layer_weights"]) > 0.4
    assert (result["feature_cache"], result["batch_size"]) == ("memory", 16)


def test_a_probe_keeps_the_states_of_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[FeatureCache] = []

    class Spied(FeatureCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr(running, "FeatureCache", Spied)
    probe(save_aligned_corpus(tmp_path / "tones", {"train": 16, "test": 4}), tmp_path / "out", updates=3)
    (cache,) = caches
    assert (len(cache._memory), cache.hits, cache.misses) == (16, 3 * 16, 16 + 4 + 4)  # training, dev, test


def test_statistics_are_computed_where_and_as_the_trainer_computes() -> None:
    """The meta device stands for a GPU."""
    upstream, seen = nn.Linear(2, 2), []

    def states(waveform_T: Tensor) -> list[Tensor]:
        seen.append((waveform_T.device.type, upstream.weight.device.type, torch.is_autocast_enabled("cpu")))
        return [torch.randn(3, 2)]

    class TrainSet:
        def __getitem__(self, batch: Any) -> Any:
            return SimpleNamespace(waveforms=[torch.zeros(int(batch.num_samples[0]))])

    module: Any = SimpleNamespace(
        upstream=upstream, cache=SimpleNamespace(states=states), featurizer=Featurizer(1, 2, standardise=True)
    )
    data: Any = SimpleNamespace(corpus=SimpleNamespace(train=corpora.rows([400, 800])), train_set=TrainSet())
    strategy, precision = SimpleNamespace(root_device=torch.device("meta")), MixedPrecision("bf16-mixed", "cpu")
    trainer: Any = SimpleNamespace(strategy=strategy, precision_plugin=precision)
    running._standardise(module, data, trainer)
    assert seen == [("meta", "meta", True)] * 2
    assert module.featurizer.mean_LD.abs().sum() > 0


@pytest.mark.ci
def test_probe_with_the_phones_of_other_utterances_fails(tmp_path: Path) -> None:
    """The control of the test above."""
    root = save_aligned_corpus(tmp_path / "tones", {"train": 16, "test": 4})
    swap_alignments(root, "test")
    assert probe(root, tmp_path / "out")["test"]["per"] > 40


def test_probe_depends_on_its_seed(tmp_path: Path) -> None:
    root = save_aligned_corpus(tmp_path / "tones", {"train": 20, "test": 1})
    runs = [probe(root, tmp_path / str(n), updates=3, seed=seed)["layer_weights"] for n, seed in enumerate((0, 0, 1))]
    assert runs[0] == runs[1] != runs[2]


def test_targets_are_the_aligned_phones(tmp_path: Path) -> None:
    root = str(save_aligned_corpus(tmp_path, {"train": 3, "test": 2}))
    corpus = read_aligned(root, ["train"], ["test"], ["test"])
    assert corpus.labels == [sorted(TONES)]
    assert (len(corpus.train), len(corpus.dev)) == (3, 2)
    assert sorted(corpus.train[0].target.split()) == sorted(TONES)
    write_alignment(tmp_path / "alignments/train/1-1.tsv", {"1-1-0000": [Segment("SIL", 0, 1)]})
    with pytest.raises(ValueError, match="nothing but silence"):
        read_aligned(root, ["train"], ["test"], ["test"])


def test_the_start_is_the_best_constant_classifier() -> None:
    frames, symbols, classes = 40, 8, 5
    targets = torch.arange(symbols) % (classes - 1) + 1

    def loss(blank: float) -> float:
        logits = torch.zeros(frames, 1, classes)
        logits[..., 0] = blank
        lengths = torch.tensor([frames]), torch.tensor([symbols])
        return float(nn.functional.ctc_loss(logits.log_softmax(-1), targets[None], *lengths))

    start = blank_logit(ProbeStart(frames, symbols), classes)
    assert loss(start) < min(loss(start - 0.7), loss(start + 0.7))
    assert loss(start) < 0.7 * loss(0.0)
