"""ASV, which compares the speakers of two recordings. Shapes: B batch, C speakers of train, D width of an embedding."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.superb.rows import Trial
from lightning_modules.superb.heads import SpeakerProbe, XVector, am_softmax_losses
from lightning_modules.superb.tasks import Item, Prediction, ProbeStart, Task, TaskInputs, TaskRecipe
from lightning_modules.superb.verification import equal_error_rate, min_dcf


class SpeakerVerification(Task):
    """Score pairs of recordings by the cosine of their embeddings.

    The head is trained to classify the speakers of train with an additive margin; it returns cosines (B, C) to the
    speakers in training, and embeddings (B, D) otherwise.
    """

    def __init__(self, recipe: TaskRecipe, inputs: TaskInputs) -> None:
        super().__init__(recipe, inputs)
        self.speakers, self.trials = list(inputs.labels[0]), inputs.trials
        self._index = {speaker: index for index, speaker in enumerate(self.speakers)}

    def build_head(self, width: int, probe: ProbeStart | None = None) -> nn.Module:
        return (SpeakerProbe if probe else XVector)(width, len(self.speakers))

    def losses(self, output: Tensor, num_frames: Sequence[int], items: Sequence[Item]) -> Tensor:
        classes_B = torch.tensor([self._index[item.target] for item in items], device=output.device)
        return am_softmax_losses(output, classes_B)

    def predict(self, output: Tensor, num_frames: Sequence[int], items: Sequence[Item]) -> list[Prediction]:
        embeddings_BD = output.float().cpu().numpy()
        return [Prediction(item.key, item.target, row_D) for item, row_D in zip(items, embeddings_BD, strict=True)]

    def score(self, predictions: Sequence[Prediction], split: str) -> dict[str, float]:
        """Equal error rate, and the least detection cost at a prior of 1 % (from 0 to 1); NaN if the head diverged."""
        scores_N = self._cosines(predictions, self.trials[split].pairs)
        if not np.isfinite(scores_N).all():
            return {"eer": float("nan"), "min_dcf": float("nan")}
        matches_N = np.array([pair.matches for pair in self.trials[split].pairs])
        return {"eer": equal_error_rate(scores_N, matches_N), "min_dcf": min_dcf(scores_N, matches_N)}

    def _cosines(self, predictions: Sequence[Prediction], pairs: Sequence[Trial]) -> np.ndarray:
        place = {prediction.key: number for number, prediction in enumerate(predictions)}
        embeddings_ND = np.stack([prediction.values for prediction in predictions])
        first, second = zip(*((place[pair.first], place[pair.second]) for pair in pairs), strict=True)
        return (embeddings_ND[list(first)] * embeddings_ND[list(second)]).sum(-1)

    def texts(self, prediction: Prediction) -> tuple[str, str]:
        return " ".join(f"{value:.3f}" for value in prediction.values[:5]) + " ...", prediction.target

    def hypothesis_files(self, test: str, predictions: Sequence[Prediction]) -> dict[str, str | bytes]:
        pairs = self.trials[test].pairs if predictions else []
        scores = self._cosines(predictions, pairs) if predictions else np.zeros(0)
        lines: dict[str, list[str]] = {"predict": [], "truth": []}
        for pair, score in zip(pairs, scores, strict=True):
            lines["predict"].append(f"{pair.first}_{pair.second} {score}\n")
            lines["truth"].append(f"{pair.first}_{pair.second} {int(pair.matches)}\n")
        return {f"{self.file_stem(test)}_{kind}.txt": "".join(part) for kind, part in lines.items()}
