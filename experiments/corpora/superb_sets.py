"""``python -m experiments.corpora.superb_sets --root CORPUS --train SPLIT --dev SPLIT --test SPLIT --output DIR``.

Makes corpora for three tasks of SUPERB, to compare encoders where VoxCeleb1, LibriMix and QUESST 2014 are not at hand,
from transcribed speech in LibriSpeech's layout with phone alignments (``interstack align``)::

    OUTPUT/speakers.tsv, speakers.trials.tsv          for ASV: every utterance, and pairs of one speaker and of two
    OUTPUT/diarization/{train,dev,test}/              for SD: mixtures of two speakers, in LibriMix's Kaldi layout
    OUTPUT/queries.tsv, queries.trials.tsv, queries/  for QbE: words cut from some utterances, to be found in others

Everything is a function of the corpus and the seed.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile
from jsonargparse.typing import PositiveInt

from datamodules.alignments import SILENCE, Alignment, Segment, read_split
from datamodules.audio import SAMPLE_RATE, read_audio
from datamodules.errors import InputError
from datamodules.files import replacing, write_text
from datamodules.forced_alignment import AlignmentError, PhoneAligner
from datamodules.superb.librispeech import read_librispeech
from datamodules.superb.rows import Row
from datamodules.superb.trials import COLUMNS, DOCUMENT, QUERY, trials_file

Splits = Mapping[str, Sequence[Row]]
SHORTEST_PAUSE = 0.25
"""Seconds of silence that end a speaker's segment; shorter pauses belong to it."""
FEWEST_LETTERS = 6
"""Letters of the shortest query; short words are heard inside others."""
MOST_DOCUMENTS = 10
"""A word in more documents is too common to be searched for."""


def superb_sets(
    root: str,
    train: str,
    dev: str,
    test: str,
    output: str,
    trials: PositiveInt = 500,
    mixtures: tuple[PositiveInt, PositiveInt, PositiveInt] = (200, 30, 60),
    queries: PositiveInt = 40,
    seed: int = 0,
) -> None:
    """Write the three corpora; audio that is there is kept.

    Args:
        root: corpus with alignments.
        train: split to train on.
        dev: split to choose checkpoints on.
        test: split to test on, with other speakers than train.
        output: folder of the corpora.
        trials: most pairs of one kind in dev and in the test.
        mixtures: number of mixtures of train, dev and the test.
        queries: most queries of dev and of the test.
        seed: seed of pairs and mixtures.

    Raises:
        InputError: a split is missing, has one speaker only, has no alignments, or is too small for a query.
    """
    corpus = read_librispeech(root, [train], [dev], [test])
    splits = {"train": corpus.train, "dev": corpus.dev, "test": corpus.tests[test]}
    folder = Path(output).resolve()
    write_speakers(folder / "speakers.tsv", splits, trials, seed)
    aligned = {name: read_split(root, split) for name, split in (("train", train), ("dev", dev), ("test", test))}
    for (name, rows), number in zip(splits.items(), mixtures, strict=True):
        write_mixtures(folder / "diarization" / name, rows, aligned[name], number, seed)
    write_queries(folder, {name: splits[name] for name in ("dev", "test")}, queries)


def write_speakers(path: Path, splits: Splits, most: int, seed: int) -> None:
    """Write ASV's table and trials: equally many random pairs of one speaker and of two in dev and in the test."""
    lines = ["path\tsplit\tkey\tlabel"]
    lines += [f"{row.path}\t{name}\t{row.key}\t{row.speaker}" for name, rows in splits.items() for row in rows]
    write_text(path, "\n".join(lines) + "\n")
    pairs = ["\t".join(COLUMNS)]
    for name, rows in splits.items():
        if name == "train":
            continue
        kinds: dict[bool, list[tuple[Row, Row]]] = {True: [], False: []}
        for first, second in itertools.combinations(rows, 2):
            kinds[first.speaker == second.speaker].append((first, second))
        if not all(kinds.values()):
            raise InputError(f"the split {name} needs two speakers with two utterances each for trials")
        number = min(most, *map(len, kinds.values()))
        for matches, found in kinds.items():
            for index in sorted(np.random.default_rng([seed, matches]).permutation(len(found))[:number]):
                first, second = found[index]
                pairs.append(f"{name}\t{first.key}\t{second.key}\t{int(matches)}")
    write_text(trials_file(str(path)), "\n".join(pairs) + "\n")


def write_mixtures(folder: Path, rows: Sequence[Row], aligned: Alignment, number: int, seed: int) -> None:
    """Write mixtures of two speakers as WAV, and wav.scp, segments, utt2spk, spk2utt, reco2dur and rttm.

    The second speaker begins within the first half of the first one's audio, and is louder or softer by up to 3 dB.
    """
    rows = [row for row in rows if row.key in aligned]
    if len({row.speaker for row in rows}) < 2:
        raise InputError(f"mixtures of {folder.name} need aligned utterances of two speakers: run interstack align")
    generator = np.random.default_rng([seed, len(rows)])
    files: dict[str, list[str]] = defaultdict(list)
    spoken: dict[str, list[str]] = defaultdict(list)
    for _ in range(number):
        first = rows[generator.integers(len(rows))]
        others = [row for row in rows if row.speaker != first.speaker]
        second = others[generator.integers(len(others))]
        delay = int(generator.uniform(0, first.num_samples / 2))
        gain = 10 ** (generator.uniform(-3, 3) / 20)
        name = f"{first.key}_{second.key}_{delay}"
        path = folder / "wav" / f"{name}.wav"
        length = max(first.num_samples, delay + second.num_samples)
        if not path.exists():
            mixed_T = np.zeros(length, np.float32)
            mixed_T[: first.num_samples] += read_audio(first.path)
            mixed_T[delay : delay + second.num_samples] += gain * read_audio(second.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                soundfile.write(temporary, 0.9 * mixed_T / max(1.0, np.abs(mixed_T).max()), SAMPLE_RATE, format="WAV")
        files["wav.scp"].append(f"{name} {path}")
        files["reco2dur"].append(f"{name} {length / SAMPLE_RATE:.4f}")
        for row, offset in ((first, 0.0), (second, delay / SAMPLE_RATE)):
            for index, (start, end) in enumerate(speech(aligned[row.key])):
                utterance = f"{row.speaker}_{name}_{index:03d}"
                spoken[row.speaker].append(utterance)
                files["segments"].append(f"{utterance} {name} {start + offset:.2f} {end + offset:.2f}")
                files["utt2spk"].append(f"{utterance} {row.speaker}")
                times = f"{start + offset:.2f} {end - start:.2f}"
                files["rttm"].append(f"SPEAKER {name} 1 {times} <NA> <NA> {row.speaker} <NA>")
    files["spk2utt"] = [" ".join([speaker, *names]) for speaker, names in sorted(spoken.items())]
    for name, lines in files.items():
        write_text(folder / name, "\n".join(lines) + "\n")


def speech(phones: Iterable[Segment]) -> Iterator[tuple[float, float]]:
    """Start and end in seconds of the stretches of speech between pauses."""
    start = end = None
    for phone in phones:
        if phone.phone == SILENCE:
            continue
        if start is not None and end is not None and phone.start_seconds - end >= SHORTEST_PAUSE:
            yield start, end
            start = None
        start = phone.start_seconds if start is None else start
        end = phone.end_seconds
    if start is not None and end is not None:
        yield start, end


def write_queries(folder: Path, splits: Splits, most: int) -> None:
    """Write QbE's table and trials: queries are cut from every other utterance, the rest are the documents."""
    aligner = PhoneAligner()
    lines, pairs = ["path\tsplit\tkey\trole"], ["\t".join(COLUMNS)]
    for name, rows in splits.items():
        documents, sources = rows[::2], rows[1::2]
        found: dict[str, list[str]] = defaultdict(list)
        for row in documents:
            lines.append(f"{row.path}\t{name}\t{row.key}\t{DOCUMENT}")
            for word in dict.fromkeys(row.target.upper().split()):
                found[word].append(row.key)
        wanted = {word for word, keys in found.items() if len(word) >= FEWEST_LETTERS and len(keys) <= MOST_DOCUMENTS}
        cut = list(itertools.islice(_cut_words(folder / "queries", sources, wanted, aligner), most))
        if not cut:
            raise InputError(
                f"the split {name} has no query: of two halves of its utterances, both must have a word of at least "
                f"{FEWEST_LETTERS} letters; give more utterances"
            )
        for word, key, path in cut:
            lines.append(f"{path}\t{name}\t{key}\t{QUERY}")
            pairs += [f"{name}\t{key}\t{document}\t1" for document in found[word]]
    write_text(folder / "queries.tsv", "\n".join(lines) + "\n")
    write_text(trials_file(str(folder / "queries.tsv")), "\n".join(pairs) + "\n")


def _cut_words(
    folder: Path, rows: Sequence[Row], wanted: set[str], aligner: PhoneAligner
) -> Iterator[tuple[str, str, Path]]:
    """Cut the first occurrence of each wanted word: the word, the query's key and its file."""
    left = set(wanted)
    for row in rows:
        if left.isdisjoint(row.target.upper().split()):
            continue
        samples_T = read_audio(row.path)
        try:
            words = aligner.align_words(samples_T, row.target)
        except AlignmentError:
            continue
        for word in words:
            if word.phone not in left:
                continue
            left.remove(word.phone)
            start, end = (round(SAMPLE_RATE * seconds) for seconds in (word.start_seconds, word.end_seconds))
            key = f"{row.key}_{word.phone}"
            path = folder / f"{key}.wav"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    soundfile.write(temporary, samples_T[start:end], SAMPLE_RATE, format="WAV")
            yield word.phone, key, path


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(superb_sets)
