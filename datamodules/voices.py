"""The speakers of the synthetic corpus: eSpeak's voice variants, each with its own pitch and speed.

The first 24 speakers are those of `VOICES`. A larger corpus mixes them with others, so that every split has women and
men. After 68 speakers all usable variants of eSpeak are used. Further speakers repeat a variant of the training split
with the other accent, another pitch and another speed. They share the formants of the first speaker of the variant, so
they add less variety, and none of these variants is ever held out.
"""

from itertools import chain, zip_longest
from typing import NamedTuple


class Voice(NamedTuple):
    """A speaker: eSpeak's accent and voice variant, pitch and its range (0 to 99), words per minute."""

    sex: str
    name: str
    pitch: int
    pitch_range: int
    words_per_minute: int


# Two accents, American (en-us) and British (en). Each adds its own phones, and minutes of speech are not enough to
# learn those of more accents. Held-out speakers come first; they differ from the others in voice, not in accent.
VOICES = (
    Voice("M", "en-us+m3", 44, 55, 165),
    Voice("F", "en+f2", 52, 50, 175),
    Voice("F", "en-us+f1", 52, 60, 170),
    Voice("M", "en+m2", 42, 45, 160),
    Voice("M", "en-us+m1", 40, 50, 170),
    Voice("F", "en-us+f4", 47, 60, 180),
    Voice("M", "en+m4", 55, 55, 175),
    Voice("F", "en+f3", 50, 65, 165),
    Voice("F", "en-us+f5", 45, 50, 165),
    Voice("M", "en+m7", 50, 45, 155),
    Voice("M", "en-us+max", 48, 65, 160),
    Voice("F", "en+Annie", 50, 55, 170),
    Voice("M", "en-us+m8", 58, 50, 190),
    Voice("F", "en-us+linda", 40, 45, 185),
    Voice("M", "en+adam", 45, 60, 180),
    Voice("F", "en-us+steph", 52, 40, 165),
    Voice("M", "en+m5", 50, 55, 175),
    Voice("F", "en+aunty", 40, 50, 170),
    Voice("M", "en-us+m6", 60, 45, 155),
    Voice("F", "en-us+belinda", 48, 60, 175),
    Voice("M", "en-us+michael", 45, 50, 170),
    Voice("M", "en+edward", 55, 60, 165),
    Voice("F", "en+anika", 50, 45, 180),
    Voice("M", "en-us+quincy", 40, 55, 160),
)

_ACCENTS = ("en-us", "en")
# Variants without robots and whispers, and without near copies of one in VOICES. Such a copy in the training split
# would sound like a held-out speaker. The first 17 may be held out; variants that resemble each other come last.
_MORE_VARIANTS = (
    *("Nguyen", "Marco", "ed", "sandro", "travis", "boris", "Alex", "Denis", "Jacky", "Lee", "Mario", "Reed"),
    *("announcer", "antonio", "croak", "david", "gustave"),
    *("Alicia", "Andrea", "grandma", "shelby"),
    *("grandpa", "ian", "kaukovalta", "marcelo", "mike2", "norbert", "pablo", "paul", "pedro", "rob", "robert"),
    *("victor", "zac", "Andy", "AnxiousAndy", "Gene", "Gene2", "iven", "iven2", "klatt", "klatt2", "klatt3", "klatt4"),
)
_FEMALE_VARIANTS = ("Alicia", "Andrea", "grandma", "shelby")


def _more_voices() -> list[Voice]:
    """One speaker for each further variant; accent, pitch, its range and speed vary over the values in VOICES."""
    return [
        Voice(
            "F" if variant in _FEMALE_VARIANTS else "M",
            f"{_ACCENTS[at % 2]}+{variant}",
            pitch=42 + 5 * at % 17,
            pitch_range=45 + 7 * at % 21,
            words_per_minute=155 + 11 * at % 36,
        )
        for at, variant in enumerate(_MORE_VARIANTS)
    ]


def _again(voice: Voice, pitch_change: int) -> Voice:
    """Another speaker with the same variant."""
    accent, variant = voice.name.split("+")
    return voice._replace(
        name=f"{_ACCENTS[1 - _ACCENTS.index(accent)]}+{variant}",
        pitch=voice.pitch + pitch_change,
        words_per_minute=345 - voice.words_per_minute,  # 155 to 190, reversed
    )


def _large() -> tuple[Voice, ...]:
    pairs = zip_longest(VOICES, _more_voices())
    first = [voice for voice in chain.from_iterable(pairs) if voice is not None]
    trained = first[len(first) // 2 :]  # never held out, as only the first 34 of all 102 speakers are
    return (*first, *(_again(voice, 25 if at % 2 else -25) for at, voice in enumerate(trained)))


_LARGE = _large()
MOST_VOICES = len(_LARGE)


def choose_voices(count: int) -> tuple[Voice, ...]:
    """``count`` speakers, starting with those to hold out (a third at most); up to 24 they are those of `VOICES`."""
    return (VOICES if count <= len(VOICES) else _LARGE)[:count]
