"""Upstreams: frozen encoders that turn a list of waveforms into hidden states, as in s3prl.

An upstream is named by a string: ``fbank``, a training checkpoint (``.ckpt``), a run folder, an exported student (for
transformers or ONNX) or any other folder with a Hugging Face encoder (including Whisper's), a name on the Hugging Face
hub, or the path of a subclass of :class:`lightning_modules.teacher.Teacher` that needs no arguments
(``my_package.MyTeacher``). All but ``fbank`` are teachers, and :class:`TeacherUpstream` is the one way from a teacher
to an upstream.

Shapes: B batch, T samples (16 kHz), F frames, D width.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.frames import count_windows
from lightning_modules.deployment.onnx_encoder import OnnxEncoder, is_onnx_folder
from lightning_modules.export import checkpoint_in, is_of_own_kind, load_student
from lightning_modules.front_end import conv_frames, noise
from lightning_modules.hidden_states import encoder_states, last_state
from lightning_modules.lengths import window_and_hop
from lightning_modules.teacher import (
    HuggingFaceTeacher,
    Teacher,
    TeacherTargets,
    normalize_waveforms,
)
from lightning_modules.teacher_building import build_teacher, teacher_class
from lightning_modules.teacher_loading import WHISPER, read_config
from lightning_modules.whisper import WhisperTeacher

FBANK = "fbank"
CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
PROVENANCE = ("architectures", "dtype", "transformers_version")
"""Keys of a Hugging Face configuration that describe its origin and do not change what the model computes."""
OF_HEADS = ("classifier_proj_size", "id2label", "label2id", "use_weighted_layer_sum")
"""Keys of a head behind the encoder, which a folder with one has."""


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
        return _digest(f"{type(self).__name__} {self.extra_repr()} {self.architecture()}", self.state_dict())


def _digest(description: str, weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(description.encode())
    for key, value in sorted(weights.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class LoadedEncoder(Teacher):
    """A Hugging Face encoder that is loaded already, such as a student's.

    Args:
        model: the encoder, a ``PreTrainedModel`` with ``encoder.layers``.
        normalize: whether waveforms get zero mean and unit variance, as in the encoder's training.
        sample_rate: sample rate of the waveforms, in Hz.
    """

    def __init__(self, model: Any, normalize: bool, sample_rate: int = SAMPLE_RATE) -> None:
        super().__init__()
        self.model, self.normalize, self.sample_rate, self.init_args = model, normalize, sample_rate, {}
        self.num_layers = len(model.encoder.layers)
        self.hidden_size = int(getattr(model.config, "width_of_states", model.config.hidden_size))
        self.requires_grad_(False).eval()

    def num_frames(self, num_samples_B: Tensor) -> Tensor:
        return conv_frames(self.model.config, num_samples_B.to(torch.long))[-1]

    def all_states(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> list[Tensor]:
        return encoder_states(self.model, waveforms_BT, num_samples_B)

    def forward(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> TeacherTargets:
        # Without the states in between, each of which a compact student makes by a head.
        if not self.hidden_layers and self.output_layer == self.num_layers:
            return TeacherTargets(last_state(self.model, waveforms_BT, num_samples_B), {})
        states = self.all_states(waveforms_BT, num_samples_B)
        first = self.num_layers + 1 - len(states)  # 1 if the states have another width than the first layer's input
        hidden = {layer: states[layer - first] for layer in self.hidden_layers}
        return TeacherTargets(states[self.output_layer - first], hidden)


class TeacherUpstream(Upstream):
    """Any teacher as an upstream: the hidden states of :meth:`Teacher.all_states`, of waveforms that it normalises.

    Args:
        teacher: the encoder, with all its layers. It computes in the precision of the caller.
        name: name for messages.

    Attributes:
        window: samples in a frame's window.

    Raises:
        InputError: the encoder takes another sample rate, or its hidden states do not have the shape that it announces.
    """

    def __init__(self, teacher: Teacher, name: str) -> None:
        super().__init__()
        if teacher.sample_rate != SAMPLE_RATE:
            raise InputError(f"upstream {name!r} takes audio of {teacher.sample_rate} Hz; SUPERB's is {SAMPLE_RATE} Hz")
        self.teacher, self.name, self.width = teacher, name, teacher.hidden_size
        self.window, self.rate = window_and_hop(teacher.num_frames)
        self.num_states = self._checked_states()

    @torch.no_grad()
    def _checked_states(self) -> int:
        """Number of hidden states of a second of noise, whose shapes must be as announced."""
        with torch.random.fork_rng(devices=[]):
            states = self.teacher.all_states(noise())
        announced = (1, self.num_frames(noise().shape[1]), self.width)
        if found := [tuple(state.shape) for state in states if tuple(state.shape) != announced]:
            raise InputError(
                f"upstream {self.name!r} gives a second of audio a state of shape {found[0]}, but num_frames and "
                f"hidden_size announce {announced}"
            )
        return len(states)

    def num_frames(self, num_samples: int) -> int:
        return int(self.teacher.num_frames(torch.tensor([num_samples])))

    def forward(self, waveforms: Sequence[Tensor], longest: int | None = None) -> list[Tensor]:
        waveforms_BT, num_samples_B = _padded(waveforms, longest)
        if self.teacher.normalize:
            waveforms_BT = normalize_waveforms(waveforms_BT, num_samples_B)
        states = self.teacher.all_states(waveforms_BT, num_samples_B)
        if len(states) != self.num_states:
            # Hugging Face installs its capture hooks when a model first runs, so layers added later have none.
            raise InputError(
                f"upstream {self.name} has {self.num_states} hidden states but returned {len(states)}: "
                "use a copy loaded from its checkpoint"
            )
        return [state_BFD.float() for state_BFD in states]

    def digest(self) -> str:
        """Hash of the teacher's class, arguments, settings and weights.

        For the classes of this package it has its own form, by which finished runs and feature caches are found.
        """
        teacher: Any = self.teacher
        weights = teacher.state_dict()
        if isinstance(teacher, HuggingFaceTeacher) and teacher.final_norm:
            # Those of encoders that end in a norm once held the last state before it, under a digest without this key.
            weights |= {"last state": torch.tensor(1)}
        if type(teacher) in (HuggingFaceTeacher, LoadedEncoder):
            return _digest(f"EncoderUpstream normalize={teacher.normalize} {_described(teacher.model.config)}", weights)
        if type(teacher) is WhisperTeacher and not teacher.init_args["pad_to_30_seconds"]:
            renamed = {f"teacher.{key}": value for key, value in weights.items()}
            return _digest(f"WhisperUpstream  {_described(teacher.model.config)}", renamed)
        return _digest(json.dumps([teacher.spec(), teacher.settings], sort_keys=True, default=str), weights)


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
        return count_windows(num_samples, hop=self.rate)

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
    """A Hugging Face configuration as JSON, without the keys that describe its origin or a head."""
    values, default = config.to_diff_dict(), type(config)().to_diff_dict()
    values = {key: value for key, value in values.items() if key not in OF_HEADS}
    values |= {key: default[key] for key in OF_HEADS if key in default}
    return json.dumps({key: values[key] for key in sorted(values) if key not in PROVENANCE}, default=str)


def load_upstream(name: str, normalize: bool | None = None) -> Upstream:
    """Load the upstream with this name; see the module's docstring.

    Args:
        name: ``fbank``, a checkpoint, a folder, a name on the hub, or the path of a class.
        normalize: whether waveforms get zero mean and unit variance; ``None`` follows the model's own setting.

    Raises:
        InputError: there is no such encoder, or it cannot be read.
    """
    if name == FBANK:
        return FbankUpstream()
    try:
        teacher = _teacher(name, normalize)
    except ValueError as error:
        raise InputError(f"upstream {name!r}: {error}") from error
    return TeacherUpstream(teacher, name)


def _teacher(name: str, normalize: bool | None) -> Teacher:
    path = checkpoint_in(Path(name))
    if is_onnx_folder(path):
        if normalize is not None:
            raise InputError("an ONNX file normalises waveforms itself where it must: leave out --normalize")
        return OnnxEncoder(path)
    if path.is_file() or name.endswith(".ckpt") or is_of_own_kind(path):
        student = load_student(path)
        own: Any = student.meta["normalize"]
        return LoadedEncoder(student.model, own if normalize is None else normalize, student.meta["sample_rate"])
    if is_class_path(name):
        return _own_teacher(name, normalize)
    if read_config(name, None).model_type != WHISPER:
        return HuggingFaceTeacher(name, normalize)
    if normalize:
        raise InputError("Whisper's input is not normalised: leave out --normalize true")
    return WhisperTeacher(name)


def is_class_path(name: str) -> bool:
    """Whether an upstream's name is that of a class, ``package.module.ClassName``, and not of a file or folder."""
    return CLASS_PATH.fullmatch(name) is not None and not Path(name).exists()


def _own_teacher(class_path: str, normalize: bool | None) -> Teacher:
    own = teacher_class(class_path)
    given = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    parameters = signature(own).parameters.values()
    if needed := [one.name for one in parameters if one.default is one.empty and one.kind not in given]:
        raise InputError(
            f"the class needs the arguments {', '.join(needed)}: give a subclass whose __init__ takes none "
            "and sets them"
        )
    teacher = build_teacher(own())
    if normalize is not None:
        teacher.normalize = normalize
    return teacher
