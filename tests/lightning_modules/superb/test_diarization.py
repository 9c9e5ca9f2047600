"""Labels, loss and errors of SD; the error rate is held against pyannote.metrics."""

import io
from itertools import permutations

import h5py
import numpy as np
import pytest
import torch
from pyannote.core import Annotation, Timeline
from pyannote.core import Segment as Region
from pyannote.metrics.diarization import DiarizationErrorRate

from datamodules.superb.librimix import Segment, text_of
from lightning_modules.superb.diarization import (
    diarization_error,
    find_segments,
    frame_accuracy,
    permutation_losses,
    speaker_labels,
)
from lightning_modules.superb.heads import DiarizationLSTM
from lightning_modules.superb.recipes import build_task
from lightning_modules.superb.tasks import Prediction, TaskInputs


def test_the_head_has_the_published_size() -> None:
    assert sum(parameter.numel() for parameter in DiarizationLSTM(768).parameters()) == 2_626_562


def test_labels_follow_the_frames() -> None:
    segments = [Segment("b", 0.0, 0.05), Segment("a", 0.03, 0.11)]
    labels_FS = speaker_labels(segments, 0, 6, 320)
    # Speakers are sorted. 0.05 s are 2.5 frames and 0.03 s 1.5, which numpy rounds to the even 2.
    assert labels_FS.tolist() == [[0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [1, 0]]
    assert speaker_labels(segments, 2, 3, 320)[:, 0].tolist() == [1, 1, 1]  # begins in the chunk


def test_a_segment_that_spans_a_whole_chunk_gives_no_label() -> None:
    """As in s3prl, whose rule looks at beginnings and ends only."""
    segments = [Segment("a", 0.0, 2.0), Segment("b", 0.5, 0.6)]
    assert not speaker_labels(segments, 40, 20, 320).any()
    assert speaker_labels(segments, 40, 60, 320)[:, 0].sum() == 60  # it ends at the end of this one
    assert speaker_labels(segments, 0, 20, 320)[:, 0].sum() == 20


def test_the_loss_is_that_of_the_better_order() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BFS = torch.randn(2, 7, 2, generator=generator)
    labels_BFS = (torch.rand(2, 7, 2, generator=generator) > 0.5).float()
    losses_B = permutation_losses(logits_BFS, labels_BFS, [7, 4])
    for row, (frames, loss) in enumerate(zip((7, 4), losses_B, strict=True)):
        each = []
        for order in permutations(range(2)):
            wanted = labels_BFS[row, :frames][:, list(order)]
            probabilities = logits_BFS[row, :frames].sigmoid()
            entropy = -(wanted * probabilities.log() + (1 - wanted) * (1 - probabilities).log())
            each.append(float(entropy.mean(-1).sum()))
        assert float(loss) == pytest.approx(min(each), rel=1e-5)
        assert float(loss) != pytest.approx(max(each), rel=1e-3)
    torch.testing.assert_close(permutation_losses(logits_BFS, labels_BFS.flip(-1), [7, 4]), losses_B)


def test_accuracy_is_in_that_order() -> None:
    labels_FS = np.array([[1, 0], [1, 0], [0, 1], [1, 1]], np.float32)
    logits_FS = np.where(labels_FS[:, ::-1] > 0, 3.0, -3.0).astype(np.float32)
    assert frame_accuracy(logits_FS, labels_FS) == 1.0
    logits_FS[0, 0] *= -1
    assert frame_accuracy(logits_FS, labels_FS) == 7 / 8
    assert frame_accuracy(logits_FS, np.zeros((4, 2), np.float32)) == 0.0


def test_segments_are_found_above_the_threshold() -> None:
    found_FS = np.array([[0.9, 0.1], [0.2, 0.1], [0.9, 0.1], [0.6, 0.8], [0.1, 0.8]])
    assert find_segments(found_FS, 0.5, 1, 320) == [
        Segment("0", 0.0, 0.02),
        Segment("0", 0.04, 0.08),
        Segment("1", 0.06, 0.1),
    ]
    assert [segment.speaker for segment in find_segments(found_FS, 0.7, 1, 320)] == ["0", "0", "1"]
    (smooth, _) = find_segments(found_FS, 0.5, 3, 320)
    assert smooth == Segment("0", 0.02, 0.08)


def annotation(segments: list[Segment]) -> Annotation:
    found = Annotation()
    for number, segment in enumerate(segments):
        found[Region(segment.start, segment.end), number] = segment.speaker
    return found


def random_segments(generator: np.random.Generator, speakers: str) -> list[Segment]:
    """Segments of which none overlaps another of its speaker."""
    segments = []
    for speaker in speakers:
        times = np.sort(generator.uniform(0, 10, 6)).round(2)
        segments += [
            Segment(speaker, float(a), float(b)) for a, b in zip(times[::2], times[1::2], strict=True) if a < b
        ]
    return segments


@pytest.mark.parametrize("seed", range(20))
def test_the_error_rate_is_that_of_pyannote(seed: int) -> None:
    generator = np.random.default_rng(seed)
    names = ["x", "y", "z"]
    references = {name: random_segments(generator, "ab") for name in names}
    hypotheses = {name: random_segments(generator, "01" if seed % 2 else "012") for name in names}
    metric = DiarizationErrorRate(collar=0.0, skip_overlap=False)
    for name in names:
        metric(annotation(references[name]), annotation(hypotheses[name]), uem=Timeline([Region(0, 10)]))
    assert diarization_error(references, hypotheses) == pytest.approx(100 * abs(metric), abs=1e-6)


def test_the_error_rate_of_cases_that_are_known() -> None:
    reference = {"x": [Segment("a", 0.0, 4.0), Segment("b", 2.0, 6.0)]}
    swapped = {"x": [Segment("1", 0.0, 4.0), Segment("0", 2.0, 6.0)]}
    assert diarization_error(reference, swapped) == 0.0
    assert diarization_error(reference, {}) == 100.0  # all is missed
    assert diarization_error(reference, {"x": [Segment("0", 0.0, 6.0)]}) == pytest.approx(100 * 4 / 8)
    twice = {"x": [*swapped["x"], Segment("2", 0.0, 2.0)]}
    assert diarization_error(reference, twice) == pytest.approx(100 * 2 / 8)  # a false speaker for two seconds


SEGMENTS = [Segment("a", 0.0, 0.5), Segment("b", 0.4, 1.0)]


def test_the_test_reports_the_lowest_of_ten_errors_and_dev_none() -> None:
    task = build_task("sd", TaskInputs())
    labels_FS = speaker_labels(SEGMENTS, 0, 50, 320)
    # Quiet speech of the second speaker is above 0.3 only.
    logits_FS = np.where(labels_FS > 0, [3.0, -0.6], -3.0).astype(np.float32)
    predictions = [Prediction("rec", text_of(SEGMENTS), logits_FS)]
    assert list(task.score(predictions, "dev")) == ["accuracy"]
    scores = task.score(predictions, "test")
    assert scores["der"] == pytest.approx(0, abs=1e-9)
    assert scores["der_fixed"] > 30


def test_features_are_brought_to_the_labels() -> None:
    """49 frames for 50 labels, of which the last is repeated; the shorter item keeps its zeros."""
    task = build_task("sd", TaskInputs())
    features_BFD = torch.arange(49.0)[None, :, None].repeat(2, 1, 1)
    features_BFD[1, 40:] = 0
    matched_BFD, frames = task.features(features_BFD, [49, 40], [16_000, 12_800], 16_000)
    assert frames == [50, 40]
    assert matched_BFD[0, -2:, 0].tolist() == [48, 48]
    assert matched_BFD[1, -10:].abs().sum() == 0
    assert task.weight(12_800) == 40
    cut_BFD, _ = task.features(features_BFD, [49, 40], [15_000, 12_800], 15_000)
    assert cut_BFD.shape[1] == 46


def test_chunks_of_a_recording_are_one_file() -> None:
    task = build_task("sd", TaskInputs())
    halves = [np.full((2, 2), -1, np.float32), np.full((1, 2), 1, np.float32)]
    target = text_of(SEGMENTS)
    predictions = [Prediction("rec@2000", target, halves[1]), Prediction("rec", target, halves[0])]
    files = task.hypothesis_files("test", predictions)
    assert list(files) == ["frame_shift", "scoring/predictions/rec.h5"]
    assert files["frame_shift"] == "320\n"
    content = files["scoring/predictions/rec.h5"]
    assert isinstance(content, bytes)
    with h5py.File(io.BytesIO(content)) as file:
        assert (file["T_hat"][:, 0] > 0.5).tolist() == [False, False, True]
    assert all(name.startswith("other/") for name in task.hypothesis_files("other", predictions))
