from itertools import islice

from datamodules.sentences import sentences, transcript


def test_sentences_are_a_function_of_the_seed() -> None:
    first = list(islice(sentences("0/1001"), 50))
    assert list(islice(sentences("0/1001"), 50)) == first
    assert list(islice(sentences("0/1002"), 50)) != first


def test_a_known_beginning() -> None:
    """Guards against a change of the grammar, which would change every published corpus."""
    assert next(sentences(0)) == "My priest followed the dry blanket in the morning."


def test_sentences_are_varied_and_complete() -> None:
    texts = list(islice(sentences(1), 5000))
    words = {word for text in texts for word in transcript(text).split()}
    assert len(words) > 800
    assert len(set(texts)) > 4900
    assert not any("{" in text or "+" in text or "  " in text for text in texts)
    assert all(text[-1] in ".?" or text.split('," said ')[1:] for text in texts)
    assert not any(wrong in text for text in texts for wrong in ("sheeps", "mouses", "was a oven"))


def test_transcript_is_written_as_in_librispeech() -> None:
    assert transcript('"Softly, we\'ll go," said Ruth.') == "SOFTLY WE'LL GO SAID RUTH"
