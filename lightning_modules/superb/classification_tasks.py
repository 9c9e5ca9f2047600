"""KS, IC, SID and ER, which predict one label from each list for a whole utterance; all must be right.

Shapes: B batch, C classes, L label lists.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_modules.superb.heads import MeanPoolLinear, ProbeLinear
from lightning_modules.superb.metrics import accuracy
from lightning_modules.superb.tasks import Item, Prediction, ProbeStart, Task, TaskInputs, TaskRecipe


class ClassificationTask(Task):
    """Base class of tasks with label lists, which are the classes.

    Attributes:
        suffix: suffix of the hypothesis files.
        separator: text between the values of a line in them.
    """

    suffix, separator = "txt", " "

    def __init__(self, recipe: TaskRecipe, inputs: TaskInputs) -> None:
        super().__init__(recipe, inputs)
        self.labels = [list(names) for names in inputs.labels]
        self._index = [{label: index for index, label in enumerate(names)} for names in self.labels]

    def classes(self, target: str) -> list[int]:
        """Classes of a target's labels."""
        return [index[label] for index, label in zip(self._index, target.split("\t"), strict=True)]

    def build_head(self, width: int, probe: ProbeStart | None = None) -> nn.Module:
        logits = sum(map(len, self.labels))
        return ProbeLinear(width, logits, pool=True) if probe else MeanPoolLinear(width, logits)

    def losses(self, output: Tensor, num_frames: Sequence[int], items: Sequence[Item]) -> Tensor:
        classes_BL = torch.tensor([self.classes(item.target) for item in items], device=output.device)
        parts = zip(self._parts(output), classes_BL.unbind(1), strict=True)
        return torch.stack([nn.functional.cross_entropy(part, wanted, reduction="none") for part, wanted in parts]).sum(
            0
        )

    def predict(self, output: Tensor, num_frames: Sequence[int], items: Sequence[Item]) -> list[Prediction]:
        classes_BL = torch.stack([part_BC.argmax(-1) for part_BC in self._parts(output)], 1).tolist()
        return [Prediction(item.key, item.target, labels) for item, labels in zip(items, classes_BL, strict=True)]

    def _parts(self, output: Tensor) -> tuple[Tensor, ...]:
        return output.split([len(names) for names in self.labels], -1)

    def score(self, predictions: Sequence[Prediction], split: str) -> dict[str, float]:
        wanted = [self.classes(prediction.target) for prediction in predictions]
        found = [prediction.values for prediction in predictions]
        return {"accuracy": accuracy(found, wanted, max(map(len, self.labels)))}

    def texts(self, prediction: Prediction) -> tuple[str, str]:
        return " ".join(self._names(prediction)), prediction.target.replace("\t", " ")

    def _names(self, prediction: Prediction) -> list[str]:
        return [names[label] for names, label in zip(self.labels, prediction.values, strict=True)]

    def hypothesis_files(self, test: str, predictions: Sequence[Prediction]) -> dict[str, str | bytes]:
        lines: dict[str, list[str]] = {"predict": [], "truth": []}
        for prediction in predictions:
            lines["predict"].append(self.separator.join([prediction.key, *self._names(prediction)]))
            lines["truth"].append(self.separator.join([prediction.key, *prediction.target.split("\t")]))
        return {
            f"{self.file_stem(test)}_{kind}.{self.suffix}": "".join(f"{line}\n" for line in part)
            for kind, part in lines.items()
        }


class KeywordSpotting(ClassificationTask):
    """KS."""


class IntentClassification(ClassificationTask):
    """IC: action, object and location."""

    suffix, separator = "csv", ","


class SpeakerIdentification(ClassificationTask):
    """SID."""


class EmotionRecognition(ClassificationTask):
    """ER. The leaderboard's files name the fold."""

    def __init__(self, recipe: TaskRecipe, inputs: TaskInputs) -> None:
        super().__init__(recipe, inputs)
        self.fold = inputs.fold

    def file_stem(self, test: str) -> str:
        return "_".join(filter(None, (super().file_stem(test), self.fold)))
