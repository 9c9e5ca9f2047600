"""Upstreams: frozen encoders that turn a list of waveforms into hidden states, as in s3prl.

An upstream is named by a string: ``fbank``, a training checkpoint (``.ckpt``), an exported student or any other folder
with a Hugging Face encoder (including Whisper's), or a name on the Hugging Face hub. For anything else write a subclass
of :class:`Upstream`.

Shapes: B batch, T samples (16 kHz), F frames, D width.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from lightning_modules.export import load_student
from lightning_modules.teacher import HuggingFaceTeacher, normalize_waveforms, valid_samples
from lightning_modules.teacher_loading import WHISPER, read_config
from lightning_modules.whisper import HOP, WINDOW, WhisperTeacher

FBANK = "fbank"
PROVENANCE = ("architectures", "dtype", "transformers_version")
"""Keys of a Hugging Face configuration that describe its origin and do not change what the model computes."""


class Upstream(nn.Module, ABC):
    """A frozen encoder. It stays in eval mode even after ``train()``, and a call runs under ``no_grad``.

    Attributes:
        name: the string that named it.
        rate: samples from one frame to the next.
        num_states: number of hidden states that a call returns.
        width: width D.
    """

    name: str
    rate: int
    num_states: int
    width: int

    @abstractmethod
    def forward(self, waveforms: Sequence[Tensor], longest: int | None = None) -> list[Tensor]:
        """Hidden states, each (B, F, D), of waveforms (T_i,) padded to ``longest`` samples (default: their longest)."""

    @abstractmethod
    def num_frames(self, num_samples: int) -> int:
        """Number of frames of one unpadded utterance; 0 if it is too short."""

    def train(self, mode: bool = True) -> "Upstream":
        return super().train(False)

    @torch.no_grad()
    def __call__(self, waveforms: Sequence[Tensor], longest: int | None = None) -> list[Tensor]:
        return super().__call__(waveforms, longest)

    def architecture(self) -> str:
        """Settings besides the weights that change the output, such as heads and strides; part of the digest."""
        return ""

    def digest(self) -> str:
        """Hash of the class, settings and weights, which identifies the features."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.extra_repr()} {self.architecture()}".encode())
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class EncoderUpstream(Upstream):
    """A Hugging Face encoder. It returns the input of the first Transformer layer and every layer's output.

    Padding is masked.

    Args:
        model: the encoder, a ``PreTrainedModel`` with ``encoder.layers``.
        normalize: whether waveforms get zero mean and unit variance, as in the encoder's training.
        name: name for messages.
    """

    def __init__(self, model: Any, normalize: bool, name: str) -> None:
        super().__init__()
        self.model, self.normalize, self.name = model, normalize, name
        config = model.config
        self.num_states, self.width = len(model.encoder.layers) + 1, int(config.hidden_size)
        self._convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        self.rate = 1
        for stride in config.conv_stride:
            self.rate *= stride
        self.requires_grad_(False).eval()

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"

    def architecture(self) -> str:
        return _described(self.model.config)

    def num_frames(self, num_samples: int) -> int:
        for kernel, stride in self._convolutions:
            num_samples = max(0, (num_samples - kernel) // stride + 1)
        return num_samples

    def forward(self, waveforms: Sequence[Tensor], longest: int | None = None) -> list[Tensor]:
        waveforms_BT, num_samples_B = _padded(waveforms, longest)
        if self.normalize:
            waveforms_BT = normalize_waveforms(waveforms_BT, num_samples_B)
        mask_BT = valid_samples(waveforms_BT, num_samples_B)
        states = self.model(waveforms_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
        if len(states) != self.num_states:
            # Hugging Face installs its capture hooks when a model first runs, so layers added later have none.
            raise InputError(
                f"upstream {self.name} has {self.num_states - 1} layers but returned {len(states)} hidden states: "
                "use a copy loaded from its checkpoint"
            )
        return [state_BFD.float() for state_BFD in states]


class WhisperUpstream(Upstream):
    """Whisper's encoder, with the input of the teacher: no padding to 30 s, and frames aligned with HuBERT's.

    It returns the input of the first layer and the output of each layer, the last one's after the final norm, as
    Hugging Face does. An utterance of more than 30 s is computed in parts of 30 s, without attention between them.

    Args:
        teacher: the Whisper teacher, with all its layers.
        name: name for messages.
    """

    rate = HOP

    def __init__(self, teacher: WhisperTeacher, name: str) -> None:
        super().__init__()
        self.teacher, self.name = teacher, name
        self.num_states, self.width = teacher.num_layers + 1, teacher.hidden_size

    def architecture(self) -> str:
        return _described(self.teacher.model.config)

    def num_frames(self, num_samples: int) -> int:
        return int(self.teacher.num_frames(torch.tensor(num_samples)))

    def forward(self, waveforms: Sequence[Tensor], longest: int | None = None) -> list[Tensor]:
        waveforms_BT, num_samples_B = _padded(waveforms, longest)
        hop = self.teacher.model.max_source_positions * HOP  # from part to part; a part's last frame extends past it
        parts = [
            self._part(waveforms_BT[:, start : start + hop + WINDOW - HOP], num_samples_B - start)
            for start in range(0, self.num_frames(waveforms_BT.shape[1]) * HOP, hop)
        ]
        return [torch.cat(states, dim=1).float() for states in zip(*parts, strict=True)]

    def _part(self, waveforms_BT: Tensor, num_samples_B: Tensor) -> list[Tensor]:
        states = self.teacher.hidden_states(
            waveforms_BT, num_samples_B.clamp(0, waveforms_BT.shape[1]), range(self.num_states)
        )
        last = self.num_states - 1
        return [*(states[number] for number in range(last)), self.teacher.model.layer_norm(states[last])]


class FbankUpstream(Upstream):
    """80 log-mel energies (25 ms windows, 10 ms apart), their first and second differences, normalised per utterance.

    There is one hidden state. Every dimension has mean 0 over an utterance, so a head that is linear up to its mean
    over time cannot distinguish utterances. With it KS, IC, SID and ER become constant classifiers.

    Band-limited audio (MP3, telephone) has bands that are always at the floor of the logarithm. They are 0 here. In
    s3prl the float32 mean of such a band has a rounding error, which is divided by a deviation of almost 0 plus 1e-10.
    The result is a constant that is large in some utterances and 0 in others.
    """

    name, rate, num_states, width = FBANK, 160, 1, 240

    def num_frames(self, num_samples: int) -> int:
        return max(0, (num_samples - 400) // 160 + 1)

    def forward(self, waveforms: Sequence[Tensor], longest: int | None = None) -> list[Tensor]:
        features_BFD = pad_sequence([self._features(waveform_T) for waveform_T in waveforms], batch_first=True)
        missing = self.num_frames(longest or 0) - features_BFD.shape[1]
        return [nn.functional.pad(features_BFD, (0, 0, 0, max(0, missing)))]

    @staticmethod
    def _features(waveform_T: Tensor) -> Tensor:
        from torchaudio.compliance.kaldi import fbank
        from torchaudio.functional import compute_deltas

        energies_CF = fbank(waveform_T[None], num_mel_bins=80, sample_frequency=SAMPLE_RATE).T
        # The mean is subtracted below anyway. Subtracting the first frame makes a constant band exactly 0.
        energies_CF = energies_CF - energies_CF[:, :1]
        deltas_CF = compute_deltas(energies_CF)
        features_FD = torch.cat([energies_CF, deltas_CF, compute_deltas(deltas_CF)]).T
        centred_FD = features_FD - features_FD.mean(0)
        return centred_FD / (features_FD.std(0, correction=min(1, len(features_FD) - 1)) + 1e-10)


def _padded(waveforms: Sequence[Tensor], longest: int | None) -> tuple[Tensor, Tensor]:
    """Waveforms (B, T) padded to the longest one or to ``longest``, and the samples (B,) of each, on the host."""
    waveforms_BT = pad_sequence(list(waveforms), batch_first=True)
    missing = (longest or 0) - waveforms_BT.shape[1]
    num_samples_B = torch.tensor([len(waveform_T) for waveform_T in waveforms])
    return nn.functional.pad(waveforms_BT, (0, max(0, missing))), num_samples_B


def _described(config: Any) -> str:
    """A Hugging Face configuration as JSON, without the keys that describe its origin."""
    values = config.to_diff_dict()
    return json.dumps({key: values[key] for key in sorted(values) if key not in PROVENANCE}, default=str)


def load_upstream(name: str, normalize: bool | None = None) -> Upstream:
    """Load the upstream with this name; see the module's docstring.

    Args:
        name: ``fbank``, a checkpoint, a folder, or a name on the hub.
        normalize: whether waveforms get zero mean and unit variance; ``None`` follows the model's own setting.

    Raises:
        InputError: there is no such encoder, or it cannot be read.
    """
    if name == FBANK:
        return FbankUpstream()
    if Path(name).is_file() or name.endswith(".ckpt"):
        student = load_student(name)
        own: Any = student.meta["normalize"]
        return EncoderUpstream(student.model, own if normalize is None else normalize, name)
    try:
        if read_config(name, None).model_type == WHISPER:
            if normalize:
                raise InputError("Whisper's input is not normalised: leave out --normalize true")
            return WhisperUpstream(WhisperTeacher(name), name)
        encoder = HuggingFaceTeacher(name, normalize)
    except ValueError as error:
        raise InputError(f"upstream {name!r}: {error}") from error
    if encoder.sample_rate != SAMPLE_RATE:
        raise InputError(f"upstream {name!r} takes audio of {encoder.sample_rate} Hz; SUPERB's is {SAMPLE_RATE} Hz")
    return EncoderUpstream(encoder.model, encoder.normalize, name)
