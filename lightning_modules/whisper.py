"""Whisper's encoder as a teacher, with log-mel features computed on the device and frames aligned with HuBERT's.

Source: Radford et al., "Robust speech recognition via large-scale weak supervision", 2022; the log-mel is that of
``WhisperFeatureExtractor``.

Whisper's own input is 30 s with silence after the utterance. Here the input is the utterance alone. Past its end the
input of the convolutions is zero and attention is masked, so padding in a batch does not change an item's targets.

Frame t of a HuBERT-layout student depends on samples [320 t, 320 t + 400). Mel frame k is therefore computed from
samples [160 k, 160 k + 400), and the two convolutions, of stride 1 and 2, centre frame t on mel frame 2 t.

Shapes: B batch, T samples (16 kHz), M mel frames (10 ms), F frames (20 ms), C mel bins, D width.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from datamodules.errors import InputError
from datamodules.frames import count_windows
from lightning_modules.compiling import compile_in_place
from lightning_modules.lengths import before_the_end, is_padded
from lightning_modules.precision import Precision, computing_in
from lightning_modules.taps import tapping
from lightning_modules.teacher import EncoderTeacher, TeacherTargets
from lightning_modules.teacher_loading import EXTRACTOR_FILE, WHISPER, load_extractor, load_weights, read_config

SAMPLE_RATE, WINDOW, MEL_HOP = 16_000, 400, 160
"""Sample rate in Hz, samples of a mel frame's window, and samples from one mel frame to the next."""
HOP = 2 * MEL_HOP
"""Samples from one frame to the next."""
DYNAMIC_RANGE = 8.0
"""Range of the log-mel: values more than this many decades below an utterance's loudest mel value are raised."""


class LogMel(nn.Module):
    """Whisper's log-mel features of each item's own samples, computed in float32 under autocast too.

    Args:
        filters_SC: filters from the power spectrum (201 bins) to mel bins.
    """

    filters_SC: Tensor
    window_W: Tensor

    def __init__(self, filters_SC: Tensor) -> None:
        super().__init__()
        self.register_buffer("filters_SC", filters_SC.float(), persistent=False)
        self.register_buffer("window_W", torch.hann_window(WINDOW), persistent=False)

    def forward(self, waveforms_BT: Tensor, num_frames: int, valid_BM: Tensor | None) -> Tensor:
        """Log-mel features (B, C, M) of the first ``num_frames`` mel frames; 0 where ``valid_BM`` is false.

        Args:
            waveforms_BT: waveforms that are zero past each item's end.
            num_frames: number of mel frames M.
            valid_BM: true for the mel frames of each item; ``None``: all frames are valid.
        """
        missing = (num_frames - 1) * MEL_HOP + WINDOW - waveforms_BT.shape[1]
        waveforms_BT = F.pad(waveforms_BT.float(), (0, missing))  # a negative number crops
        with computing_in("32", waveforms_BT.device):
            spectrum_BSM = torch.stft(
                waveforms_BT, WINDOW, MEL_HOP, window=self.window_W, center=False, return_complex=True
            )
            return self.of_power(spectrum_BSM.real.square() + spectrum_BSM.imag.square(), valid_BM)

    def of_power(self, power_BSM: Tensor, valid_BM: Tensor | None) -> Tensor:
        """Log-mel features (B, C, M) of power spectra (B, 201, M); 0 where ``valid_BM`` is false."""
        decades_BCM = (self.filters_SC.T @ power_BSM).clamp(min=1e-10).log10()
        heard_BCM = decades_BCM if valid_BM is None else decades_BCM.masked_fill(~valid_BM.unsqueeze(1), -torch.inf)
        floor_B11 = heard_BCM.amax((1, 2), keepdim=True) - DYNAMIC_RANGE
        features_BCM = (decades_BCM.maximum(floor_B11) + 4.0) / 4.0
        return features_BCM if valid_BM is None else features_BCM.masked_fill(~valid_BM.unsqueeze(1), 0.0)


def states_in_parts(
    states_of: Callable[[Tensor, Tensor], Sequence[Tensor]],
    waveforms_BT: Tensor,
    num_samples_B: Tensor,
    most_frames: int,
    least_samples: int = 0,
) -> list[Tensor]:
    """Compute the states (B, F, D) of utterances in parts of ``most_frames`` frames, without attention between them.

    Args:
        states_of: returns the states of waveforms (B, T) and their samples (B,).
        waveforms_BT: padded waveforms.
        num_samples_B: samples of each.
        most_frames: the most frames that ``states_of`` takes.
        least_samples: samples that an item has at least in every part, also in those after its end.
    """
    hop = most_frames * HOP  # from part to part; a part's last frame extends past it
    parts = []
    for start in range(0, count_windows(waveforms_BT.shape[1], WINDOW, HOP) * HOP, hop):
        part_BT = waveforms_BT[:, start : start + hop + WINDOW - HOP]
        parts.append(states_of(part_BT, (num_samples_B - start).clamp(least_samples, part_BT.shape[1])))
    return [torch.cat(states, dim=1) for states in zip(*parts, strict=True)]


class WhisperTeacher(EncoderTeacher):
    """The encoder of a Whisper model.

    Intermediate targets are the raw outputs of layers. The output target passes the encoder's final layer norm. A few
    dimensions of the raw outputs are far larger than the others: set ``model.objective.normalize_targets``. A student
    can copy no convolutions over waveforms from it: set ``model.student.front_end_init=random``.

    Args:
        model: hub name, or folder with ``config.json`` and weights, of a whole Whisper model or of its encoder alone.
        revision: branch, tag or commit on the hub.
        attn_implementation: ``sdpa`` or ``eager``; ``None`` lets Hugging Face choose.
        precision: ``32``, ``bf16`` or ``auto``, as in :class:`HuggingFaceTeacher`.
        compile: compile each layer with ``torch.compile``; one graph serves all.
        compile_backend: backend of ``torch.compile``.
        pad_to_30_seconds: pad every utterance with silence up to 30 s, as in Whisper's training; this is many times
            slower for short utterances.

    Raises:
        InputError: the model cannot be found, lacks weights, is not a Whisper model, or needs another log-mel.
    """

    layer_prefix = "model.layers."
    feed_forward_output = "fc2"
    sample_rate = SAMPLE_RATE

    def __init__(
        self,
        model: str = "openai/whisper-base",
        revision: str | None = None,
        attn_implementation: Literal["sdpa", "eager"] | None = None,
        precision: Literal["auto", "32", "bf16"] = "auto",
        compile: bool = False,
        compile_backend: str = "inductor",
        pad_to_30_seconds: bool = False,
    ) -> None:
        super().__init__(precision, compile, compile_backend)
        self.init_args = dict(
            model=model,
            revision=revision,
            attn_implementation=attn_implementation,
            precision=precision,
            compile=compile,
            compile_backend=compile_backend,
            pad_to_30_seconds=pad_to_30_seconds,
        )
        self._pads = pad_to_30_seconds
        self.model = load_encoder(model, revision, attn_implementation)
        self.num_layers, self.hidden_size = len(self.model.layers), self.model.config.d_model
        self.log_mel = LogMel(load_filters(model, revision, self.model.num_mel_bins))
        self.requires_grad_(False).eval()

    @property
    def encoder(self) -> Any:
        return self.model

    def all_states(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> list[Tensor]:
        """Hidden states (B, F, D): the input of the first layer and each layer's output, the last one's normed.

        An utterance of more than 30 s is computed in parts of 30 s, without attention between them.
        """
        if num_samples_B is None:
            num_samples_B = torch.full((len(waveforms_BT),), waveforms_BT.shape[1])
        return states_in_parts(self._all_states_of_part, waveforms_BT, num_samples_B, self.model.max_source_positions)

    def _all_states_of_part(self, waveforms_BT: Tensor, num_samples_B: Tensor) -> list[Tensor]:
        last = self.num_layers
        states = self.hidden_states(waveforms_BT, num_samples_B, range(last + 1))
        return [*(states[number] for number in range(last)), self.model.layer_norm(states[last])]

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"teacher.pad_to_30_seconds": self._pads}

    def num_frames(self, num_samples_B: Tensor) -> Tensor:
        return count_windows(num_samples_B.to(torch.long), WINDOW, HOP)

    def forward(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> TeacherTargets:
        if self._backend is not None:
            layers = self.model.layers  # a tap between the blocks of a layer must be in no graph
            compile_in_place([layer.self_attn for layer in layers] if self.feed_forward else layers, self._backend)
        return super().forward(waveforms_BT, num_samples_B)

    def _targets(self, waveforms_BT: Tensor, num_samples_B: Tensor | None, precision: Precision) -> TeacherTargets:
        with computing_in(precision, waveforms_BT.device):
            states = self.hidden_states(waveforms_BT, num_samples_B, {*self.hidden_layers, self.output_layer})
            output_BFD = states[self.output_layer]
            if not self.feed_forward:
                output_BFD = self.model.layer_norm(output_BFD)
        return TeacherTargets(output_BFD.float(), {layer: states[layer].float() for layer in self.hidden_layers})

    def hidden_states(
        self, waveforms_BT: Tensor, num_samples_B: Tensor | None, wanted: Collection[int]
    ) -> dict[int, Tensor]:
        """Raw outputs (B, F, D) of the ``wanted`` layers, by number; 0 is the input of the first one.

        Raises:
            InputError: an utterance is longer than the model's position embeddings (30 s).
        """
        width, positions = waveforms_BT.shape[1], self.model.max_source_positions
        frames = int(self.num_frames(torch.tensor(width)))
        if frames > positions:
            raise InputError(
                f"an utterance has {width} samples, and the teacher's positions end at {positions} frames: set "
                f"data.max_samples to {positions * HOP} or less"
            )
        heard, mask_B11F, valid_BM = positions if self._pads else frames, None, None
        if num_samples_B is not None and is_padded(num_samples_B, width):
            device = waveforms_BT.device
            waveforms_BT = waveforms_BT.masked_fill(~before_the_end(num_samples_B, width, device), 0.0)
            if not self._pads:
                mask_B11F, valid_BM = self.masks(num_samples_B, frames, device)
        states = self.states_of(self.log_mel(waveforms_BT, 2 * heard, valid_BM), heard, mask_B11F, wanted)
        return {number: state_BFD[:, :frames] for number, state_BFD in states.items()}

    def masks(self, num_samples_B: Tensor, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The additive mask (B, 1, 1, F) of attention, and the mask (B, 2 F) of valid mel frames."""
        # An utterance too short for a frame gets one, because attention needs at least one key.
        frames_B = self.num_frames(num_samples_B).clamp(min=1)
        past_BF = ~before_the_end(frames_B, frames, device)
        mask_B11F = torch.zeros(past_BF.shape, device=device).masked_fill(past_BF, -torch.inf)[:, None, None]
        return mask_B11F, before_the_end(2 * frames_B, 2 * frames, device)

    def states_of(
        self, features_BCM: Tensor, frames: int, mask_B11F: Tensor | None, wanted: Collection[int]
    ) -> dict[int, Tensor]:
        """Outputs (B, F, D) of the ``wanted`` layers, or of their feed-forward blocks, from 2 F frames of log-mel."""
        hidden_BDF = F.gelu(self.model.conv1(features_BCM))
        # The last frame of an utterance does not depend on conv1 past its end: the kernel of conv2 ends at 2 F - 1.
        hidden_BDF = F.gelu(self.model.conv2(hidden_BDF))
        hidden_BFD = hidden_BDF.transpose(1, 2) + self.model.embed_positions.weight[:frames]
        states = {0: hidden_BFD} if 0 in wanted else {}
        for number, layer in enumerate(self.model.layers, start=1):
            tapped = {number: (layer, self.feed_forward_output)} if self.feed_forward else {}
            with tapping(tapped) as taps:
                result = layer(hidden_BFD, attention_mask=mask_B11F)
            hidden_BFD = result[0] if isinstance(result, tuple) else result  # a tuple in transformers 5.0
            if number in wanted:
                states[number] = taps[number].output if taps else hidden_BFD
        return states


class WhisperEncoderAlone(WhisperEncoder):
    """An encoder that loads its weights from a whole model, without a warning about the other weights."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^proj_out\."]


def load_encoder(model: str, revision: str | None, attn_implementation: str | None) -> Any:
    """Load the encoder of a Whisper model in float32, with every weight from the checkpoint.

    Raises:
        InputError: the model does not exist, or is of another kind.
    """
    config = read_config(model, revision)
    if config.model_type != WHISPER:
        raise InputError(
            f"teacher model {model!r} is of type {config.model_type}, not Whisper: set "
            "model.teacher=lightning_modules.teacher.HuggingFaceTeacher, or give a Whisper model"
        )
    whole = {r"^(model\.)?encoder\.": ""}  # names of the encoder's weights in a whole model
    return load_weights(WhisperEncoderAlone, model, revision, attn_implementation, key_mapping=whole)


def load_filters(model: str, revision: str | None, num_bins: int) -> Tensor:
    """Mel filters (S, C) of the model's feature extractor; Whisper's default filters if it has none.

    Raises:
        InputError: the extractor cannot be read, or computes another log-mel than :class:`LogMel`.
    """
    extractor = load_extractor(model, revision) or WhisperFeatureExtractor(feature_size=num_bins)
    needed = {"feature_size": num_bins, "n_fft": WINDOW, "hop_length": MEL_HOP, "sampling_rate": SAMPLE_RATE}
    found = {name: getattr(extractor, name, None) for name in needed}
    if found != needed:
        raise InputError(
            f"the feature extractor of teacher {model!r} has {found}, but this Whisper needs {needed}: correct its "
            f"{EXTRACTOR_FILE}, or remove it to use these"
        )
    return torch.from_numpy(extractor.mel_filters)
