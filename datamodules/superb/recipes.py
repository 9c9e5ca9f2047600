"""The recipe of a task's batches; the constants of :mod:`datamodules.superb.registry` are those of s3prl v0.4.18."""

from dataclasses import dataclass
from typing import Literal

from datamodules.superb.effects import NO_EFFECTS, Effects
from datamodules.superb.rows import MIN_SAMPLES

Sampling = Literal["window", "halved", "balanced", "shuffled"]


@dataclass(frozen=True)
class DataRecipe:
    """Batches of one task.

    Attributes:
        sampling: kind of sampling. "window" takes ``batch_size`` neighbours of the list sorted by target length, from
            every start; "halved" takes fixed groups of the list sorted by audio length, full ones split in two;
            "balanced" draws with replacement, with equally likely classes; "shuffled" permutes the utterances.
        batch_size: utterances per micro-batch, over all ranks.
        accumulate: micro-batches per optimizer step.
        eval_batch_size: utterances per dev or test batch.
        train_max_samples: length in samples to which longer training utterances are cropped at random.
        silence_samples: length in samples to which ``_silence_`` recordings of train and dev are cropped at random.
        effects: effects on all audio.
        resample: whether audio of other rates is converted without being asked.
        min_frames: frames of the encoder in the shortest usable utterance.
        min_train_samples: samples of the shortest utterance of train.
        balanced_dev: whether dev is a balanced draw too, with as many utterances as dev has.
    """

    sampling: Sampling
    batch_size: int
    accumulate: int = 1
    eval_batch_size: int = 1
    train_max_samples: int | None = None
    silence_samples: int | None = None
    effects: Effects = NO_EFFECTS
    resample: bool = False
    min_frames: int = 1
    min_train_samples: int = MIN_SAMPLES
    balanced_dev: bool = False

    @property
    def effective_batch(self) -> int:
        """Utterances per optimizer update with full batches, over all ranks."""
        return self.batch_size * self.accumulate // (2 if self.sampling == "halved" else 1)
