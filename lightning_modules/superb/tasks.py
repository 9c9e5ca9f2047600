"""What a task is: head, loss, metrics and output files.

A task is one small class. ``losses`` returns one loss per utterance, so that a batch can be split over ranks.
Predictions are plain values, so that ranks can send them to each other. The folds of a corpus are runs of their own. A
task that trains nothing has a recipe of 0 updates; one hidden state of the encoder is then chosen on dev.

Shapes: B batch, F frames, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Adam

from datamodules.superb.rows import Trials
from lightning_modules.superb.ctc import Decode
from lightning_modules.superb.tokenizers import Tokenizer

Preset = Literal["superb", "probe"]
PUBLISHED_TESTS = ("test", "test-clean")
"""Names of the test set that the leaderboard requires."""


class Item(Protocol):
    """The fields that a task reads of an utterance."""

    @property
    def key(self) -> str: ...

    @property
    def target(self) -> str: ...


class Prediction(NamedTuple):
    """A head's prediction for an utterance.

    Attributes:
        key: utterance id.
        target: target of the utterance.
        values: for CTC the classes of frames (F,), one class for each label list, an embedding (D,), or logits
            or features of frames (F, ...).
    """

    key: str
    target: str
    values: Any


@dataclass(frozen=True)
class ProbeStart:
    """Counts of the training set that set the bias of a probe's head: its frames and the symbols spoken in them."""

    frames: int
    symbols: int


@dataclass(frozen=True)
class TaskInputs:
    """The values from which tasks are built; each takes those that it needs.

    Attributes:
        labels: label lists of the corpus: classes, slot types (SF) or phones.
        lexicon: files of pronunciations for PR; ``None``: its targets are phones already.
        decode: decoding of the main metrics of PR and SF, which report the metrics of both decodings as well.
        trials: pairs of utterances to score by split, for ASV and QbE.
        fold: name of the corpus's fold, for the names of files; empty: it has none.
    """

    labels: Sequence[Sequence[str]] = ()
    lexicon: Sequence[str] | None = None
    decode: Decode = "fixed"
    trials: Mapping[str, Trials] = field(default_factory=dict)
    fold: str = ""


@dataclass(frozen=True)
class TaskRecipe:
    """A task's class and the training of its head; the data module defines the batches.

    Attributes:
        task: class of the task.
        lr: default learning rate, the only setting that SUPERB's rules allow to tune.
        updates: number of optimizer updates; 0: there is nothing to train, and dev chooses one hidden state.
        eval_every: updates from one evaluation on dev to the next.
        monitor: the dev metric that selects the checkpoint.
        higher_is_better: whether a higher value of ``monitor`` is better.
        clip_norm: largest norm of all gradients together.
        optimizer: Adam or a subclass (AdamW), with its own defaults except for the learning rate.
        spec_augment: whether features are masked and warped in training.
        presets: presets that it has; a task without "superb" is none of SUPERB's.
    """

    task: "type[Task]"
    lr: float
    updates: int
    eval_every: int
    monitor: str
    higher_is_better: bool
    clip_norm: float = 1.0
    optimizer: type[Adam] = Adam
    spec_augment: bool = False
    presets: tuple[Preset, ...] = ("superb", "probe")


class Task(ABC):
    """One task; see the module's docstring.

    Args:
        recipe: settings of its training.
        inputs: values from which it is built.

    Attributes:
        recipe: settings of its training.
        tokenizer: tokenizer of the targets; ``None`` if they are no sequences of symbols.
    """

    tokenizer: Tokenizer | None = None

    def __init__(self, recipe: TaskRecipe, inputs: TaskInputs) -> None:
        self.recipe = recipe

    def at_rate(self, rate: int) -> "Task":
        """This task for an upstream with ``rate`` samples from one frame to the next."""
        return self

    def unknown_words(self, target: str) -> list[str]:
        """Words of a target for which the task has no symbols."""
        return []

    @abstractmethod
    def build_head(self, width: int, probe: ProbeStart | None = None) -> nn.Module:
        """Build SUPERB's head, or a linear probe; it is called with features (B, F, D) and the frames of each item."""

    def features(
        self, features_BFD: Tensor, num_frames: list[int], num_samples: Sequence[int], longest: int
    ) -> tuple[Tensor, list[int]]:
        """The head's input and the frames of each item, from the featurizer's output with zeros beyond ``num_frames``.

        Args:
            features_BFD: features (B, F, D), padded to the longest item over all ranks.
            num_frames: valid frames of each item.
            num_samples: samples of each item.
            longest: samples of the longest item over all ranks.
        """
        return features_BFD, num_frames

    def weight(self, num_samples: int) -> float:
        """Weight of an utterance in the batch's loss, from its length in samples."""
        return 1.0

    @abstractmethod
    def losses(self, output: Any, num_frames: Sequence[int], items: Sequence[Item]) -> Tensor:
        """Loss (B,) of each utterance; the batch's loss is their sum, divided by all weights, over all ranks."""

    @abstractmethod
    def predict(self, output: Any, num_frames: Sequence[int], items: Sequence[Item]) -> list[Prediction]:
        """Prediction for each item from the head's output."""

    @abstractmethod
    def score(self, predictions: Sequence[Prediction], split: str) -> dict[str, float]:
        """Metrics over a whole split, in percent; the recipe's ``monitor`` is among them."""

    @abstractmethod
    def texts(self, prediction: Prediction) -> tuple[str, str]:
        """(hypothesis, reference) as readable text."""

    @abstractmethod
    def hypothesis_files(self, test: str, predictions: Sequence[Prediction]) -> dict[str, str | bytes]:
        """Contents of the hypothesis files by file name, in the leaderboard's format.

        Args:
            test: name of the test set; "test" and "test-clean" get the leaderboard's file names, others their own.
            predictions: predictions for the whole set.
        """

    def file_stem(self, test: str) -> str:
        """Start of the names of a test set's files."""
        return "test" if test in PUBLISHED_TESTS else test
