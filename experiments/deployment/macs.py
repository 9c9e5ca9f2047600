"""Multiply-accumulate operations (MACs) of an encoder by formula, also on the measure of SUPERB's published numbers.

The measure is that of the profiling tool of the SLT 2022 SUPERB challenge: the sum over 32 recordings of LibriSpeech
test-clean, which are every 82nd one when all are sorted by length, each on its own
(https://github.com/B06901052/DeepSpeed, branch ``superb-challenge``). The tool counts a product of a linear layer, a
convolution or an attention as :mod:`experiments.records.accounting` does. Norms, activations and biases of linear
layers have no MACs there. Of an attention in one call, as fairseq's encoders make it, it counts more: see
`attention_extras`. Weights that are not run, such as prediction heads after the last layer, have no MACs.
"""

from typing import Any

from datamodules.audio import SAMPLE_RATE
from datamodules.frames import count_windows
from experiments.records.accounting import teacher_flops
from lightning_modules.front_end import conv_frames
from lightning_modules.teacher_loading import WHISPER
from lightning_modules.whisper import HOP, WINDOW

SUPERB_SAMPLES = (
    (20560, 34560, 38480, 42560, 45600, 48720, 52000, 55120),
    (59120, 62720, 66400, 71200, 75200, 78640, 82800, 87520),
    (92720, 98560, 104400, 111120, 118480, 125040, 132720, 142640),
    (154000, 166720, 180880, 197920, 217920, 239280, 268160, 326000),
)
"""Lengths in samples of the 32 recordings, in the tool's groups: short, medium, long and longer; 225 s in all."""


def gmacs_per_second(config: Any, seconds: float) -> float:
    """Compute 1e9 MACs per second of audio, for one utterance of ``seconds``; longer ones cost more in attention.

    Args:
        config: Hugging Face configuration of the encoder, of the wav2vec 2.0 kind or of Whisper.
        seconds: length of the utterance.
    """
    return teacher_flops(config, round(seconds * SAMPLE_RATE), config.num_hidden_layers) / 2e9 / seconds


def superb_gmacs(config: Any) -> list[float]:
    """Compute 1e9 MACs of each of the tool's four groups of recordings; SUPERB's published number is their sum."""
    layers = config.num_hidden_layers
    return [
        sum(teacher_flops(config, length, layers) / 2 + layers * attention_extras(config, length) for length in group)
        / 1e9
        for group in SUPERB_SAMPLES
    ]


def attention_extras(config: Any, num_samples: int) -> int:
    """Count the MACs of one layer's attention that the tool adds to those of its products.

    They are one for each bias and for the scale of the queries, and for each attention weight one for the mask, two for
    the softmax, and one for its dropout if the encoder was trained with one. They are 0.2 % of HuBERT Base's MACs.
    """
    whisper = config.model_type == WHISPER
    frames = count_windows(num_samples, WINDOW, HOP) if whisper else conv_frames(config, num_samples)[-1]
    frames = -(-frames // getattr(config, "time_reduction", 1))
    per_weight = 3 + (config.attention_dropout > 0)
    return 4 * frames * config.hidden_size + per_weight * config.num_attention_heads * frames**2
