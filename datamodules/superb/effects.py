"""The effects that a recipe applies to all audio, as s3prl does with SoX. Shapes: T samples (16 kHz)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Effects:
    """Effects on a waveform, in this order.

    Attributes:
        gain_db: gain in dB.
        remove_silence: whether silence is cut out. The length of the result is then known only after decoding.
    """

    gain_db: float = 0.0
    remove_silence: bool = False

    def apply(self, waveform_T: np.ndarray) -> np.ndarray:
        """The waveform (T,) float32 after the effects; with ``remove_silence`` it may be shorter, or empty."""
        louder_T = np.float32(10 ** (self.gain_db / 20)) * waveform_T
        if not self.remove_silence:
            return louder_T
        from datamodules.superb.silence import remove_silence  # its compiler takes a second to import

        return remove_silence(louder_T)


NO_EFFECTS = Effects()
