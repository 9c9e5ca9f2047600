from pathlib import Path

import pytest

from lightning_modules.superb.tokenizers import (
    ARPABET,
    SNIPS_CHARACTERS,
    CharacterTokenizer,
    PhoneTokenizer,
    SlotTokenizer,
    UnknownWordError,
    read_lexicon,
)


def test_sizes_of_the_benchmark() -> None:
    assert len(PhoneTokenizer().symbols) == 74
    assert len(CharacterTokenizer().symbols) == 32
    assert len(SlotTokenizer([f"s{n}" for n in range(39)]).symbols) == 109


def test_inventories_are_the_shipped_ones(real_data: Path) -> None:
    shipped = (real_data / "lexicon" / "superb_phoneme_vocab.txt").read_text().split("\n")
    assert [line for line in shipped if line] == ARPABET
    characters = (real_data / "lexicon" / "superb_character_vocab.txt").read_text().split("\n")
    assert list(SNIPS_CHARACTERS) == [line for line in characters if line]


def test_round_trips_on_a_real_lexicon(real_data: Path) -> None:
    lexicon = read_lexicon([real_data / "lexicon" / "librispeech-lexicon-allothers-g2p.txt"])
    phones, letters = PhoneTokenizer(lexicon=lexicon), CharacterTokenizer()
    assert len(lexicon) == 14_716
    for word in lexicon:
        assert phones.decode(phones.encode(word)) == phones.reference(word) == " ".join(lexicon[word])
        assert letters.decode(letters.encode(f"{word} {word}")) == f"{word} {word}"


def test_the_first_pronunciation_counts_and_stress_stays(tmp_path: Path) -> None:
    for name, line in (("one", "A\tAH0\nA\tEY1\n"), ("two", "A  EY1\nB B IY1\n")):
        (tmp_path / name).write_text(line)
    tokenizer = PhoneTokenizer(lexicon=read_lexicon([tmp_path / "one", tmp_path / "two"]))
    assert tokenizer.reference("A B") == "AH0 B IY1"
    assert tokenizer.encode("A")[-1] == tokenizer.eos == 1
    assert tokenizer.encode("a b") == tokenizer.encode("A B")
    with pytest.raises(UnknownWordError, match="C"):
        tokenizer.encode("A c")
    (tmp_path / "bad").write_text("A AH\n")
    with pytest.raises(ValueError, match=r"bad, line 1: 'AH' is not among the 71 phones"):
        read_lexicon([tmp_path / "bad"])


def test_characters_end_every_word_and_the_utterance() -> None:
    tokenizer = CharacterTokenizer()
    labels = tokenizer.encode("it's a")
    assert [tokenizer.symbols[label] for label in labels] == ["I", "T", "'", "S", "|", "A", "|", "</s>"]
    assert tokenizer.decode(labels) == "IT'S A"


def test_padding_that_asr_predicts_makes_its_word_wrong() -> None:
    tokenizer = CharacterTokenizer()
    labels = [tokenizer.symbols.index(symbol) for symbol in ("A", "<pad>", "|", "<s>", "B", "<unk>", "|", "</s>")]
    assert tokenizer.decode(labels) == "A<pad> B<unk>"


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("play jazz\tO x", [*"PLAY", " ", "B-x", *"JAZZ", "E-x", "<eos>"]),
        ("a b c\tx x O", ["B-x", "A", " ", "B", "E-x", " ", "C", "<eos>"]),  # neighbours merge
        ("a b\tx y", ["B-x", "A", "E-x", " ", "B-y", "B", "E-y", "<eos>"]),
        ("r & b\tO O O", ["R", " ", *"AND", " ", "B", "<eos>"]),
        ("a , b .\tO O O O", ["A", " ", "B", " "]),  # the last word is punctuation: no <eos>
        ("a1\tO", ["A", "<unk>", "<eos>"]),
    ],
)
def test_slots_around_their_values(text: str, symbols: list[str]) -> None:
    tokenizer = SlotTokenizer(["x", "y"])
    assert [tokenizer.symbols[label] for label in tokenizer.encode(text)] == symbols


def test_slot_text_has_single_spaces() -> None:
    assert SlotTokenizer(["x"]).reference("play the jazz\tO O x") == "PLAY THE B-x JAZZ E-x"
