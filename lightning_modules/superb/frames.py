"""Frame-level phone classification, a quick probe that is not one of SUPERB's tasks.

It needs far less speech than CTC, since every frame has a label. Shapes: B batch, F frames, C classes (phones).
"""

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.alignments import SILENCE, frame_labels, segments_of
from datamodules.frames import HOP
from lightning_modules.superb.heads import ProbeLinear
from lightning_modules.superb.tasks import Item, Prediction, ProbeStart, Task, TaskInputs, TaskRecipe


class FrameTask(Task):
    """Classify each frame by the phone at its centre.

    Attributes:
        phones: the classes, including silence; the corpus's one label list.
        rate: samples from one frame of the upstream to the next.
    """

    rate = HOP

    def __init__(self, recipe: TaskRecipe, inputs: TaskInputs) -> None:
        super().__init__(recipe, inputs)
        self.phones = list(inputs.labels[0])

    def at_rate(self, rate: int) -> "FrameTask":
        task = copy(self)
        task.rate = rate
        return task

    def build_head(self, width: int, probe: ProbeStart | None = None) -> nn.Module:
        return ProbeLinear(width, len(self.phones), pool=False)

    def labels(self, target: str, num_frames: int) -> np.ndarray:
        """Class of each frame (F,) of an utterance with this target."""
        return frame_labels(segments_of(target), num_frames, self.phones, hop=self.rate)

    def losses(self, output: Tensor, num_frames: Sequence[int], items: Sequence[Item]) -> Tensor:
        rows = zip(output, num_frames, items, strict=True)
        return torch.stack([self._loss(row_FC[:frames], item) for row_FC, frames, item in rows])

    def _loss(self, row_FC: Tensor, item: Item) -> Tensor:
        labels_F = torch.from_numpy(self.labels(item.target, len(row_FC))).to(row_FC.device)
        return nn.functional.cross_entropy(row_FC, labels_F)

    def predict(self, output: Tensor, num_frames: Sequence[int], items: Sequence[Item]) -> list[Prediction]:
        found = output.argmax(-1).tolist()
        rows = zip(items, found, num_frames, strict=True)
        return [Prediction(item.key, item.target, classes[:frames]) for item, classes, frames in rows]

    def score(self, predictions: Sequence[Prediction], split: str) -> dict[str, float]:
        """Percentage of correct frames, among all frames and among those that are not silent."""
        right, speech = (np.concatenate(parts) for parts in zip(*map(self._judged, predictions), strict=True))
        return {
            "accuracy": 100 * float(right.mean()),
            "accuracy_speech": 100 * float(right[speech].mean()) if speech.any() else 0.0,
        }

    def _judged(self, prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
        wanted_F = self.labels(prediction.target, len(prediction.values))
        return wanted_F == np.array(prediction.values), wanted_F != self.phones.index(SILENCE)

    def texts(self, prediction: Prediction) -> tuple[str, str]:
        wanted = self.labels(prediction.target, len(prediction.values)).tolist()
        hypothesis, reference = (" ".join(self.phones[k] for k in labels) for labels in (prediction.values, wanted))
        return hypothesis, reference

    def hypothesis_files(self, test: str, predictions: Sequence[Prediction]) -> dict[str, str | bytes]:
        pairs = [(prediction.key, *self.texts(prediction)) for prediction in predictions]
        return {
            f"{test}_predict.txt": "".join(f"{key} {hypothesis}\n" for key, hypothesis, _ in pairs),
            f"{test}_truth.txt": "".join(f"{key} {reference}\n" for key, _, reference in pairs),
        }
