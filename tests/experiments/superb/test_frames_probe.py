"""The probe of frames: labels, scores, and that it finds what is there and nothing else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.alignments import Segment, frame_labels, segments_of, timed_phones
from datamodules.superb.aligned import read_aligned
from experiments.cli import run
from experiments.report.study_tables import column
from lightning_modules.superb.frames import FrameTask
from lightning_modules.superb.recipes import build_task
from lightning_modules.superb.tasks import Prediction, TaskInputs
from tests.aligned_corpus import TONES, save_aligned_corpus, swap_alignments
from tests.experiments.superb.test_probe import probe

PHONES = ["AA", "B", "SIL"]
SEGMENTS = [Segment("SIL", 0.0, 0.1), Segment("AA", 0.1, 0.14), Segment("B", 0.14, 0.2)]


def frame_task() -> FrameTask:
    task = build_task("frames", TaskInputs([PHONES]))
    assert isinstance(task, FrameTask)
    return task


@pytest.mark.parametrize("rate", [320, 160])
def test_a_frame_has_the_phone_at_its_centre_at_every_rate(rate: int) -> None:
    task, frames = frame_task().at_rate(rate), 12 * 320 // rate
    labels_F = task.labels(timed_phones(SEGMENTS), frames)
    for frame, label in enumerate(labels_F):
        centre = (rate * frame + 200) / 16_000
        expected = next((s.phone for s in SEGMENTS if s.start_seconds <= centre < s.end_seconds), "SIL")
        assert PHONES[label] == expected
    assert {PHONES[label] for label in labels_F} == set(PHONES)


def test_labels_at_the_default_rate_are_those_of_pretraining() -> None:
    expected_F = frame_labels(SEGMENTS, 12, PHONES)
    assert np.array_equal(frame_task().labels(timed_phones(SEGMENTS), 12), expected_F)
    assert segments_of(timed_phones(SEGMENTS)) == SEGMENTS


def predictions(*shifts: int) -> list[Prediction]:
    """Of 12 frames each, so many of which are named wrongly, the silent ones first."""
    target = timed_phones(SEGMENTS)
    right_F = frame_task().labels(target, 12)
    wrong_F = (right_F + 1) % 3
    return [
        Prediction(str(number), target, [*wrong_F[:shift].tolist(), *right_F[shift:].tolist()])
        for number, shift in enumerate(shifts)
    ]


def test_scores_are_shares_of_frames() -> None:
    task = frame_task()
    silent = int((task.labels(timed_phones(SEGMENTS), 12) == 2).sum())
    assert task.score(predictions(0, 0), "test") == {"accuracy": 100.0, "accuracy_speech": 100.0}
    found = task.score(predictions(3, 0), "test")
    assert found["accuracy"] == pytest.approx(100 * 21 / 24)
    assert found["accuracy_speech"] == 100.0  # its first frames are silence
    spoken = 12 - silent
    assert task.score(predictions(12), "test")["accuracy_speech"] == 0.0
    assert 0 < spoken < 12


def test_losses_are_means_over_the_frames_that_count() -> None:
    task, item = frame_task(), SimpleNamespace(key="a", target=timed_phones(SEGMENTS))
    logits = torch.randn(2, 14, 3)
    losses_B = task.losses(logits, [12, 5], [item, item])
    labels_F = torch.from_numpy(task.labels(item.target, 12))
    assert losses_B[0] == pytest.approx(float(torch.nn.functional.cross_entropy(logits[0, :12], labels_F)))
    changed = logits.clone()
    changed[1, 5:] = 100.0
    assert torch.equal(task.losses(changed, [12, 5], [item, item]), losses_B)
    assert not torch.equal(task.losses(changed, [12, 6], [item, item]), losses_B)  # control


@pytest.mark.ci
def test_a_probe_that_hears_names_the_frames_and_a_deaf_one_does_not(tmp_path: Path) -> None:
    root = save_aligned_corpus(tmp_path / "tones", {"train": 16, "test": 4})
    result: dict[str, Any] = probe(root, tmp_path / "out", task="frames")
    assert result["test"]["accuracy"] > 90
    assert result["layer_weights"][1] == max(result["layer_weights"])
    assert (tmp_path / "out" / "frames_probe").is_dir()
    truth = next((tmp_path / "out").rglob("test_truth.txt")).read_text().splitlines()
    assert len(truth) == 4
    assert set(truth[0].split()[1:]) == {*TONES, "SIL"}
    # Control: the alignments of other utterances.
    swap_alignments(root, "test")
    assert probe(root, tmp_path / "control", task="frames")["test"]["accuracy"] < 70


def test_silence_is_a_class_and_times_are_kept(tmp_path: Path) -> None:
    root = str(save_aligned_corpus(tmp_path, {"train": 3, "test": 2}))
    corpus = read_aligned(root, ["train"], ["test"], ["test"], timed=True)
    assert corpus.labels == [sorted([*TONES, "SIL"])]
    assert [segment.phone for segment in segments_of(corpus.train[0].target)].count("SIL") == 2


def test_its_column_says_that_more_is_better() -> None:
    shown = column("frames_probe/accuracy")
    assert (shown.title, shown.better) == ("Frame probe accuracy, %", "high")


def test_it_is_a_probe_only_and_needs_alignments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task frames has no preset 'superb': give --preset probe"):
        run(["superb", "--task", "frames", "--upstream", "fbank", "--data.root", str(tmp_path)])
    with pytest.raises(ValueError, match="holds no folder 'alignments'"):
        run(["superb", "--task", "frames", "--preset", "probe", "--upstream", "fbank", "--data.root", str(tmp_path)])
