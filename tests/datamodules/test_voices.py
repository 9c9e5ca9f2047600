"""Speakers of the synthetic corpus: which they are, and what keeps a held-out one from being heard in training."""

from pathlib import Path

import pytest

from datamodules.synthetic import SPLITS, _library, plan_speakers
from datamodules.voices import MOST_VOICES, VOICES, choose_voices


def variant(name: str) -> str:
    return name.split("+")[1]


def test_small_corpora_keep_their_speakers() -> None:
    """Corpora of so many voices exist, and ids of jobs depend on them."""
    assert [choose_voices(count) for count in (3, 12, 24)] == [VOICES[:3], VOICES[:12], VOICES]
    assert VOICES[0] == ("M", "en-us+m3", 44, 55, 165)
    assert VOICES[23] == ("M", "en-us+quincy", 40, 55, 160)


@pytest.mark.parametrize("count", [25, 60, 69, 90, 102])
def test_speakers_of_large_corpora_are_distinct_and_held_out_ones_share_no_variant(count: int) -> None:
    speakers = plan_speakers(minutes=count, voices=count, seed=0)
    assert len({speaker.voice[1:] for speaker in speakers}) == count
    by_split = {split: [s.voice for s in speakers if s.split == split] for split in SPLITS}
    variants = {split: {variant(voice.name) for voice in voices} for split, voices in by_split.items()}
    assert not variants["dev-clean"] & variants["test-clean"]
    assert not variants["train-clean-100"] & (variants["dev-clean"] | variants["test-clean"])
    for voices in by_split.values():
        assert {voice.sex for voice in voices} == {"M", "F"}
        assert {voice.name.split("+")[0] for voice in voices} == {"en-us", "en"}
    assert all(0 <= s.voice.pitch <= 99 and 150 <= s.voice.words_per_minute <= 190 for s in speakers)


def test_a_variant_speaks_twice_only_after_all_have_spoken() -> None:
    names = [variant(voice.name) for voice in choose_voices(MOST_VOICES)]
    assert MOST_VOICES == 102
    assert len(set(names)) == len(set(names[:68])) == 68
    assert set(names[68:]) == set(names[34:68])  # of those that are never held out


def test_every_further_variant_is_one_of_espeaks() -> None:
    """A variant that does not exist is spoken in the plain voice, without an error."""
    pytest.importorskip("espeakng_loader")
    known = {path.name for path in (Path(_library()["data"]) / "voices" / "!v").iterdir()}
    further = {variant(voice.name) for voice in set(choose_voices(MOST_VOICES)[:68]) - set(VOICES)}
    assert len(further) == 44
    assert further <= known
    assert "nobody" not in known
