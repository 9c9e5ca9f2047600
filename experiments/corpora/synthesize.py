"""``interstack synthesize``: make a small speech corpus in LibriSpeech layout on this machine."""

from datamodules.synthetic import synthesize_corpus


def synthesize(output: str, minutes: float = 20.0, voices: int = 12, seed: int = 0, overwrite: bool = False) -> None:
    """Make a corpus of synthetic English speech in LibriSpeech layout, with phone alignments beside it.

    This takes seconds and needs `pip install 'interstack[synthetic]'` (eSpeak NG, GPL-3.0). An existing corpus with
    the same settings is kept.

    Args:
        output: the folder that gets LibriSpeech/.
        minutes: minutes of speech, over all splits.
        voices: number of speakers, 3 to 102; dev-clean and test-clean each hold out a sixth of them.
        seed: seed of sentences and voices; the same settings give the same files.
        overwrite: replace a synthetic corpus of other settings.
    """
    synthesize_corpus(output, minutes, voices, seed, overwrite)
