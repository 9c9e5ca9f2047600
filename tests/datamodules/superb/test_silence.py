"""Removal of silence, held against a plain transcription of the rule and against what is known of simple signals."""

import numpy as np
import pytest

from datamodules.superb.effects import Effects
from datamodules.superb.silence import DURATION, LOUD, WINDOW, remove_silence


def tone(seconds: float, level: float = 0.3) -> np.ndarray:
    return (level * np.cos(2 * np.pi * 200 * np.arange(round(16_000 * seconds)) / 16_000)).astype(np.float32)


def quiet(seconds: float) -> np.ndarray:
    return np.zeros(round(16_000 * seconds), dtype=np.float32)


def by_the_rule(waveform_T: np.ndarray) -> np.ndarray:
    """Two states, each with a buffer of samples that are not decided yet."""
    history = [0.0] * WINDOW
    out: list[float] = []
    held: list[float] = []
    copying = False
    for sample in waveform_T.tolist():
        history = [*history[1:], sample]
        loud = np.sqrt(np.mean(np.square(history))) > LOUD
        if not copying:
            held = [*held, sample] if loud else []
            if len(held) == DURATION:
                out, held, copying = out + held, [], True
        elif loud:
            out, held = [*out, *held, sample], []
        else:
            held.append(sample)
            if len(held) == DURATION:
                held, copying, history = [], False, [0.0] * WINDOW
    return np.array(out + (held if copying else []), dtype=np.float32)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_rule(seed: int) -> None:
    generator = np.random.default_rng(seed)
    parts = []
    for _ in range(8):
        seconds = float(generator.choice([0.03, 0.09, 0.099, 0.11, 0.3]))
        parts.append(tone(seconds, float(generator.choice([0.0, 0.0005, 0.0015, 0.1]))))
    waveform_T = np.concatenate(parts)
    np.testing.assert_array_equal(remove_silence(waveform_T), by_the_rule(waveform_T))


def test_a_long_pause_is_cut_and_a_short_one_kept() -> None:
    long = remove_silence(np.concatenate([tone(1), quiet(1), tone(1)]))
    assert 2 * 16_000 <= len(long) < 2 * 16_000 + 2 * WINDOW  # the level falls within a window
    short_T = np.concatenate([tone(1), quiet(0.09), tone(1)])
    np.testing.assert_array_equal(remove_silence(short_T), short_T)


def test_silence_alone_gives_nothing_and_speech_alone_stays() -> None:
    assert len(remove_silence(quiet(1))) == 0
    assert len(remove_silence(tone(1, 0.0005))) == 0
    assert len(remove_silence(tone(0.09))) == 0  # not 0.1 s of it
    assert len(remove_silence(quiet(0))) == 0


def test_silence_at_the_start_and_the_end_is_cut() -> None:
    found_T = remove_silence(np.concatenate([quiet(0.5), tone(1), quiet(0.5)]))
    assert 16_000 <= len(found_T) < 16_000 + WINDOW
    ends_early_T = np.concatenate([tone(1), quiet(0.05)])
    np.testing.assert_array_equal(remove_silence(ends_early_T), ends_early_T)  # what is held back at the end is kept


def test_the_gain_comes_first() -> None:
    """A tone just above the limit is below it after -3 dB."""
    waveform_T = tone(1, 0.0016)
    assert len(remove_silence(waveform_T)) > 15_000
    assert len(Effects(-3.0, remove_silence=True).apply(waveform_T)) == 0
