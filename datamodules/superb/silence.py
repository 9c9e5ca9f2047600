"""Removal of silence as SoX's effect ``silence 1 0.1 0.1% -1 0.1 0.1%`` does it. Shapes: T samples (16 kHz)."""

import numba
import numpy as np

WINDOW = 320
"""Samples of the running root mean square, a fiftieth of a second."""
DURATION = 1600
"""Samples that must be loud, or quiet, in a row: 0.1 s."""
LOUD = 0.001
"""Level above which a sample is loud, as a part of full scale: 0.1 %."""


def remove_silence(waveform_T: np.ndarray) -> np.ndarray:
    """The waveform without its silence at the start, inside and at the end; it may be empty.

    A sample is loud if the root mean square of it and the 319 samples before it is above 0.1 % of full scale. The
    output starts with the first 1,600 loud samples in a row. Then samples are kept, until 1,600 quiet ones in a row are
    dropped and the search for loud ones begins anew, with a window of zeros. Fewer quiet samples are kept, also at the
    end. So a pause loses its quiet part, and up to 0.1 s of speech after it that is interrupted by a quiet sample.

    The rules are those of libsox 14.4.2, whose samples are integers of 32 bits; float32 waveforms can differ from it by
    rounding where the level is at the limit. It was not run beside libsox.

    Args:
        waveform_T: float32 audio (T,), full scale 1.

    Returns:
        float32 audio (T',).
    """
    return waveform_T[_kept(np.rint(waveform_T.astype(np.float64) * 2**31))]


@numba.njit(nogil=True)
def _kept(samples_T: np.ndarray) -> np.ndarray:
    """Mask (T,) of the samples that are kept."""
    kept_T = np.zeros(len(samples_T), dtype=np.bool_)
    window = np.zeros(WINDOW)
    total, place = 0.0, 0
    copying, run = False, 0  # run counts loud samples before copying, and quiet ones while copying
    for index in range(len(samples_T)):
        square = samples_T[index] * samples_T[index]
        total += square - window[place]
        window[place] = square
        place = (place + 1) % WINDOW
        loud = int(np.sqrt(max(total, 0.0) / WINDOW)) / (2.0**31 - 1) > LOUD
        if loud == copying:
            if copying:
                kept_T[index - run : index + 1] = True
            run = 0
            continue
        run += 1
        if run < DURATION:
            continue
        if not copying:
            kept_T[index + 1 - run : index + 1] = True
        else:
            window[:] = 0.0
            total, place = 0.0, 0
        copying, run = not copying, 0
    if copying:
        kept_T[len(samples_T) - run :] = True
    return kept_T
