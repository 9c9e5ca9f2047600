"""Removal of silence as SoX's ``silence 1 0.1 0.1% -1 0.1 0.1%`` does it. Shapes: T samples (16 kHz)."""

import numpy as np


def remove_silence(waveform_T: np.ndarray) -> np.ndarray:
    """The waveform (T',) without its silence."""
    raise NotImplementedError
