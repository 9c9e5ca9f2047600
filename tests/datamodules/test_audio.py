"""Reading audio: exact slices, exact lengths, and a clear error for every kind of bad file."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from datamodules.audio import (
    AudioInfo,
    BadAudioError,
    audio_info,
    read_audio,
    resampled_length,
    usable_samples,
)
from tests.datamodules.corpora import noise, storage_fault, truncate, write_audio


@pytest.mark.parametrize("suffix", ["flac", "wav", "mp3"])
def test_a_slice_equals_the_slice_of_the_whole(tmp_path: Path, suffix: str) -> None:
    path = str(write_audio(tmp_path / f"a.{suffix}", 20000))
    whole_T = read_audio(path)
    assert audio_info(path) == AudioInfo(len(whole_T), 16000, 1, seeks_exactly=suffix != "mp3")
    assert whole_T.dtype == np.float32
    slice_T = read_audio(path, start=5000, stop=9001)
    np.testing.assert_array_equal(slice_T, whole_T[5000:9001])
    assert not np.array_equal(slice_T, whole_T[5001:9002])


@pytest.mark.parametrize(("number", "error"), [(errno.EIO, OSError), (errno.ENOENT, BadAudioError)])
def test_a_storage_that_fails_is_no_fault_of_the_file(
    number: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_audio(tmp_path / "a.flac", 20000)
    monkeypatch.setattr("datamodules.audio.os.stat", storage_fault(path, number))
    with pytest.raises(error):
        audio_info(str(path))


@pytest.mark.parametrize("times", [1, 2])
def test_a_read_that_fails_is_repeated_once(times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libsndfile's error does not tell whether the storage failed for a moment."""
    path = write_audio(tmp_path / "a.flac", 20000)
    expected_T, read, left = read_audio(str(path)), soundfile.read, [None] * times

    def failing(*args: Any, **kwargs: Any) -> Any:
        if left:
            left.pop()
            raise soundfile.LibsndfileError(2)
        return read(*args, **kwargs)

    monkeypatch.setattr(soundfile, "read", failing)
    if times == 1:
        np.testing.assert_array_equal(read_audio(str(path)), expected_T)
    else:
        with pytest.raises(BadAudioError, match="cannot be decoded"):
            read_audio(str(path))


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_the_content_says_how_a_file_is_cut_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"really_mp3.{suffix}"
    soundfile.write(path, noise(20000), 16000, format="MP3")
    whole_T = read_audio(str(path))
    np.testing.assert_array_equal(read_audio(str(path), start=5000, stop=9001), whole_T[5000:9001])
    seeking_T = soundfile.read(path, start=5000, stop=9001, dtype="float32")[0]
    assert np.abs(seeking_T - whole_T[5000:9001]).max() > 0  # so a cut by seeking would not pass


def test_flac_samples_are_those_written(tmp_path: Path) -> None:
    path = str(write_audio(tmp_path / "a.flac", 20000))
    np.testing.assert_allclose(read_audio(path), noise(20000), atol=2**-15)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
@pytest.mark.parametrize("num_samples", [1, 441, 8001, 12345])
def test_resampled_length_is_what_the_header_promises(tmp_path: Path, rate: int, num_samples: int) -> None:
    path = str(write_audio(tmp_path / "a.wav", num_samples, rate=rate))
    promised = usable_samples(path, resample=True)
    whole_T = read_audio(path, resample=True)
    assert len(whole_T) == promised == resampled_length(num_samples, rate, 16000)
    middle = promised // 2
    np.testing.assert_array_equal(read_audio(path, start=middle, stop=promised, resample=True), whole_T[middle:])


def test_resampling_keeps_a_tone(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000), 8000)
    expected_T = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    difference_T = read_audio(str(path), resample=True) - expected_T
    assert np.abs(difference_T[1000:-1000]).max() < 1e-3


def test_real_eight_kilohertz_speech_needs_resample(real_data: Path) -> None:
    path = str(next((real_data / "fsdd").rglob("*.flac")))
    with pytest.raises(BadAudioError, match=r"8000 Hz instead of 16000; set resample: true"):
        usable_samples(path)
    assert len(read_audio(path, resample=True)) == 2 * audio_info(path).num_samples


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("zero_bytes", r"empty file \(0 bytes\)"),
        ("no_samples", "holds no samples"),
        ("text", "cannot be read as audio"),
        ("stereo", "has 2 channels; set resample: true to take their mean"),
        ("short", "too short: 399 samples at 16000 Hz, at least 400"),
        ("rate", "8000 Hz instead of 16000"),
        ("cut_wav", "shorter than its header says"),
        ("no_length", "does not state its length"),
    ],
)
def test_bad_headers_name_the_file_and_the_remedy(tmp_path: Path, kind: str, message: str) -> None:
    path = make_bad(tmp_path, kind)
    with pytest.raises(BadAudioError, match=message) as caught:
        usable_samples(str(path), min_samples=400)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_several_channels_are_their_mean_where_files_may_be_converted(tmp_path: Path, rate: int) -> None:
    stereo_TC = noise(4000, channels=2)
    stereo, mono = str(tmp_path / "stereo.wav"), str(tmp_path / "mono.wav")
    soundfile.write(stereo, stereo_TC, rate, subtype="FLOAT")
    soundfile.write(mono, stereo_TC.mean(1), rate, subtype="FLOAT")
    assert usable_samples(stereo, resample=True) == usable_samples(mono, resample=True)
    mixed_T = read_audio(stereo, start=100, stop=3000, resample=True)
    np.testing.assert_allclose(mixed_T, read_audio(mono, start=100, stop=3000, resample=True), atol=1e-6)
    assert np.abs(mixed_T - read_audio(stereo, start=101, stop=3001, resample=True)).max() > 0.01


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_a_truncated_file_is_found_when_it_is_decoded(
    tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(truncate(write_audio(tmp_path / f"a.{suffix}", 100_000)))
    assert usable_samples(path) >= 100_000
    with pytest.raises(BadAudioError, match=r"truncated"):
        read_audio(path)
    capfd.readouterr()  # the MP3 decoder complains on its own


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_number_that_is_no_sample_is_named_with_its_time(
    tmp_path: Path, suffix: str, value: float, name: str, channels: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    samples = noise(16000, channels=channels)
    samples.reshape(-1)[4000 * channels] = value
    soundfile.write(path, samples, 16000, format="WAV", subtype="FLOAT")
    with pytest.raises(BadAudioError, match=rf"^{path}: holds {name} at 0\.2500 s \(sample 4000\); make it again"):
        read_audio(str(path), start=1000, resample=True)
    assert len(read_audio(str(path), stop=4000, resample=True)) == 4000  # what is before it is sound


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_in_sixteen_bit_scale_are_refused_and_overshoots_are_not(tmp_path: Path, subtype: str) -> None:
    path, samples_T = tmp_path / "a.wav", noise(8000) / np.abs(noise(8000)).max()
    soundfile.write(path, 9700 * samples_T, 16000, subtype=subtype)
    with pytest.raises(BadAudioError, match=r"a\.wav: has a peak of 9700 where full scale is 1: divide it by 32768"):
        read_audio(str(path))
    soundfile.write(path, 4 * samples_T, 16000, subtype=subtype)  # 12 dB over full scale: a mix without a limiter
    assert np.abs(read_audio(str(path))).max() == pytest.approx(4)


PIPES = {"ffmpeg": 0xFFFFFFFF, "sox": 0x7FFFF000, "arecord": 0x80000000, "int": 0x7FFFFFFF}


@pytest.mark.parametrize("promised", [*PIPES.values()], ids=[*PIPES])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_wav_file_from_a_pipe_is_as_long_as_it_is(tmp_path: Path, promised: int, subtype: str) -> None:
    path, samples_T = tmp_path / "pipe.wav", noise(8000)
    soundfile.write(path, samples_T, 16000, subtype=subtype)
    promise(path, promised)
    assert usable_samples(str(path)) == 8000
    np.testing.assert_allclose(read_audio(str(path), start=1000, stop=8000), samples_T[1000:], atol=2**-15)


@pytest.mark.parametrize("content", [noise(8000), np.zeros(8000)], ids=["noise", "silence"])
def test_a_wav_file_whose_pipe_left_no_length_says_so(tmp_path: Path, content: np.ndarray) -> None:
    path = tmp_path / "pipe.wav"
    soundfile.write(path, content, 16000)
    promise(path, 0)
    with pytest.raises(BadAudioError, match=r"does not state its length \(made by a pipe\); write it again to a file"):
        usable_samples(str(path))


@pytest.mark.parametrize("made", ["WAV", "WAVEX", "RF64", "AIFF"])
def test_a_truncated_file_of_wavs_family_is_refused(tmp_path: Path, made: str) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(8000), 16000, format=made, subtype="PCM_16")
    assert usable_samples(str(path)) == 8000
    truncate(path)
    with pytest.raises(BadAudioError, match="shorter than its header says"):
        usable_samples(str(path))


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    path = str(write_audio(tmp_path / "a.flac", 1000))
    with pytest.raises(BadAudioError, match="has 1000 samples at 16000 Hz, not 1001"):
        read_audio(path, start=500, stop=1001)


def promise(path: Path, num_bytes: int) -> None:
    """Put another size into the header of a WAV file, as a program does that cannot go back to its beginning."""
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[4:8] = content[place : place + 4] = num_bytes.to_bytes(4, "little")
    path.write_bytes(content)


def make_bad(folder: Path, kind: str) -> Path:
    path = folder / ("bad.wav" if kind in ("cut_wav", "no_samples") else "bad.flac")
    settings = {"stereo": {"channels": 2}, "rate": {"rate": 8000}}.get(kind, {})
    if kind == "zero_bytes":
        path.touch()
    elif kind == "text":
        path.write_text("not audio at all", encoding="utf-8")
    elif kind != "missing":
        write_audio(path, {"no_samples": 0, "short": 399}.get(kind, 8000), **settings)
    if kind == "cut_wav":
        truncate(path)
    elif kind == "no_length":
        content = bytearray(path.read_bytes())
        content[21] &= 0xF0  # the 36 bits of STREAMINFO's number of samples
        content[22:26] = bytes(4)
        path.write_bytes(content)
    return path
