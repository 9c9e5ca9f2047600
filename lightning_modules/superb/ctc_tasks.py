"""PR, ASR and SF, which predict a sequence of symbols from the frames.

Shapes: B batch, F frames, C classes.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_modules.superb.ctc import Decode, collapse, ctc_losses
from lightning_modules.superb.heads import BiLSTM, FrameLinear, ProbeLinear
from lightning_modules.superb.metrics import (
    character_error_rate,
    error_rate,
    slot_edit_f1,
    slot_type_f1,
    slot_value_cer,
    slot_value_wer,
)
from lightning_modules.superb.tasks import (
    PUBLISHED_TESTS,
    Item,
    Prediction,
    ProbeStart,
    Task,
    TaskInputs,
    TaskRecipe,
)
from lightning_modules.superb.tokenizers import (
    CharacterTokenizer,
    PhoneTokenizer,
    SlotTokenizer,
    Tokenizer,
    read_lexicon,
)

DECODES: tuple[Decode, ...] = ("fixed", "legacy")


class CtcTask(Task):
    """Base class of tasks with a CTC loss. A subclass chooses head, tokenizer and metrics.

    Attributes:
        head: class of SUPERB's head.
        decode: decoding of the main metrics.
    """

    head: type[FrameLinear | BiLSTM] = BiLSTM
    tokenizer: Tokenizer

    def __init__(self, recipe: TaskRecipe, inputs: TaskInputs) -> None:
        super().__init__(recipe, inputs)
        self.tokenizer, self.decode = self.build_tokenizer(inputs), inputs.decode

    @abstractmethod
    def build_tokenizer(self, inputs: TaskInputs) -> Tokenizer:
        """Build the tokenizer of the targets."""

    @abstractmethod
    def metrics(self, hypotheses: list[str], references: list[str]) -> dict[str, float]:
        """Metrics of one decoding."""

    def build_head(self, width: int, probe: ProbeStart | None = None) -> nn.Module:
        classes = len(self.tokenizer.symbols)
        if probe is None:
            return self.head(width, classes)
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

    def score(self, predictions: Sequence[Prediction], split: str) -> dict[str, float]:
        scores = {decode: self.metrics(*self._decoded(predictions, decode)) for decode in DECODES}
        both = {f"{name}_{decode}": scores[decode][name] for decode in DECODES for name in scores[decode]}
        return scores[self.decode] | both

    def _decoded(self, predictions: Sequence[Prediction], decode: Decode) -> tuple[list[str], list[str]]:
        """Hypotheses and references."""
        references = [self.tokenizer.reference(prediction.target) for prediction in predictions]
        return [self._hypothesis(prediction, decode) for prediction in predictions], references

    def _hypothesis(self, prediction: Prediction, decode: Decode) -> str:
        tokenizer = self.tokenizer
        return tokenizer.decode(collapse(prediction.values, tokenizer.blank, decode, tokenizer.eos))

    def texts(self, prediction: Prediction) -> tuple[str, str]:
        return self._hypothesis(prediction, self.decode), self.tokenizer.reference(prediction.target)

    def hypothesis_files(self, test: str, predictions: Sequence[Prediction]) -> dict[str, str | bytes]:
        pairs = [(prediction.key, *self.texts(prediction)) for prediction in predictions]
        return {
            f"{self.file_stem(test)}-hyp.ark": "".join(f"{key} {hypothesis}\n" for key, hypothesis, _ in pairs),
            f"{self.file_stem(test)}-ref.ark": "".join(f"{key} {reference}\n" for key, _, reference in pairs),
        }


class PhoneRecognition(CtcTask):
    """PR: phones, of words by a lexicon, or of the corpus's alignments without one."""

    head = FrameLinear
    tokenizer: PhoneTokenizer

    def build_tokenizer(self, inputs: TaskInputs) -> PhoneTokenizer:
        if inputs.lexicon is None:
            return PhoneTokenizer(inputs.labels[0])
        return PhoneTokenizer(lexicon=read_lexicon(inputs.lexicon))

    def unknown_words(self, target: str) -> list[str]:
        return self.tokenizer.missing(target)

    def metrics(self, hypotheses: list[str], references: list[str]) -> dict[str, float]:
        return {"per": error_rate(hypotheses, references)}


class SpeechRecognition(CtcTask):
    """ASR: characters, without a language model. s3prl's has its own decoder, which never had the legacy error."""

    def __init__(self, recipe: TaskRecipe, inputs: TaskInputs) -> None:
        super().__init__(recipe, replace(inputs, decode="fixed"))

    def build_tokenizer(self, inputs: TaskInputs) -> CharacterTokenizer:
        return CharacterTokenizer()

    def metrics(self, hypotheses: list[str], references: list[str]) -> dict[str, float]:
        return {"wer": error_rate(hypotheses, references)}

    def score(self, predictions: Sequence[Prediction], split: str) -> dict[str, float]:
        return self.metrics(*self._decoded(predictions, "fixed"))

    def file_stem(self, test: str) -> str:
        return f"{'test-clean' if test in PUBLISHED_TESTS else test}-noLM"


class SlotFilling(CtcTask):
    """SF: characters with marks around the value of each slot."""

    def build_tokenizer(self, inputs: TaskInputs) -> SlotTokenizer:
        return SlotTokenizer(inputs.labels[0])

    def metrics(self, hypotheses: list[str], references: list[str]) -> dict[str, float]:
        return {
            "slot_type_f1": slot_type_f1(hypotheses, references),
            "slot_value_cer": slot_value_cer(hypotheses, references),
        }

    def score(self, predictions: Sequence[Prediction], split: str) -> dict[str, float]:
        """Add metrics that s3prl logs but does not report; word and character errors include the slot marks."""
        hypotheses, references = self._decoded(predictions, self.decode)
        return super().score(predictions, split) | {
            "slot_value_wer": slot_value_wer(hypotheses, references),
            "slot_edit_f1_full": slot_edit_f1(hypotheses, references, full=True),
            "slot_edit_f1_part": slot_edit_f1(hypotheses, references, full=False),
            "wer": error_rate(hypotheses, references),
            "cer": character_error_rate(hypotheses, references),
        }


def blank_logit(start: ProbeStart, num_classes: int) -> float:
    """Bias of the blank that makes a head of zero weights predict the training set's share of symbols in frames."""
    symbols = max(1, min(start.symbols, start.frames - 1))
    blanks = max(1, start.frames - symbols)
    return float(torch.tensor(blanks * (num_classes - 1) / symbols).log())
