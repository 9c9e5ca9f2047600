"""A corpus with alignments that a small model learns in seconds: every phone is a tone of its own."""

from pathlib import Path

import numpy as np
import soundfile

from datamodules.alignments import Segment, write_alignment

TONES = {"a": 300, "b": 900, "c": 2000, "d": 4000}  # Hz
RATE = 16_000


def swap_alignments(root: Path, split: str) -> None:
    """Give the first four utterances of a split the phones of each other."""
    (file,) = (root / "alignments" / split).glob("*.tsv")
    text = file.read_text()
    for one, two in (("0", "1"), ("2", "3")):
        text = text.replace(f"000{one}\t", "swap\t").replace(f"000{two}\t", f"000{one}\t")
        text = text.replace("swap\t", f"000{two}\t")
    file.write_text(text)


def save_aligned_corpus(root: Path, splits: dict[str, int], seed: int = 0) -> Path:
    """So many utterances of four tones, all different, and two pauses (about 1.1 s) for each split."""
    generator = np.random.default_rng(seed)
    for speaker, (split, utterances) in enumerate(splits.items(), 1):
        folder = root / split / str(speaker) / "1"
        folder.mkdir(parents=True)
        (root / "alignments" / split).mkdir(parents=True)
        alignment = {}
        for number in range(utterances):
            pieces, segments, position = [], [], 0
            for phone in ("SIL", *generator.permutation(list(TONES)), "SIL"):
                length = int(generator.integers(2000, 4000))
                times = np.arange(length) / RATE
                pieces.append(0.3 * np.sin(2 * np.pi * TONES[phone] * times) if phone in TONES else np.zeros(length))
                segments.append(Segment(str(phone), position / RATE, (position + length) / RATE))
                position += length
            waveform_T = np.concatenate(pieces) + 0.003 * generator.standard_normal(position)
            name = f"{speaker}-1-{number:04d}"
            soundfile.write(folder / f"{name}.flac", waveform_T, RATE)
            alignment[name] = segments
        write_alignment(root / "alignments" / split / f"{speaker}-1.tsv", alignment)
    return root
