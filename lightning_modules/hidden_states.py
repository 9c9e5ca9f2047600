"""The hidden states of Hugging Face encoders. Shapes: B batch, T samples, F frames, D width."""

from typing import Any

from torch import Tensor

from lightning_modules.lengths import before_the_end, is_padded


def encoder_states(model: Any, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> list[Tensor]:
    """Hidden states (B, F, D): the input of the first layer and every layer's output.

    The last one passes the encoder's final norm where Hugging Face applies it.
    """
    mask_BT = valid_samples(waveforms_BT, num_samples_B)
    return list(model(waveforms_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states)


def valid_samples(waveforms_BT: Tensor, num_samples_B: Tensor | None) -> Tensor | None:
    """Attention mask (B, T) int64; ``None`` if no item is padded, because a mask of ones only costs time."""
    if num_samples_B is None or not is_padded(num_samples_B, waveforms_BT.shape[1]):
        return None
    return before_the_end(num_samples_B, waveforms_BT.shape[1], waveforms_BT.device).long()
