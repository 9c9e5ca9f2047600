"""SD, which says who speaks when in a mixture of two speakers. Shapes: B batch, F frames, D width, S speakers."""

import io
from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.frames import HOP
from datamodules.superb.librimix import Segment, chunk_of, speech_of
from lightning_modules.superb.diarization import (
    diarization_error,
    find_segments,
    frame_accuracy,
    permutation_losses,
    speaker_labels,
)
from lightning_modules.superb.heads import DiarizationLSTM
from lightning_modules.superb.tasks import Item, Prediction, ProbeStart, Task

THRESHOLDS, MEDIANS = (0.3, 0.4, 0.5, 0.6, 0.7), (1, 11)


class SpeakerDiarization(Task):
    """Predict for each frame which of two speakers speak. A row is a chunk of a recording.

    Attributes:
        rate: samples from one frame of the upstream to the next, and of the labels.
    """

    rate = HOP

    def at_rate(self, rate: int) -> "SpeakerDiarization":
        task = copy(self)
        task.rate = rate
        return task

    def build_head(self, width: int, probe: ProbeStart | None = None) -> nn.Module:
        return DiarizationLSTM(width)

    def features(
        self, features_BFD: Tensor, num_frames: list[int], num_samples: Sequence[int], longest: int
    ) -> tuple[Tensor, list[int]]:
        """Bring the features to the number of labels: cut them, or repeat the batch's last frame."""
        frames, available = longest // self.rate, features_BFD.shape[1]
        last_BFD = features_BFD[:, -1:].expand(-1, max(0, frames - available), -1)
        matched_BFD = torch.cat([features_BFD[:, :frames], last_BFD], 1)
        return matched_BFD, [samples // self.rate for samples in num_samples]

    def weight(self, num_samples: int) -> float:
        """Number of labels of the chunk."""
        return float(num_samples // self.rate)

    def losses(self, output: Tensor, num_frames: Sequence[int], items: Sequence[Item]) -> Tensor:
        labels = [torch.from_numpy(self._labels(*pair)) for pair in zip(items, num_frames, strict=True)]
        labels_BFS = nn.utils.rnn.pad_sequence(labels, batch_first=True).to(output)
        missing = output.shape[1] - labels_BFS.shape[1]
        return permutation_losses(output, nn.functional.pad(labels_BFS, (0, 0, 0, missing)), num_frames)

    def _labels(self, item: Item | Prediction, num_frames: int) -> np.ndarray:
        _, first_frame = chunk_of(item.key)
        return speaker_labels(speech_of(item.target), first_frame, num_frames, self.rate)

    def predict(self, output: Tensor, num_frames: Sequence[int], items: Sequence[Item]) -> list[Prediction]:
        logits_BFS = output.float().cpu().numpy()
        rows = zip(items, logits_BFS, num_frames, strict=True)
        return [Prediction(item.key, item.target, row_FS[:frames]) for item, row_FS, frames in rows]

    def score(self, predictions: Sequence[Prediction], split: str) -> dict[str, float]:
        """Frame accuracy, the mean over chunks, and on tests the DER, the lowest of ten ways to post-process it.

        Threshold and median filter are chosen on the test itself, as in s3prl; ``der_fixed`` is with 0.5 and 11.
        """
        accuracies = [frame_accuracy(one.values, self._labels(one, len(one.values))) for one in predictions]
        accuracy = {"accuracy": 100 * float(np.mean(accuracies))}
        if split == "dev":
            return accuracy
        recordings = self._recordings(predictions)
        references = {recording: speech_of(target) for recording, (target, _) in recordings.items()}
        errors = {
            (threshold, median): diarization_error(references, self._segments(recordings, threshold, median))
            for threshold in THRESHOLDS
            for median in MEDIANS
        }
        return accuracy | {"der": min(errors.values()), "der_fixed": errors[0.5, 11]}

    def _recordings(self, predictions: Sequence[Prediction]) -> dict[str, tuple[str, np.ndarray]]:
        """Target and probabilities (F, S) of each recording, whose chunks are joined."""
        chunks: dict[str, list[Prediction]] = {}
        for prediction in sorted(predictions, key=lambda one: chunk_of(one.key)):
            chunks.setdefault(chunk_of(prediction.key)[0], []).append(prediction)
        return {
            recording: (parts[0].target, 1 / (1 + np.exp(-np.concatenate([part.values for part in parts]))))
            for recording, parts in chunks.items()
        }

    def _segments(
        self, recordings: dict[str, tuple[str, np.ndarray]], threshold: float, median: int
    ) -> dict[str, list[Segment]]:
        return {
            name: find_segments(found_FS, threshold, median, self.rate) for name, (_, found_FS) in recordings.items()
        }

    def texts(self, prediction: Prediction) -> tuple[str, str]:
        found = find_segments(1 / (1 + np.exp(-prediction.values)), 0.5, 11, self.rate)
        return _text(found), _text(speech_of(prediction.target))

    def hypothesis_files(self, test: str, predictions: Sequence[Prediction]) -> dict[str, str | bytes]:
        prefix = "" if self.file_stem(test) == "test" else f"{test}/"
        files: dict[str, str | bytes] = {f"{prefix}frame_shift": f"{self.rate}\n"}
        for recording, (_, found_FS) in self._recordings(predictions).items():
            files[f"{prefix}scoring/predictions/{recording}.h5"] = _hdf5("T_hat", found_FS)
        return files


def _text(segments: Sequence[Segment]) -> str:
    return ", ".join(f"{segment.speaker} {segment.start:.2f} {segment.end:.2f}" for segment in segments)


def _hdf5(name: str, values: np.ndarray) -> bytes:
    import h5py

    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.create_dataset(name, data=values)
    return content.getvalue()
