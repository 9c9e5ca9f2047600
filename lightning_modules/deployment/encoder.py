"""One graph from waveforms to hidden states, which exporters of torch can follow.

The same states as those of :meth:`Teacher.all_states`. Nothing depends on values that are known only when the graph
runs: every batch is masked, whether it is padded or not, and normalisation of the waveform is a part of the graph.

Shapes: B batch, T samples (16 kHz), M mel frames (10 ms), F frames (20 ms), S hidden states, D width.
"""

import copy
import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from datamodules.errors import InputError
from datamodules.frames import count_windows
from lightning_modules.export import cut_layers
from lightning_modules.lengths import before_the_end, window_and_hop
from lightning_modules.superb.upstream import LoadedEncoder
from lightning_modules.teacher import HuggingFaceTeacher, Teacher, normalize_waveforms
from lightning_modules.whisper import HOP, MEL_HOP, WINDOW, LogMel, WhisperTeacher

States = Literal["last", "all"]


class DeployedEncoder(nn.Module):
    """A frozen encoder as one graph. A subclass writes ``hidden_states``.

    Args:
        teacher: the encoder; it is copied.
        states: ``last`` for the last hidden state alone, ``all`` for all that the encoder has: the first layer's input
            and all layers' outputs.

    Attributes:
        width: width D.
        num_layers: number of Transformer layers.
        num_parameters: number of parameters of the encoder.
        shortest, longest: samples of one frame, and the most that the encoder takes (``None``: no limit).
        hop: samples from one frame to the next.
        outputs: names of what a call returns.
    """

    longest: int | None = None

    def __init__(self, teacher: Teacher, states: States) -> None:
        super().__init__()
        self.outputs = ("hidden_states" if states == "all" else "last_hidden_state", "num_frames")
        self.teacher, self.states = copy.deepcopy(teacher), states
        self.width, self.num_layers = teacher.hidden_size, teacher.num_layers
        self.shortest, self.hop = window_and_hop(teacher.num_frames)
        self.num_parameters = sum(parameter.numel() for parameter in teacher.parameters())
        _make_plain(self.teacher)
        self.requires_grad_(False).eval()

    @abstractmethod
    def hidden_states(self, waveforms_BT: Tensor, num_samples_B: Tensor, valid_BT: Tensor) -> list[Tensor]:
        """Hidden states (B, F, D): all, or at least the last one."""

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and the number of frames of each item.

        Args:
            waveforms: samples (B, T), float32; those after an item's end are not used.
            num_samples: valid samples (B,), int64, of each item.

        Returns:
            ``last_hidden_state`` (B, F, D) or ``hidden_states`` (S, B, F, D), and ``num_frames`` (B,), int64. Frames
            after an item's last one have no meaning.
        """
        valid_BT = before_the_end(num_samples, waveforms.shape[1], waveforms.device)
        if self.teacher.normalize:
            waveforms = normalize_waveforms(waveforms, num_samples)
        else:
            waveforms = waveforms.masked_fill(~valid_BT, 0.0)
        states = self.hidden_states(waveforms, num_samples, valid_BT)
        return torch.stack(states) if self.states == "all" else states[-1], self.teacher.num_frames(num_samples)


def _make_plain(module: nn.Module) -> None:
    """Replace convolutions with weight norm by equal ones without, since the weights are constant now.

    ``remove_parametrizations`` changes a class that the copied encoder shares with the original.
    """
    for parent in list(module.modules()):
        for name, conv in parent.named_children():
            if isinstance(conv, nn.Conv1d) and parametrize.is_parametrized(conv):
                sizes = conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0]
                plain = nn.Conv1d(*sizes, conv.padding[0], groups=conv.groups, bias=conv.bias is not None)
                plain.load_state_dict({"weight": conv.weight} | ({} if conv.bias is None else {"bias": conv.bias}))
                setattr(parent, name, plain)


class DeployedHuggingFace(DeployedEncoder):
    """An encoder of the wav2vec 2.0 kind: a student, HuBERT, wav2vec 2.0, WavLM, data2vec-audio or UniSpeech-SAT."""

    def hidden_states(self, waveforms_BT: Tensor, num_samples_B: Tensor, valid_BT: Tensor) -> list[Tensor]:
        model: Any = self.teacher.model
        every = self.states == "all"
        outputs = model(waveforms_BT, attention_mask=valid_BT.long(), output_hidden_states=every)
        return [*(outputs.hidden_states[:-1] if every else ()), outputs.last_hidden_state]


class DeployedWhisper(DeployedEncoder):
    """Whisper's encoder with its log-mel features; utterances of up to 30 s."""

    def __init__(self, teacher: WhisperTeacher, states: States) -> None:
        super().__init__(teacher, states)
        self.log_mel = MatrixLogMel(teacher.log_mel)
        self.longest = teacher.model.max_source_positions * HOP

    def hidden_states(self, waveforms_BT: Tensor, num_samples_B: Tensor, valid_BT: Tensor) -> list[Tensor]:
        teacher: Any = self.teacher
        frames, last = count_windows(waveforms_BT.shape[1], WINDOW, HOP), self.num_layers
        mask_B11F, valid_BM = teacher.masks(num_samples_B, frames, waveforms_BT.device)
        features_BCM = self.log_mel(waveforms_BT, 2 * frames, valid_BM)
        states = teacher.states_of(features_BCM, frames, mask_B11F, range(last + 1))
        return [*(states[number] for number in range(last)), teacher.model.layer_norm(states[last])]


class MatrixLogMel(nn.Module):
    """Whisper's log-mel features with the Fourier transform as a convolution.

    ONNX's own transform is slow and inexact for windows of 400 samples in onnxruntime 1.32: magnitudes of noise were
    wrong by up to 9e-4, and 10 s took 0.13 s.

    Args:
        log_mel: the features to compute.
    """

    waves_S1W: Tensor

    def __init__(self, log_mel: LogMel) -> None:
        super().__init__()
        self.log_mel = log_mel
        time_W = torch.arange(WINDOW, dtype=torch.double)
        angles_SW = 2 * math.pi / WINDOW * torch.outer(torch.arange(WINDOW // 2 + 1, dtype=torch.double), time_W)
        waves_SW = torch.cat([angles_SW.cos(), angles_SW.sin()]) * torch.hann_window(WINDOW, dtype=torch.double)
        self.register_buffer("waves_S1W", waves_SW.float()[:, None], persistent=False)

    def forward(self, waveforms_BT: Tensor, num_frames: int, valid_BM: Tensor) -> Tensor:
        """Log-mel features (B, C, M), as :class:`LogMel`."""
        # Always padded and then cut, since an exporter cannot choose by the sign of what is missing.
        padded_BT = nn.functional.pad(waveforms_BT, (0, WINDOW))[:, : (num_frames - 1) * MEL_HOP + WINDOW]
        torch._check(padded_BT.shape[1] >= WINDOW)
        spectrum_BSM = nn.functional.conv1d(padded_BT[:, None], self.waves_S1W, stride=MEL_HOP)
        real_BSM, imaginary_BSM = spectrum_BSM.chunk(2, 1)
        return self.log_mel.of_power(real_BSM.square() + imaginary_BSM.square(), valid_BM)


def deployed(teacher: Teacher, states: States = "last") -> DeployedEncoder:
    """Make one graph of a teacher.

    Args:
        teacher: the encoder; it is copied.
        states: hidden states that the graph returns.

    Raises:
        InputError: the encoder is of a class that has no such graph.
    """
    if type(teacher) in (LoadedEncoder, HuggingFaceTeacher):
        return DeployedHuggingFace(teacher, states)
    if isinstance(teacher, WhisperTeacher):
        if teacher.init_args["pad_to_30_seconds"]:
            raise InputError("a Whisper encoder with pad_to_30_seconds=true has no graph: set it to false")
        return DeployedWhisper(teacher, states)
    raise InputError(
        f"{type(teacher).__name__} has no graph for ONNX: give a student, a Hugging Face encoder with convolutions "
        "over waveforms, or a Whisper"
    )


def cut(teacher: Any, layers: int) -> None:
    """Cut an encoder to its first ``layers`` layers, in place.

    Raises:
        InputError: it is of a class that cannot be cut, or does not have so many layers.
    """
    if type(teacher) not in (LoadedEncoder, HuggingFaceTeacher, WhisperTeacher):
        raise InputError(f"{type(teacher).__name__} cannot be cut: leave out --layers")
    cut_layers(teacher.model if isinstance(teacher, WhisperTeacher) else teacher.model.encoder, teacher.model, layers)
    teacher.num_layers = layers
