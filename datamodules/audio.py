"""Reading of audio: headers, and mono float32 waveforms from FLAC, WAV and MP3 files. No other module reads audio.

Every fault of a file is a :class:`BadAudioError` of the form ``PATH: fault; remedy``, so that a data module can either
stop with it or list the file and continue.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple, TypeVar

import numpy as np
import soundfile
import soxr

from datamodules.errors import InputError, is_storage_error
from datamodules.packed import piece_of

T = TypeVar("T")
AUDIO_SUFFIXES = (".flac", ".wav", ".mp3")
SAMPLE_RATE = 16_000
"""Samples per second that encoders of speech take."""
MOST_SAMPLES = 2**40  # libsndfile reports 2**63 - 1 where a FLAC header leaves the length open
# Decoders, filters and mixes overshoot 1.0 by a few dB, but not by 24 dB over full scale. In a file in 16-bit scale the
# noise of a quiet room exceeds this limit.
LOUDEST = 16.0
# Formats whose blocks can be decoded independently. Other codecs (MP3, Vorbis, ADPCM) carry a state from block to
# block, and seeking in them is approximate.
EXACT_SUBTYPES = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
# Matches the log of libsndfile, which shortens a truncated file without an error. Truncated FLAC and MP3 files keep the
# length of their header and are found when they are decoded.
_SHORTER = re.compile(r"^\s*(?:data|ssnd|riff size)\b.*?(?P<promised>\d+) \(should be", re.MULTILINE | re.IGNORECASE)
_SIZE_OF_ZERO = re.compile(r"^data : 0\n(?:\*\*\*|Have)", re.MULTILINE)  # the samples follow instead of a chunk


class BadAudioError(InputError):
    """An audio file cannot be used; the message names the file, the fault and the remedy."""

    @classmethod
    def of(cls, path: str, problem: str) -> "BadAudioError":
        return cls(f"{path}: {problem}")


class AudioInfo(NamedTuple):
    """The contents of a file's header."""

    num_samples: int  # per channel, at the file's own rate
    sample_rate: int  # Hz
    channels: int
    seeks_exactly: bool = True


def audio_info(path: str) -> AudioInfo:
    """Read a file's header.

    Raises:
        BadAudioError: the file is missing, empty or not audio, or a WAV file is shorter than its header says or does
            not state its length. A WAV file from a pipe, whose header has the largest possible length, is accepted
            with its actual length.
    """
    if (piece := piece_of(path)) is not None:
        return AudioInfo(piece.num_samples, piece.sample_rate, channels=1)
    _require_content(path)

    def read() -> AudioInfo:
        with soundfile.SoundFile(path) as file:
            if (shorter := _SHORTER.search(file.extra_info)) and not _made_by_a_pipe(int(shorter["promised"])):
                raise BadAudioError.of(path, "is shorter than its header says (truncated); copy it again")
            if _SIZE_OF_ZERO.search(file.extra_info):
                raise BadAudioError.of(path, "does not state its length (made by a pipe); write it again to a file")
            return AudioInfo(file.frames, file.samplerate, file.channels, file.subtype.startswith(EXACT_SUBTYPES))

    return _from_storage(path, read, "cannot be read as audio ({}); copy it again or convert it to FLAC")


def usable_samples(path: str, sample_rate: int = 16000, min_samples: int = 1, resample: bool = False) -> int:
    """Number of samples that :func:`read_audio` will return for a file, from its header alone.

    Raises:
        BadAudioError: besides the cases of :func:`audio_info`, the file holds no samples, has another rate or several
            channels while ``resample`` is off, or has fewer than ``min_samples`` samples at ``sample_rate``.
    """
    info = audio_info(path)
    if info.num_samples == 0:
        raise BadAudioError.of(path, "holds no samples; record or copy it again")
    if info.num_samples > MOST_SAMPLES:
        raise BadAudioError.of(path, "does not state its length (made by a pipe); encode it again from a file")
    _require_usable(path, info, sample_rate, resample)
    num_samples = resampled_length(info.num_samples, info.sample_rate, sample_rate)
    if num_samples < min_samples:
        problem = f"is too short: {num_samples} samples at {sample_rate} Hz, at least {min_samples} are needed"
        raise BadAudioError.of(path, problem)
    return num_samples


def read_audio(
    path: str, sample_rate: int = 16000, start: int = 0, stop: int | None = None, resample: bool = False
) -> np.ndarray:
    """Decode samples ``start`` to ``stop`` (default: the end) of a file as mono.

    Args:
        path: FLAC, WAV or MP3 file.
        sample_rate: rate in Hz of the result; ``start`` and ``stop`` count at this rate.
        resample: convert a file of another rate (with soxr, high quality) and take the mean over channels; if off, such
            a file is an error.

    Returns:
        float32 array (T,) with T = stop - start exactly; a slice equals the same slice of the whole file.

    Raises:
        BadAudioError: the file is unreadable, has another rate, is not mono, has fewer samples than requested, or has
            a sample that is not finite or far beyond full scale.
    """
    info = audio_info(path)
    _require_usable(path, info, sample_rate, resample)
    total = resampled_length(info.num_samples, info.sample_rate, sample_rate)
    stop = total if stop is None else stop
    if stop > total:
        raise BadAudioError.of(path, f"has {total} samples at {sample_rate} Hz, not {stop}; it has changed")
    if info.sample_rate != sample_rate:
        # The filter depends on samples on both sides, so a slice is cut after conversion.
        whole = _decode(path, 0, info.num_samples)
        return _resample(whole, info.sample_rate, sample_rate, total)[start:stop]
    if not info.seeks_exactly:
        return _decode(path, 0, stop)[start:]
    return _decode(path, start, stop)


def resampled_length(num_samples: int, from_rate: int, to_rate: int) -> int:
    """Length after conversion, rounded to the nearest sample; at least 1 for audio that is not empty."""
    return max(min(num_samples, 1), (num_samples * to_rate + from_rate // 2) // from_rate)


def _require_content(path: str) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        if is_storage_error(error):
            raise
        status = None
    if status is None or not S_ISREG(status.st_mode):
        raise BadAudioError.of(path, "does not exist; restore it or build the manifest again")
    if status.st_size == 0:
        raise BadAudioError.of(path, "is an empty file (0 bytes); copy it again")


def _from_storage(path: str, read: Callable[[], T], problem: str) -> T:
    """Read a file, a second time after an error; libsndfile does not tell a damaged file from a storage that failed.

    Raises:
        OSError: the storage fails, which is no fault of the file.
        BadAudioError: the file is damaged, or is not audio; ``problem`` says so, with the reason.
    """
    try:
        try:
            return read()
        except soundfile.SoundFileError:
            Path(path).read_bytes()
            return read()
    except (soundfile.SoundFileError, OSError) as error:
        if is_storage_error(error):
            raise
        raise BadAudioError.of(path, problem.format(_reason(error))) from error


def _require_usable(path: str, info: AudioInfo, sample_rate: int, resample: bool) -> None:
    if info.channels != 1 and not resample:
        problem = f"has {info.channels} channels; set resample: true to take their mean, or mix it down to mono"
        raise BadAudioError.of(path, problem)
    if info.sample_rate != sample_rate and not resample:
        problem = f"has {info.sample_rate} Hz instead of {sample_rate}; set resample: true or convert it"
        raise BadAudioError.of(path, problem)


def _decode(path: str, start: int, stop: int) -> np.ndarray:
    if (piece := piece_of(path)) is not None:
        return piece.read(start, stop)
    waveform_T, rate = _from_storage(
        path,
        lambda: soundfile.read(path, start=start, stop=stop, dtype="float32"),
        "cannot be decoded ({}), truncated or damaged; copy it again",
    )
    if len(waveform_T) != stop - start:
        end = start + len(waveform_T)
        problem = f"ends after {end} samples, its header promises more (truncated); copy it again"
        raise BadAudioError.of(path, problem)
    _require_sound(path, waveform_T, start, rate)
    return waveform_T if waveform_T.ndim == 1 else waveform_T.mean(axis=1)


def _require_sound(path: str, samples: np.ndarray, start: int, rate: int) -> None:
    """Refuse samples that are not finite or far beyond full scale; ``samples`` are (T,) or (T, C)."""
    # Both comparisons are false with NaN. They take 1 % of the time of decoding FLAC.
    if not samples.size or (samples.min() >= -LOUDEST and samples.max() <= LOUDEST):
        return
    bad_T = ~np.isfinite(samples.reshape(len(samples), -1)).all(axis=1)
    if bad_T.any():
        first = int(bad_T.argmax())
        value = "NaN" if np.isnan(samples[first]).any() else "infinity"
        place = f"{(start + first) / rate:.4f} s (sample {start + first})"
        raise BadAudioError.of(path, f"holds {value} at {place}; make it again or remove it")
    peak = float(np.abs(samples).max())
    problem = f"has a peak of {peak:.4g} where full scale is 1: divide it by 32768 or convert it to 16-bit integers"
    raise BadAudioError.of(path, problem)


def _resample(waveform_T: np.ndarray, from_rate: int, to_rate: int, num_samples: int) -> np.ndarray:
    """Resample with soxr and cut or pad to the manifest's length, since soxr rounds the length differently."""
    resampled_T = soxr.resample(waveform_T, from_rate, to_rate)[:num_samples]
    return np.pad(resampled_T, (0, num_samples - len(resampled_T)))


def _made_by_a_pipe(promised_bytes: int) -> bool:
    """Whether a size means "unknown": ffmpeg writes 2**32 - 1, SoX just below 2**31, arecord 2**31."""
    return 2**31 - 2**16 <= promised_bytes <= 2**31 or promised_bytes >= 2**32 - 2**16


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error).rstrip(". ").rpartition(": ")[2]
