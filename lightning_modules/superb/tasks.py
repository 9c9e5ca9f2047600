"""The tasks: head, loss, metrics and output files of each.

A task is one small class. ``losses`` returns one loss per utterance, so that a batch can be split over ranks.
Predictions are plain values, so that ranks can send them to each other. Tasks without training (query by example) set
no updates. Several corpora per task (folds) are several runs.

Shapes: B batch, F frames, D width, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from datamodules.errors import InputError
from lightning_modules.superb.ctc import Decode, collapse, ctc_losses
from lightning_modules.superb.heads import BiLSTM, FrameLinear, MeanPoolLinear, ProbeLinear
from lightning_modules.superb.metrics import (
    accuracy,
    character_error_rate,
    error_rate,
    slot_edit_f1,
    slot_type_f1,
    slot_value_cer,
    slot_value_wer,
)
from lightning_modules.superb.recipes import SUPERB_TASKS, TASK_RECIPES, TaskRecipe
from lightning_modules.superb.tokenizers import CharacterTokenizer, SlotTokenizer, Tokenizer

DECODES: tuple[Decode, ...] = ("fixed", "legacy")
PUBLISHED_TESTS = ("test", "test-clean")
"""Names of the test set that the leaderboard requires."""


class Item(Protocol):
    """The fields that a task reads of an utterance."""

    @property
    def key(self) -> str: ...

    @property
    def target(self) -> str: ...


class Prediction(NamedTuple):
    """A head's prediction for an utterance: classes of frames (CTC), or one class for each label list."""

    key: str
    target: str
    labels: list[int]


@dataclass(frozen=True)
class ProbeStart:
    """Counts of the training set that set the bias of a probe's head: its frames and the symbols spoken in them."""

    frames: int
    symbols: int


class Task(ABC):
    """One task; see the module's docstring.

    Attributes:
        name: key of the task in the recipes.
        recipe: settings of its training.
    """

    name: str
    recipe: TaskRecipe

    def at_rate(self, rate: int) -> "Task":
        """This task for an upstream with ``rate`` samples from one frame to the next."""
        return self

    @abstractmethod
    def build_head(self, width: int, probe: ProbeStart | None = None) -> nn.Module:
        """Build SUPERB's head, or a linear probe; it is called with features (B, F, D) and the frames of each item."""

    @abstractmethod
    def losses(self, output: Any, num_frames: Sequence[int], items: Sequence[Item]) -> Tensor:
        """Loss (B,) of each utterance; the batch's loss is their mean over all ranks."""

    @abstractmethod
    def predict(self, output: Any, num_frames: Sequence[int], items: Sequence[Item]) -> list[Prediction]:
        """Prediction for each item from the head's output."""

    @abstractmethod
    def score(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Metrics over a whole set, in percent; the recipe's ``monitor`` is among them."""

    @abstractmethod
    def texts(self, prediction: Prediction) -> tuple[str, str]:
        """(hypothesis, reference) as readable text."""

    @abstractmethod
    def hypothesis_files(self, test: str, predictions: Sequence[Prediction]) -> dict[str, str]:
        """Contents of the hypothesis files by file name, in the leaderboard's format.

        Args:
            test: name of the test set; "test" and "test-clean" get the leaderboard's file names, others their own.
            predictions: predictions for the whole set.
        """


class CtcTask(Task):
    """PR, ASR and SF, which predict a sequence of symbols from the frames.

    Args:
        name: ``pr``, ``asr`` or ``sf``.
        tokenizer: tokenizer of the targets.
        decode: decoding of the main metrics; PR and SF report the metrics of both decodings as well.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, decode: Decode = "fixed") -> None:
        self.name, self.tokenizer, self.decode = name, tokenizer, decode
        self.recipe = TASK_RECIPES[name]

    def build_head(self, width: int, probe: ProbeStart | None = None) -> nn.Module:
        classes = len(self.tokenizer.symbols)
        if probe is None:
            return FrameLinear(width, classes) if self.name == "pr" else BiLSTM(width, classes)
        head = ProbeLinear(width, classes, pool=False)
        head.linear.bias.data[self.tokenizer.blank] = blank_logit(probe, classes)
        return head

    def losses(self, output: Tensor, num_frames: Sequence[int], items: Sequence[Item]) -> Tensor:
        targets = [self.tokenizer.encode(item.target) for item in items]
        return ctc_losses(output, num_frames, targets, self.tokenizer.blank)

    def predict(self, output: Tensor, num_frames: Sequence[int], items: Sequence[Item]) -> list[Prediction]:
        paths = output.argmax(-1).tolist()
        rows = zip(items, paths, num_frames, strict=True)
        return [Prediction(item.key, item.target, path[:frames]) for item, path, frames in rows]

    def score(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        references = [self.tokenizer.reference(prediction.target) for prediction in predictions]
        if self.name == "asr":  # s3prl's ASR has its own decoder, which never had the legacy error
            return self._metrics(self._decoded(predictions, "fixed"), references)
        scores = {decode: self._metrics(self._decoded(predictions, decode), references) for decode in DECODES}
        both = {f"{name}_{decode}": scores[decode][name] for decode in DECODES for name in scores[decode]}
        if self.name == "sf":
            both |= self._further_metrics(self._decoded(predictions, self.decode), references)
        return scores[self.decode] | both

    def _decoded(self, predictions: Sequence[Prediction], decode: Decode) -> list[str]:
        return [self._hypothesis(prediction, decode) for prediction in predictions]

    def _hypothesis(self, prediction: Prediction, decode: Decode) -> str:
        return self.tokenizer.decode(collapse(prediction.labels, self.tokenizer.blank, decode))

    def _metrics(self, hypotheses: list[str], references: list[str]) -> dict[str, float]:
        if self.name == "sf":
            return {
                "slot_type_f1": slot_type_f1(hypotheses, references),
                "slot_value_cer": slot_value_cer(hypotheses, references),
            }
        return {{"pr": "per", "asr": "wer"}[self.name]: error_rate(hypotheses, references)}

    def _further_metrics(self, hypotheses: list[str], references: list[str]) -> dict[str, float]:
        """SF metrics that s3prl logs but does not report; word and character errors include the slot marks."""
        return {
            "slot_value_wer": slot_value_wer(hypotheses, references),
            "slot_edit_f1_full": slot_edit_f1(hypotheses, references, full=True),
            "slot_edit_f1_part": slot_edit_f1(hypotheses, references, full=False),
            "wer": error_rate(hypotheses, references),
            "cer": character_error_rate(hypotheses, references),
        }

    def texts(self, prediction: Prediction) -> tuple[str, str]:
        decode = "fixed" if self.name == "asr" else self.decode
        return self._hypothesis(prediction, decode), self.tokenizer.reference(prediction.target)

    def hypothesis_files(self, test: str, predictions: Sequence[Prediction]) -> dict[str, str]:
        name = f"{'test-clean' if test in PUBLISHED_TESTS else test}-noLM" if self.name == "asr" else _stem(test)
        pairs = [(prediction.key, *self.texts(prediction)) for prediction in predictions]
        return {
            f"{name}-hyp.ark": "".join(f"{key} {hypothesis}\n" for key, hypothesis, _ in pairs),
            f"{name}-ref.ark": "".join(f"{key} {reference}\n" for key, _, reference in pairs),
        }


class ClassificationTask(Task):
    """KS, IC and SID, which predict one label from each list for a whole utterance; all must be right.

    Args:
        name: ``ks``, ``ic`` or ``sid``.
        labels: label lists: one, or three for IC.
    """

    def __init__(self, name: str, labels: Sequence[Sequence[str]]) -> None:
        self.name, self.labels = name, [list(names) for names in labels]
        self.recipe = TASK_RECIPES[name]
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

    def score(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        wanted = [self.classes(prediction.target) for prediction in predictions]
        found = [prediction.labels for prediction in predictions]
        return {"accuracy": accuracy(found, wanted, max(map(len, self.labels)))}

    def texts(self, prediction: Prediction) -> tuple[str, str]:
        found = [names[label] for names, label in zip(self.labels, prediction.labels, strict=True)]
        return " ".join(found), prediction.target.replace("\t", " ")

    def hypothesis_files(self, test: str, predictions: Sequence[Prediction]) -> dict[str, str]:
        suffix, separator = ("csv", ",") if self.name == "ic" else ("txt", " ")
        lines: dict[str, list[str]] = {"predict": [], "truth": []}
        for prediction in predictions:
            # The leaderboard lists KS's files by name alone, though a name may occur under several words.
            key = prediction.key.rpartition("/")[2] if self.name == "ks" else prediction.key
            found = (names[label] for names, label in zip(self.labels, prediction.labels, strict=True))
            lines["predict"].append(separator.join([key, *found]))
            lines["truth"].append(separator.join([key, *prediction.target.split("\t")]))
        return {f"{_stem(test)}_{kind}.{suffix}": "".join(f"{line}\n" for line in part) for kind, part in lines.items()}


def _stem(test: str) -> str:
    return "test" if test in PUBLISHED_TESTS else test


def blank_logit(start: ProbeStart, num_classes: int) -> float:
    """Bias of the blank that makes a head of zero weights predict the training set's share of symbols in frames."""
    symbols = max(1, min(start.symbols, start.frames - 1))
    blanks = max(1, start.frames - symbols)
    return float(torch.tensor(blanks * (num_classes - 1) / symbols).log())


def build_task(
    name: str, labels: Sequence[Sequence[str]], phones: Tokenizer | None = None, decode: Decode = "fixed"
) -> Task:
    """Build the task with this name.

    Args:
        name: ``pr``, ``asr``, ``sf``, ``ks``, ``ic`` or ``sid``.
        labels: the corpus's label lists; for SF its slot types.
        phones: tokenizer of PR.
        decode: decoding of the main metrics; see :class:`CtcTask`.

    Raises:
        InputError: there is no such task.
    """
    if name not in SUPERB_TASKS:
        raise InputError(f"there is no task {name!r}; choose one of {', '.join(SUPERB_TASKS)}")
    if name in ("ks", "ic", "sid"):
        return ClassificationTask(name, labels)
    if name == "pr":
        assert phones is not None
        return CtcTask(name, phones, decode)
    return CtcTask(name, CharacterTokenizer() if name == "asr" else SlotTokenizer(labels[0]), decode)
