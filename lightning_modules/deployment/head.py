"""A head trained by ``interstack superb`` behind its encoder, as one graph: waveforms in, labels or text out.

Each item of a batch has the frames that the encoder gives it, as if it were alone. Heads are trained and scored in
s3prl's padded batches, where shorter items keep up to one frame of padding; for one utterance both are the same.

Shapes: B batch, T samples (16 kHz), F frames (20 ms), S hidden states, D width, C classes, L label lists.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.errors import InputError
from lightning_modules.deployment.encoder import DeployedEncoder
from lightning_modules.lengths import before_the_end
from lightning_modules.superb.classification_tasks import ClassificationTask
from lightning_modules.superb.ctc_tasks import CtcTask
from lightning_modules.superb.featurizer import Featurizer, without_padding
from lightning_modules.superb.frames import FrameTask
from lightning_modules.superb.heads import BiLSTM
from lightning_modules.superb.tasks import Preset, Task
from lightning_modules.superb.upstream import TeacherUpstream
from lightning_modules.teacher import Teacher

DEPLOYABLE = (ClassificationTask, CtcTask, FrameTask)
"""Kinds of tasks whose heads name classes of an utterance or of its frames."""


@dataclass(frozen=True)
class TrainedHead:
    """A head and what is known of its training.

    Attributes:
        folder: result folder that it was read from.
        name: name of its task.
        preset: SUPERB's recipe, or the probe.
        task: its task with labels or symbols.
        featurizer, head: the best ones on dev, in eval mode.
        width: width D of the hidden states.
        upstream_digest: digest of the encoder that it was trained on.
        test: metrics of the first test set.
    """

    folder: str
    name: str
    preset: Preset
    task: Task
    featurizer: Featurizer
    head: nn.Module
    width: int
    upstream_digest: str
    test: dict[str, float]

    def require_fit(self, teacher: Teacher) -> None:
        """Refuse an encoder other than the one that the head was trained on.

        Raises:
            InputError: it has another number of hidden states, or other weights or settings.
        """
        upstream = TeacherUpstream(teacher, "of the head")
        if (self.featurizer.num_states, self.width) != (upstream.num_states, upstream.width):
            raise InputError(
                f"the head in {self.folder!r} reads {self.featurizer.num_states} hidden states of width {self.width}, "
                f"but the encoder has {upstream.num_states} of width {upstream.width}: a cut encoder needs its own "
                "head, trained on its exported folder"
            )
        if upstream.digest() != self.upstream_digest:
            raise InputError(
                f"the head in {self.folder!r} was trained on an encoder with other weights or settings (digest "
                f"{self.upstream_digest}, here {upstream.digest()}): give the one that `interstack superb` was given"
            )

    def described(self) -> dict[str, Any]:
        """Plain values that describe the head."""
        return {"task": self.name, "preset": self.preset, "folder": self.folder, "test": self.test} | self.classes()

    def classes(self) -> dict[str, Any]:
        """The names of its classes, in the order of the logits."""
        if isinstance(self.task, CtcTask):
            tokenizer = self.task.tokenizer
            return {"symbols": tokenizer.symbols, "pieces": tokenizer.pieces, "blank": tokenizer.blank}
        if isinstance(self.task, FrameTask):
            return {"phones": self.task.phones}
        assert isinstance(self.task, ClassificationTask)
        return {"labels": self.task.labels}


class Reading(NamedTuple):
    """How logits become text.

    Attributes:
        result: name of the readable result: labels (B, L), or symbols or phones (B, F).
        texts: texts to choose from.
        numbers: a function of logits and frames (B,) that gives the number of each text of the result.
    """

    result: str
    texts: list[str]
    numbers: Callable[[Tensor, Tensor], Tensor]


def reading_of(task: Task) -> Reading:
    """How the logits of a task's head become text."""
    if isinstance(task, CtcTask):
        return Reading("symbols", task.tokenizer.pieces, partial(spoken, blank=task.tokenizer.blank))
    if isinstance(task, FrameTask):
        return Reading("phones", [*task.phones, ""], partial(of_frames, after_the_end=len(task.phones)))
    assert isinstance(task, ClassificationTask)
    sizes = [len(names) for names in task.labels]
    return Reading("labels", [label for names in task.labels for label in names], partial(of_lists, sizes=sizes))


def of_lists(logits_BC: Tensor, num_frames_B: Tensor, sizes: list[int]) -> Tensor:
    """Best class (B, L) of each list, counted over all lists."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    parts = zip(logits_BC.split(sizes, -1), starts, strict=True)
    return torch.stack([part_BC.argmax(-1) + start for part_BC, start in parts], 1)


def of_frames(logits_BFC: Tensor, num_frames_B: Tensor, after_the_end: int) -> Tensor:
    """Best class (B, F) of each frame, and ``after_the_end`` beyond an item's frames."""
    valid_BF = before_the_end(num_frames_B, logits_BFC.shape[1], logits_BFC.device)
    return logits_BFC.argmax(-1).masked_fill(~valid_BF, after_the_end)


def spoken(logits_BFC: Tensor, num_frames_B: Tensor, blank: int) -> Tensor:
    """Best path (B, F) with blanks in place of repeats, which is the ``fixed`` decoding of CTC, and after the end."""
    path_BF = of_frames(logits_BFC, num_frames_B, blank)
    before_BF = nn.functional.pad(path_BF, (1, 0), value=blank)[:, :-1]
    return path_BF.masked_fill(path_BF == before_BF, blank)


class DeployedHead(nn.Module):
    """A head behind its encoder.

    Args:
        encoder: the encoder, with all hidden states.
        trained: the head that was trained on it.

    Attributes:
        outputs: names of what a call returns.
        result: name of the readable result, in place of its numbers.
        texts: texts of the readable result.
    """

    def __init__(self, encoder: DeployedEncoder, trained: TrainedHead) -> None:
        super().__init__()
        self.encoder, self.featurizer = encoder, trained.featurizer
        self.head = LstmOfOnnx(trained.head) if isinstance(trained.head, BiLSTM) else trained.head
        self.result, self.texts, self.numbers = reading_of(trained.task)
        self.outputs = "logits", "num_frames", "numbers"
        self.requires_grad_(False).eval()

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the number of frames of each item, and the numbers of the texts of the readable result.

        Args:
            waveforms: samples (B, T), float32; those after an item's end are not used.
            num_samples: valid samples (B,), int64, of each item.

        Returns:
            ``logits`` (B, C), or (B, F, C) where those after an item's last frame have no meaning; ``num_frames`` (B,);
            numbers (B, L) or (B, F), int64.
        """
        states_SBFD, num_frames_B = self.encoder(waveforms, num_samples)
        features_BFD = without_padding(self.featurizer(states_SBFD.unbind()), num_frames_B)
        logits = self.head(features_BFD, num_frames_B)
        return logits, num_frames_B, self.numbers(logits, num_frames_B)


class LstmOfOnnx(nn.Module):
    """A head of LSTMs that is ONNX's operator in an exported graph, since torch's packed sequences have no equal there.

    The operator takes the frames of each item itself and starts its backward direction at their last one. Torch cannot
    export ``pack_padded_sequence`` (pytorch issue 112044), and its own LSTM fixes the number of frames.

    Args:
        head: the head.
    """

    def __init__(self, head: BiLSTM) -> None:
        super().__init__()
        self.head = head

    def forward(self, features_BFD: Tensor, num_frames_B: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return self.head(features_BFD, num_frames_B.tolist())
        hidden_BFD = self.head.projector(features_BFD)
        for lstm in self.head.layers:
            hidden_BFD = _onnx_lstm(lstm, hidden_BFD, num_frames_B)
        return self.head.linear(hidden_BFD)


def _onnx_lstm(lstm: Any, hidden_BFD: Tensor, num_frames_B: Tensor) -> Tensor:
    """ONNX's LSTM operator with the weights of a bidirectional layer."""

    def both(name: str) -> Tensor:
        return torch.stack([_in_order(getattr(lstm, name)), _in_order(getattr(lstm, f"{name}_reverse"))])

    biases = torch.cat([both("bias_ih_l0"), both("bias_hh_l0")], 1)
    batch, frames, _ = hidden_BFD.shape
    output_F2BD = torch.onnx.ops.symbolic(
        "LSTM",
        [hidden_BFD.transpose(0, 1), both("weight_ih_l0"), both("weight_hh_l0"), biases, num_frames_B.int()],
        {"hidden_size": lstm.hidden_size, "direction": "bidirectional"},
        dtype=hidden_BFD.dtype,
        shape=(frames, 2, batch, lstm.hidden_size),
    )
    return output_F2BD.permute(2, 0, 1, 3).flatten(2)


def _in_order(weights: Tensor) -> Tensor:
    """Weights of the gates of one direction, from torch's order (input, forget, cell, output) to ONNX's."""
    into, forget, cell, out = weights.chunk(4)
    return torch.cat([into, out, forget, cell])
