"""Labels, loss and errors of speaker diarization. Shapes: B chunks, F frames, S speakers."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.audio import SAMPLE_RATE
from datamodules.superb.librimix import Segment
from lightning_modules.lengths import before_the_end


def speaker_labels(segments: Sequence[Segment], first_frame: int, num_frames: int, hop: int) -> np.ndarray:
    """Whether each speaker speaks in each frame of a chunk, (F, S) float32, speakers in alphabetical order.

    As in s3prl, only a segment that begins or ends in the chunk counts, so one that spans all of it gives no label.

    Args:
        segments: speech of the whole recording, in seconds.
        first_frame: frame of the recording at which the chunk begins.
        num_frames: number of frames F.
        hop: samples (16 kHz) from one frame to the next.
    """
    speakers = sorted({segment.speaker for segment in segments})
    labels_FS = np.zeros((num_frames, len(speakers)), np.float32)
    for segment in segments:
        start, end = (int(np.rint(np.float64(t) * SAMPLE_RATE / hop)) - first_frame for t in segment[1:])
        begins, stops = 0 <= start < num_frames, 0 < end <= num_frames
        if begins or stops:
            labels_FS[start if begins else 0 : end if stops else num_frames, speakers.index(segment.speaker)] = 1
    return labels_FS


def permutation_losses(logits_BFS: Tensor, labels_BFS: Tensor, num_frames: Sequence[int]) -> Tensor:
    """Loss (B,) of each chunk for the best order of its speakers.

    It is the binary cross-entropy, the mean over speakers and the sum over the first ``num_frames`` frames.
    """
    return _losses(logits_BFS, labels_BFS, num_frames).min(0).values


def _losses(logits_BFS: Tensor, labels_BFS: Tensor, num_frames: Sequence[int]) -> Tensor:
    """Loss of every permutation (rows) of the speakers and each chunk."""
    valid_BF = before_the_end(torch.tensor(num_frames), logits_BFS.shape[1], logits_BFS.device)
    return torch.stack(
        [
            (_entropy(logits_BFS, labels_BFS[..., list(order)]).mean(-1) * valid_BF).sum(-1)
            for order in permutations(range(labels_BFS.shape[-1]))
        ]
    )


def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def frame_accuracy(logits_FS: np.ndarray, labels_FS: np.ndarray) -> float:
    """Share of right decisions over frames and speakers of a chunk, in the order with the least loss.

    It is 0 for a chunk without speech, as in s3prl.
    """
    if not labels_FS.any():
        return 0.0
    logits, labels = torch.from_numpy(logits_FS), torch.from_numpy(labels_FS)
    orders = list(permutations(range(labels.shape[-1])))
    best = int(_losses(logits[None], labels[None], [len(logits)]).argmin())
    return float(((logits > 0) == labels[:, list(orders[best])].bool()).double().mean())


def find_segments(probabilities_FS: np.ndarray, threshold: float, median: int, hop: int) -> list[Segment]:
    """Segments where the probability is above ``threshold``, after a median filter, with times to 0.01 s.

    Args:
        probabilities_FS: probability (F, S) that each speaker speaks.
        threshold: least probability of speech.
        median: frames of the filter; 1 changes nothing.
        hop: samples (16 kHz) from one frame to the next.
    """
    from scipy.signal import medfilt

    active_FS = np.where(probabilities_FS > threshold, 1, 0)
    if median > 1:
        active_FS = medfilt(active_FS.astype(np.float64), (median, 1)).astype(int)
    segments = []
    for speaker, active_F in enumerate(active_FS.T):
        changes = np.flatnonzero(np.diff(np.pad(active_F, 1)))
        for first, last in zip(changes[::2], changes[1::2], strict=True):
            start, length = (round(frames * hop / SAMPLE_RATE, 2) for frames in (int(first), int(last - first)))
            segments.append(Segment(str(speaker), start, start + length))
    return segments


def diarization_error(
    references: Mapping[str, Sequence[Segment]], hypotheses: Mapping[str, Sequence[Segment]]
) -> float:
    """Diarization error rate in percent over all recordings: missed, false and confused speech over reference speech.

    There is no collar, and overlapped speech counts, as in SUPERB. Speakers are matched one to one in each recording so
    that they agree for as long as possible.

    Args:
        references: segments by recording.
        hypotheses: segments by recording, with speakers of any name; those of a recording without any may be absent.
    """
    parts = [_wrong_and_spoken(reference, hypotheses.get(name, ())) for name, reference in references.items()]
    wrong, spoken = (sum(column) for column in zip(*parts, strict=True))
    return 100 * wrong / spoken if spoken else 0.0


def _wrong_and_spoken(reference: Sequence[Segment], hypothesis: Sequence[Segment]) -> tuple[float, float]:
    """Seconds of error and of reference speech; overlapping speakers count once each."""
    from scipy.optimize import linear_sum_assignment

    times = np.unique([time for segment in (*reference, *hypothesis) for time in segment[1:]])
    lengths_I = np.diff(times)
    wanted_SI, found_SI = (_speaking(segments, times) for segments in (reference, hypothesis))
    together_SS = (wanted_SI * lengths_I) @ found_SI.T
    agreed = together_SS[linear_sum_assignment(together_SS, maximize=True)].sum()
    # In each interval the error is the larger number of speakers, less those that agree.
    most_I = np.maximum(wanted_SI.sum(0), found_SI.sum(0))
    return float((most_I * lengths_I).sum() - agreed), float((wanted_SI.sum(0) * lengths_I).sum())


def _speaking(segments: Iterable[Segment], times: np.ndarray) -> np.ndarray:
    """Whether each speaker (S) speaks in each interval (I) between neighbouring times."""
    segments = list(segments)
    speakers = sorted({segment.speaker for segment in segments})
    active_SI = np.zeros((len(speakers), max(0, len(times) - 1)))
    for segment in segments:
        first, last = np.searchsorted(times, segment[1:])
        active_SI[speakers.index(segment.speaker), first:last] = 1
    return active_SI
