"""Whisper's encoder as a teacher: log-mel features on the device, frames where HuBERT has them.

Source: Radford et al., "Robust speech recognition via large-scale weak supervision", 2022; the log-mel is that of
``WhisperFeatureExtractor``.

Whisper hears 30 s, silence included. Here an utterance is heard alone: attention is masked past its end, and what the
convolutions see there is zero, so that a padded batch has the targets of its items alone.

Frame t of a HuBERT-layout student sees samples [320 t, 320 t + 400). Mel frame k is therefore taken from samples
[160 k, 160 k + 400), and the two convolutions, of stride 1 and 2, put frame t on mel frame 2 t.

Shapes: B batch, T samples (16 kHz), M mel frames (10 ms), F frames (20 ms), C mel bins, D width.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lightning_modules.compiling import compile_in_place
from lightning_modules.lengths import before_the_end, is_padded
from lightning_modules.precision import Precision, computing_in
from lightning_modules.teacher import EncoderTeacher, TeacherTargets
from lightning_modules.teacher_loading import load_extractor, load_weights, read_config

WINDOW, MEL_HOP = 400, 160
"""Samples of a mel frame's window, and from one to the next."""
HOP = 2 * MEL_HOP
DYNAMIC_RANGE = 8.0
"""Decades below an utterance's loudest mel value at which its log-mel ends."""


class LogMel(nn.Module):
    """Whisper's log-mel features of each item's own samples, in float32 whatever the precision around it.

    Args:
        filters_SC: power spectrum (201 bins) to mel bins.
    """

    filters_SC: Tensor
    window_W: Tensor

    def __init__(self, filters_SC: Tensor) -> None:
        super().__init__()
        self.register_buffer("filters_SC", filters_SC.float(), persistent=False)
        self.register_buffer("window_W", torch.hann_window(WINDOW), persistent=False)

    def forward(self, waveforms_BT: Tensor, num_frames: int, valid_BM: Tensor | None) -> Tensor:
        """(B, C, M) of the first ``num_frames`` mel frames; 0 where ``valid_BM`` is false.

        Args:
            waveforms_BT: zero past each item's end.
            num_frames: M.
            valid_BM: the mel frames of each item; ``None``: all.
        """
        missing = (num_frames - 1) * MEL_HOP + WINDOW - waveforms_BT.shape[1]
        waveforms_BT = F.pad(waveforms_BT.float(), (0, missing))  # a negative number crops
        with torch.autocast(waveforms_BT.device.type, enabled=False):
            spectrum_BSM = torch.stft(
                waveforms_BT, WINDOW, MEL_HOP, window=self.window_W, center=False, return_complex=True
            )
            power_BSM = spectrum_BSM.real.square() + spectrum_BSM.imag.square()
            decades_BCM = (self.filters_SC.T @ power_BSM).clamp(min=1e-10).log10()
        heard_BCM = decades_BCM if valid_BM is None else decades_BCM.masked_fill(~valid_BM.unsqueeze(1), -torch.inf)
        floor_B11 = heard_BCM.amax((1, 2), keepdim=True) - DYNAMIC_RANGE
        features_BCM = (decades_BCM.maximum(floor_B11) + 4.0) / 4.0
        return features_BCM if valid_BM is None else features_BCM.masked_fill(~valid_BM.unsqueeze(1), 0.0)


class WhisperTeacher(EncoderTeacher):
    """The encoder of a Whisper model.

    Intermediate targets are the raw outputs of layers. The output target passes the encoder's final layer norm. A few
    dimensions of the raw outputs are far larger than the others: set ``model.objective.normalize_targets``. A student
    can copy no convolutions over waveforms from it: set ``model.student.front_end_init=random``.

    Args:
        model: hub name, or folder with ``config.json`` and weights, of a whole Whisper model or of its encoder alone.
        revision: branch, tag or commit on the hub.
        attn_implementation: ``sdpa``, ``eager``, ...; ``None`` lets Hugging Face choose.
        precision: ``32``, ``bf16`` or ``auto``, as for the wav2vec 2.0 kind.
        compile: compile convolutions and layers with ``torch.compile``; one graph serves all layers.
        compile_backend: of ``torch.compile``.
        pad_to_30_seconds: hear every utterance with silence after it up to 30 s, as Whisper was trained; many times
            slower for short ones, and targets change little.

    Raises:
        ValueError: if the model cannot be found, lacks weights, or is no Whisper model of 16 kHz.
    """

    layer_prefix = "whisper.layers."

    def __init__(
        self,
        model: str = "openai/whisper-base",
        revision: str | None = None,
        attn_implementation: str | None = None,
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
        self.pad_to_30_seconds = pad_to_30_seconds
        self.whisper = load_encoder(model, revision, attn_implementation)
        config = self.whisper.config
        self.num_layers, self.hidden_size = len(self.whisper.layers), config.d_model
        extractor = load_extractor(model, revision)
        layout = {name: getattr(extractor, name, None) for name in ("n_fft", "hop_length", "sampling_rate")}
        if layout != {"n_fft": WINDOW, "hop_length": MEL_HOP, "sampling_rate": 16_000}:
            raise ValueError(
                f"teacher model {model!r} needs a preprocessor_config.json of Whisper with n_fft={WINDOW}, hop_length="
                f"{MEL_HOP} and sampling_rate=16000, not {layout}"
            )
        self.sample_rate = 16_000
        self.log_mel = LogMel(torch.from_numpy(extractor.mel_filters))
        self.requires_grad_(False).eval()

    @property
    def encoder(self) -> Any:
        return self.whisper

    def num_frames(self, num_samples_B: Tensor) -> Tensor:
        frames_B = torch.div(num_samples_B.to(torch.long) - WINDOW, HOP, rounding_mode="floor") + 1
        return frames_B.clamp(min=0)

    def forward(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> TeacherTargets:
        if self._backend is not None:
            compile_in_place([self.whisper.conv1, self.whisper.conv2, *self.whisper.layers], self._backend)
        return super().forward(waveforms_BT, num_samples_B)

    def _targets(self, waveforms_BT: Tensor, num_samples_B: Tensor | None, precision: Precision) -> TeacherTargets:
        with computing_in(precision, waveforms_BT.device):
            states = self.hidden_states(waveforms_BT, num_samples_B)
            output_BFD = self.whisper.layer_norm(states[self.output_layer])
        return TeacherTargets(output_BFD.float(), {layer: states[layer].float() for layer in self.hidden_layers})

    def hidden_states(self, waveforms_BT: Tensor, num_samples_B: Tensor | None) -> list[Tensor]:
        """Raw outputs (B, F, D) of all layers, after the input of the first one.

        Raises:
            ValueError: an utterance is longer than the model's positions reach (30 s).
        """
        encoder, width = self.whisper, waveforms_BT.shape[1]
        frames = int(self.num_frames(torch.tensor(width)))
        if frames > encoder.max_source_positions:
            raise ValueError(
                f"an utterance has {width} samples, and the teacher's positions end at {encoder.max_source_positions} "
                f"frames: set data.max_samples to {encoder.max_source_positions * HOP} or less"
            )
        lengths_B = num_samples_B if is_padded(num_samples_B, width) else None
        if lengths_B is not None:
            waveforms_BT = waveforms_BT.masked_fill(~before_the_end(lengths_B, width, waveforms_BT.device), 0.0)
        heard = encoder.max_source_positions if self.pad_to_30_seconds else frames
        valid_BF = valid_BM = None
        if lengths_B is not None and not self.pad_to_30_seconds:
            frames_B = self.num_frames(lengths_B)
            valid_BF = before_the_end(frames_B, frames, waveforms_BT.device)
            valid_BM = before_the_end(2 * frames_B, 2 * frames, waveforms_BT.device)
        hidden_BCM = F.gelu(encoder.conv1(self.log_mel(waveforms_BT, 2 * heard, valid_BM)))
        if valid_BM is not None:
            hidden_BCM = hidden_BCM.masked_fill(~valid_BM.unsqueeze(1), 0.0)
        hidden_BFD = F.gelu(encoder.conv2(hidden_BCM)).transpose(1, 2) + encoder.embed_positions.weight[:heard]
        mask = create_bidirectional_mask(config=encoder.config, inputs_embeds=hidden_BFD, attention_mask=valid_BF)
        states = [hidden_BFD]
        for layer in encoder.layers:
            hidden_BFD = layer(hidden_BFD, attention_mask=mask)
            hidden_BFD = hidden_BFD[0] if isinstance(hidden_BFD, tuple) else hidden_BFD
            states.append(hidden_BFD)
        return [state_BFD[:, :frames] for state_BFD in states]


def load_encoder(model: str, revision: str | None, attn_implementation: str | None) -> Any:
    """The encoder of a Whisper model in float32, every weight of it read from the checkpoint.

    Raises:
        ValueError: there is none, or it is another kind of model.
    """
    config = read_config(model, revision)
    if config.model_type != "whisper":
        raise ValueError(
            f"teacher model {model!r} is of type {config.model_type}, not Whisper: set model.teacher.class_path to "
            "lightning_modules.teacher.HuggingFaceTeacher, or give a Whisper model"
        )
    if config.architectures == [WhisperEncoder.__name__]:
        return load_weights(WhisperEncoder, model, revision, attn_implementation)
    return load_weights(WhisperModel, model, revision, attn_implementation).encoder
