"""Phone probe: what can a linear layer read from a frozen encoder? In the manner of SUPERB's phoneme
recognition.

As there: frozen encoder, softmax-weighted sum of all hidden states (the input of the first layer included),
linear CTC head, greedy decoding, phone error rate over held-out speakers. In miniature: one linear layer
instead of two, a few hundred steps instead of 100,000, phones from alignments, and hidden states computed
once and kept, since nothing below them changes. So few steps need a good start and end: hidden states are
standardised by the training speakers' statistics, the head starts as the best one that hears nothing, and the
learning rate falls to zero. From random weights, a phone's frames can belong to another phone at the start, and a
linear head does not find its way out of that; without the blank's share, it names a phone in every frame and inserts
some at each transition.

Shapes: B batch, T samples (16 kHz), F frames, D width, L hidden states (depth + 1), C classes (blank and
    phones).
"""

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics.functional.text import word_error_rate
from transformers import HubertModel

from lightning_modules.teacher import normalize_waveforms

logger = logging.getLogger(__name__)

BLANK = 0


class Utterance(Protocol):
    """What the probe needs of an utterance."""

    @property
    def waveform_T(self) -> Tensor:
        """float32, 16 kHz."""

    @property
    def phones(self) -> list[str]:
        """What is said, without silence."""


class Corpus(Protocol):
    """What the probe needs of a corpus; ``datamodules.phones`` reads one."""

    @property
    def phones(self) -> list[str]:
        """The inventory."""

    @property
    def train(self) -> Sequence[Utterance]:
        """Training speakers."""

    @property
    def test(self) -> Sequence[Utterance]:
        """Held-out speakers."""


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        per: phone error rate on the held-out speakers in percent (edits over reference phones).
        train_loss: mean CTC loss of the last tenth of the steps.
        layer_weights: share of each hidden state in the weighted sum; index 0 is the input of the first
            layer.
        seconds: wall-clock time of the whole probe.
    """

    per: float
    train_loss: float
    layer_weights: list[float]
    seconds: float


class Example(NamedTuple):
    """Stored hidden states of one utterance, and its phones as classes."""

    hidden_LFD: Tensor  # float16
    targets: Tensor  # (phones,) int64, from 1


class ProbeBatch(NamedTuple):
    """Examples padded to the longest."""

    hidden_LBFD: Tensor  # float32
    num_frames: Tensor  # (B,)
    targets: Tensor  # all examples' one after another
    num_targets: Tensor  # (B,)


def greedy_decode(classes_F: Sequence[int]) -> list[int]:
    """Best path of CTC: collapse repeats, then drop blanks; a blank in between keeps a doubled phone."""
    return [label for label, _ in itertools.groupby(classes_F) if label != BLANK]


def phone_error_rate(hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float:
    """Edit distance summed over all utterances, over all reference phones (micro average), in percent."""
    texts = [[" ".join(map(str, phones)) for phones in side] for side in (hypotheses, references)]
    return 100 * float(word_error_rate(*texts))


def hidden_states(model: HubertModel, waveform_T: Tensor, normalize: bool) -> Tensor:
    """All hidden states (L, F, D) of one utterance, float32 on the CPU.

    Raises:
        ValueError: the model returns another number of them than its depth promises. Hugging Face fixes what
            it captures when a model first runs, so that layers added later can be missing in silence.
    """
    waveform_1T = waveform_T.unsqueeze(0).to(model.device)
    if normalize:
        waveform_1T = normalize_waveforms(waveform_1T)
    states = model(waveform_1T, output_hidden_states=True).hidden_states
    if len(states) != len(model.encoder.layers) + 1:
        raise ValueError(
            f"the model has {len(model.encoder.layers)} layers but returned {len(states)} hidden states: "
            "probe a copy loaded from its checkpoint"
        )
    return torch.cat(states).float().cpu()


@torch.no_grad()
def compute_examples(
    model: HubertModel, utterances: Sequence[Utterance], phones: Sequence[str], normalize: bool
) -> list[Example]:
    """Hidden states of each utterance alone, without padding, which would change the features."""
    index = {phone: number for number, phone in enumerate(phones, BLANK + 1)}
    was_training = model.training
    model.eval()
    examples = [
        Example(
            hidden_states(model, utterance.waveform_T, normalize).half(),
            torch.tensor([index[phone] for phone in utterance.phones]),
        )
        for utterance in utterances
    ]
    model.train(was_training)
    return examples


def stack_examples(examples: Sequence[Example]) -> ProbeBatch:
    """Pad hidden states to the longest example; targets are joined, as ``ctc_loss`` takes them."""
    num_frames = torch.tensor([example.hidden_LFD.shape[1] for example in examples])
    num_hidden, _, width = examples[0].hidden_LFD.shape
    # Layers outermost and contiguous: the weighted sum, most of a step, is then one pass over memory.
    padded_LBFD = torch.zeros(num_hidden, len(examples), int(num_frames.max()), width)
    for item, example in enumerate(examples):
        padded_LBFD[:, item, : num_frames[item]] = example.hidden_LFD
    return ProbeBatch(
        padded_LBFD,
        num_frames,
        torch.cat([example.targets for example in examples]),
        torch.tensor([len(example.targets) for example in examples]),
    )


def statistics(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (L, D) over all frames; the latter is 1 where a dimension is constant."""
    frames = sum(example.hidden_LFD.shape[1] for example in examples)
    mean_LD = torch.stack([example.hidden_LFD.double().sum(1) for example in examples]).sum(0) / frames
    squares = [(example.hidden_LFD.double() - mean_LD[:, None]).square().sum(1) for example in examples]
    std_LD = (torch.stack(squares).sum(0) / frames).sqrt()
    return mean_LD.float(), std_LD.where(std_LD > 1e-4, 1.0).float()


def standardise(examples: Sequence[Example], mean_LD: Tensor, std_LD: Tensor) -> list[Example]:
    """Examples with zero mean and a variance of 1 / D: frames have a norm of about 1, whatever the width."""
    scale_LD = std_LD * std_LD.shape[1] ** 0.5
    return [
        example._replace(hidden_LFD=((example.hidden_LFD - mean_LD[:, None]) / scale_LD[:, None]).half())
        for example in examples
    ]


def blank_logit(examples: Sequence[Example], num_classes: int) -> float:
    """Bias of the blank with which a head of zeros is the best that hears nothing: one phone in F / phones frames."""
    frames = sum(example.hidden_LFD.shape[1] for example in examples)
    phones = min(sum(len(example.targets) for example in examples), frames - 1)
    return math.log((frames - phones) / (phones / (num_classes - 1)))


class PhoneProbe(L.LightningModule):
    """Weighted sum of hidden states and a linear CTC head.

    Args:
        num_hidden: hidden states L.
        width: D.
        num_classes: C, with the blank.
        blank: the blank's bias at the start; all other weights are zero.
        lr: Adam's learning rate at the first step; it falls linearly to zero.
        steps: optimizer steps.
    """

    def __init__(self, num_hidden: int, width: int, num_classes: int, blank: float, lr: float, steps: int) -> None:
        super().__init__()
        self.lr, self.steps = lr, steps
        self.layer_logits = nn.Parameter(torch.zeros(num_hidden))
        self.head = nn.Linear(width, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.head.bias.data[BLANK] = blank
        self.losses: list[float] = []
        self.errors: list[tuple[list[int], list[int]]] = []

    def forward(self, hidden_LBFD: Tensor) -> Tensor:
        """Log-probabilities (B, F, C)."""
        summed_BFD = torch.tensordot(self.layer_logits.softmax(0), hidden_LBFD, 1)
        return self.head(summed_BFD).log_softmax(-1)

    def training_step(self, batch: ProbeBatch, batch_idx: int) -> Tensor:
        scores_FBC = self(batch.hidden_LBFD).transpose(0, 1)
        loss = nn.functional.ctc_loss(
            scores_FBC, batch.targets, batch.num_frames, batch.num_targets, blank=BLANK, zero_infinity=True
        )
        self.losses.append(float(loss.detach()))
        return loss

    def test_step(self, batch: ProbeBatch, batch_idx: int) -> None:
        classes_BF = self(batch.hidden_LBFD).argmax(-1)
        references = batch.targets.split(batch.num_targets.tolist())
        for classes_F, frames, reference in zip(classes_BF, batch.num_frames, references, strict=True):
            self.errors.append((greedy_decode(classes_F[:frames].tolist()), reference.tolist()))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class RandomOrder(Sampler[int]):
    """``length`` items, one permutation after another; a function of the seed."""

    def __init__(self, count: int, length: int, seed: int) -> None:
        self.count, self.length, self.seed = count, length, seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        passes = (torch.randperm(self.count, generator=generator).tolist() for _ in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(passes), self.length)


def phone_probe(
    model: HubertModel,
    corpus: Corpus,
    seed: int = 0,
    steps: int = 300,
    lr: float = 0.1,
    batch_size: int = 16,
    normalize: bool = False,
    progress_bar: bool = False,
) -> ProbeResult:
    """Train and score a probe; the model is left as it was.

    The head is trained on the CPU, wherever the model is: it is tiny, and CTC's gradient on CUDA is not
    deterministic. The hidden states of the corpus must fit into memory (2 L D bytes per frame, 50 frames a
    second).

    Args:
        model: the encoder; it is run in eval mode without gradients.
        corpus: utterances of training and held-out speakers.
        seed: of the order.
        steps: optimizer steps.
        lr: learning rate; the best one depends on the encoder, as in SUPERB.
        batch_size: utterances per step.
        normalize: whether the model takes waveforms of zero mean and unit variance.
        progress_bar: show Lightning's.
    """
    started = time.perf_counter()
    train = compute_examples(model, corpus.train, corpus.phones, normalize)
    test = compute_examples(model, corpus.test, corpus.phones, normalize)
    num_hidden, _, width = train[0].hidden_LFD.shape
    num_classes = len(corpus.phones) + 1
    mean_LD, std_LD = statistics(train)
    train, test = standardise(train, mean_LD, std_LD), standardise(test, mean_LD, std_LD)
    probe = PhoneProbe(num_hidden, width, num_classes, blank_logit(train, num_classes), lr, steps)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,  # the order is as long as the training
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress_bar,
    )
    order = RandomOrder(len(train), steps * batch_size, seed)
    # A list is all that a loader needs of a data set.
    train_set, test_set = cast(Dataset[Example], train), cast(Dataset[Example], test)
    trainer.fit(probe, DataLoader(train_set, batch_size, sampler=order, collate_fn=stack_examples))
    trainer.test(probe, DataLoader(test_set, batch_size, collate_fn=stack_examples), verbose=False)
    hypotheses, references = zip(*probe.errors, strict=True)
    last = probe.losses[-max(1, steps // 10) :]
    return ProbeResult(
        per=phone_error_rate(hypotheses, references),
        train_loss=sum(last) / len(last),
        layer_weights=probe.layer_logits.detach().softmax(0).tolist(),
        seconds=time.perf_counter() - started,
    )
