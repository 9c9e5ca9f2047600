"""The hidden states of Hugging Face encoders. Shapes: B batch, T samples, F frames, D width.

Only an encoder's last layer can have two outputs: the layer's own, and the one after the encoder's final norm, which
encoders with ``do_stable_layer_norm`` (HuBERT Large, WavLM Large, XLS-R) and those of Whisper have. A hidden state that
is *read*, by a head or a probe, and the output target of a distillation are after the norm, as ``last_hidden_state``
is. A hidden target of a distillation is the layer's own output, for the last layer too.
"""

from typing import Any

from torch import Tensor

from lightning_modules.lengths import before_the_end, is_padded


def encoder_states(model: Any, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> list[Tensor]:
    """Hidden states (B, F, D): the input of the first layer and every layer's output, the last one's as the encoder's.

    It has passed the encoder's final norm, if there is one. The last of Hugging Face's own ``hidden_states`` has done
    so in transformers 4, and has not in transformers 5.
    """
    mask_BT = valid_samples(waveforms_BT, num_samples_B)
    outputs = model(waveforms_BT, attention_mask=mask_BT, output_hidden_states=True)
    return [*outputs.hidden_states[:-1], outputs.last_hidden_state]


def last_state(model: Any, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> Tensor:
    """The last of :func:`encoder_states` alone."""
    result: Tensor = model(waveforms_BT, attention_mask=valid_samples(waveforms_BT, num_samples_B)).last_hidden_state
    return result


def valid_samples(waveforms_BT: Tensor, num_samples_B: Tensor | None) -> Tensor | None:
    """Attention mask (B, T) int64; ``None`` if no item is padded, because a mask of ones only costs time."""
    if num_samples_B is None or not is_padded(num_samples_B, waveforms_BT.shape[1]):
        return None
    return before_the_end(num_samples_B, waveforms_BT.shape[1], waveforms_BT.device).long()
