"""Tokenizers of the CTC tasks: phones (PR), characters (ASR), characters and slots (SF).

``<eos>`` ends a CTC target and is part of it; ``decode`` drops it. Symbols outside the inventory become ``<unk>``.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from datamodules.errors import InputError
from datamodules.files import read_lines

VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
CONSONANTS = (
    *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N"),
    *("NG", "P", "R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH"),
)
ARPABET = ["SIL", "SPN", *sorted([*(vowel + stress for vowel in VOWELS for stress in "012"), *CONSONANTS])]
"""SUPERB's 71 phones in the order of its vocabulary file."""
SNIPS_CHARACTERS = " ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
# fairseq's dictionary of LibriSpeech letters, ordered by frequency.
ASR_SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", *"|ETAONIHSRDLUMCWFGYPBVK'XJQZ"]
PUNCTUATION = "?!.,;-"
NO_SLOT = "O"


class Tokenizer(Protocol):
    """Converts the text of a row to classes and back.

    Attributes:
        blank: class of CTC's blank.
        eos: class of the end of a target.
        symbols: name of each class.
        pieces: what each class adds to the text, from which :func:`joined` makes it; nothing for blank and ``<eos>``.
    """

    blank: int
    eos: int
    symbols: list[str]
    pieces: list[str]

    def target(self, text: str) -> list[str]:
        """Symbols of the target, including ``<eos>`` and symbols outside the inventory."""

    def encode(self, text: str) -> list[int]:
        """Classes of the target."""

    def decode(self, labels: Sequence[int]) -> str:
        """Text of a list of classes without blanks."""

    def reference(self, text: str) -> str:
        """The text in the form that hypotheses are compared with."""


def joined(pieces: Iterable[str]) -> str:
    """The text of the pieces of its classes."""
    return " ".join("".join(pieces).split())


class UnknownWordError(InputError):
    """A word is not in the lexicon."""


class PhoneTokenizer:
    """Converts words to phones with a lexicon, or takes texts of phones.

    Args:
        phones: the inventory; by default SUPERB's 71, which makes 74 classes.
        lexicon: phones of each upper-case word; ``None``: texts are phones already, separated by spaces.
    """

    blank, eos, unknown = 0, 1, 2

    def __init__(self, phones: Sequence[str] = ARPABET, lexicon: Mapping[str, Sequence[str]] | None = None) -> None:
        self.symbols = ["<pad>", "<eos>", "<unk>", *phones]
        self.pieces = ["", "", *(f"{symbol} " for symbol in self.symbols[self.unknown :])]
        self.lexicon = lexicon
        self._index = {symbol: index for index, symbol in enumerate(self.symbols)}

    def phones(self, text: str) -> list[str]:
        """The phones of all words, without word boundaries.

        Raises:
            UnknownWordError: a word is not in the lexicon.
        """
        if self.lexicon is None:
            return text.split()
        if missing := self.missing(text):
            raise UnknownWordError(f"not in the lexicon: {' '.join(missing)}")
        return [phone for word in text.upper().split() for phone in self.lexicon[word]]

    def missing(self, text: str) -> list[str]:
        """Words of the text that are not in the lexicon."""
        return [word for word in text.upper().split() if self.lexicon is not None and word not in self.lexicon]

    def target(self, text: str) -> list[str]:
        return [*self.phones(text), "<eos>"]

    def encode(self, text: str) -> list[int]:
        return [self._index.get(symbol, self.unknown) for symbol in self.target(text)]

    def decode(self, labels: Sequence[int]) -> str:
        return joined(self.pieces[label] for label in labels)

    def reference(self, text: str) -> str:
        return " ".join(self.phones(text))


class CharacterTokenizer:
    """Converts text to letters, with ``|`` after every word and ``</s>`` at the end.

    A predicted ``<pad>`` stays in the word, like ``<unk>``: s3prl's decoder drops only blank and ``</s>``.
    """

    blank, eos, unknown = 0, 2, 3

    def __init__(self) -> None:
        self.symbols = list(ASR_SYMBOLS)
        self.pieces = [symbol.replace("|", " ") for symbol in self.symbols]
        self.pieces[self.blank] = self.pieces[self.eos] = ""
        self._index = {symbol: index for index, symbol in enumerate(self.symbols)}

    def target(self, text: str) -> list[str]:
        return [*"".join(f"{word}|" for word in text.upper().split()), "</s>"]

    def encode(self, text: str) -> list[int]:
        return [self._index.get(symbol, self.unknown) for symbol in self.target(text)]

    def decode(self, labels: Sequence[int]) -> str:
        return joined(self.pieces[label] for label in labels)

    def reference(self, text: str) -> str:
        return " ".join(text.upper().split())


class SlotTokenizer:
    """Converts text to characters, with ``B-type`` and ``E-type`` around the value of each slot.

    Args:
        slots: slot types, without ``O``; SNIPS's 39 make 109 classes.
    """

    blank, eos, unknown = 0, 1, 2

    def __init__(self, slots: Sequence[str]) -> None:
        marks = [f"{side}-{slot}" for slot in slots for side in "BE"]
        self.symbols = ["<pad>", "<eos>", "<unk>", *SNIPS_CHARACTERS, *marks]
        spaced = [f"{mark} " if mark.startswith("B-") else f" {mark}" for mark in marks]
        self.pieces = ["", "", "<unk>", *SNIPS_CHARACTERS, *spaced]
        self._index = {symbol: index for index, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> list[int]:
        return [self._index.get(symbol, self.unknown) for symbol in self.target(text)]

    def target(self, text: str) -> list[str]:
        """Symbols of ``words<TAB>tags``; neighbours with the same tag are one slot."""
        words, _, tags = text.partition("\t")
        pairs = list(zip(words.split(" "), tags.split(" "), strict=True))
        symbols: list[str] = []
        for position, (word, tag) in enumerate(pairs):
            if word in PUNCTUATION:
                continue
            before = pairs[position - 1][1] if position else NO_SLOT
            after = pairs[position + 1][1] if position + 1 < len(pairs) else NO_SLOT
            symbols += [f"B-{tag}"] if tag not in (NO_SLOT, before) else []
            symbols += "AND" if word == "&" else word.upper()
            symbols += [f"E-{tag}"] if tag not in (NO_SLOT, after) else []
            symbols.append(" " if position + 1 < len(pairs) else "<eos>")
        return symbols

    def decode(self, labels: Sequence[int]) -> str:
        return joined(self.pieces[label] for label in labels)

    def reference(self, text: str) -> str:
        return self.decode(self.encode(text))


def read_lexicon(paths: Sequence[str | Path], phones: Sequence[str] = ARPABET) -> dict[str, list[str]]:
    """Read the phones of words from files of ``WORD PHONE PHONE ...``; a word's first pronunciation is used.

    Raises:
        InputError: a file cannot be read, a line has no phones, or a phone is not in the inventory.
    """
    lexicon: dict[str, list[str]] = {}
    known = set(phones)
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"the lexicon {path} does not exist: give files of lines 'WORD PHONE PHONE ...'")
        for number, line in enumerate(read_lines(path), 1):
            word, *spoken = line.split() or [""]
            if word and not spoken:
                raise InputError(f"{path}, line {number}: {word!r} has no phones")
            if unknown := set(spoken) - known:
                raise InputError(
                    f"{path}, line {number}: {min(unknown)!r} is not among the {len(known)} phones; vowels carry "
                    "their stress, as in AH0"
                )
            if word:
                lexicon.setdefault(word.upper(), spoken)
    return lexicon
