"""English sentences from a small grammar (``grammar.txt``), varied and the same for the same seed on every machine.

Sentences only have to be pronounceable and to use every English phone in many contexts, since a synthesiser
reads them and small models are trained on the sound. They are in the past tense, so they need no agreement
rules.
"""

import random
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

_SLOT = re.compile(r"\{(\w+)\}")
_SPELLING = {
    r"\b(sheep|deer)s\b": r"\1",
    r"\bgooses\b": "geese",
    r"\bmouses\b": "mice",
    r"\bwolfs\b": "wolves",
    r"\bcalfs\b": "calves",
    r"\boxs\b": "oxen",
    r"\bfoxs\b": "foxes",
    r"\bwas a (?=[aeiou])": "was an ",
}


@cache
def _grammar() -> dict[str, list[str]]:
    """Choices of each slot; ``sentence`` is the start symbol."""
    text = (files("datamodules") / "grammar.txt").read_text(encoding="utf-8")
    parts = re.split(r"^\[(\w+)\]$", text, flags=re.MULTILINE)[1:]
    slots = {name: body.split() for name, body in zip(parts[::2], parts[1::2], strict=True)}
    return slots | {"sentence": parts[-1].strip().splitlines()}


def _sentence(generator: random.Random) -> str:
    text = generator.choice(_grammar()["sentence"])
    while slot := _SLOT.search(text):
        word = generator.choice(_grammar()[slot[1]]).replace("+", " ")
        text = text[: slot.start()] + word + text[slot.end() :]
    for pattern, spelling in _SPELLING.items():
        text = re.sub(pattern, spelling, text)
    start = 1 if text.startswith('"') else 0
    return text[:start] + text[start].upper() + text[start + 1 :]


def sentences(seed: int | str) -> Iterator[str]:
    """Yield texts of one or two sentences without end, as a pure function of ``seed`` (strings are hashed)."""
    generator = random.Random(str(seed))
    while True:
        yield " ".join(_sentence(generator) for _ in range(generator.choice((1, 1, 2))))


def transcript(text: str) -> str:
    """``text`` in LibriSpeech's form, with upper-case letters, apostrophes and single spaces only."""
    return " ".join(re.sub(r"[^A-Z' ]", " ", text.upper()).split())
