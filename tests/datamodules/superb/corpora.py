"""Tiny made-up corpora in the published layout of each SUPERB task: every utterance is a tone of its own in noise."""

import json
from pathlib import Path

import numpy as np
import soundfile

from datamodules.superb.rows import Row
from datamodules.superb.snips import SPEAKERS
from datamodules.superb.speech_commands import LABELS, NOISE_FOLDER, TEST_ARCHIVE, TRAIN_ARCHIVE, split_of

WORDS = ("HELLO", "WORLD", "GOOD", "MORNING")
LEXICON = "HELLO\tHH AH0 L OW1\nWORLD\tW ER1 L D\nGOOD\tG UH1 D\nMORNING\tM AO1 R N IH0 NG\n"
INTENTS = (("activate", "lights", "kitchen"), ("deactivate", "music", "none"), ("increase", "volume", "none"))
SLOTS = ("playlist", "artist")
EMOTIONS = ("neu", "hap", "ang", "sad")
TESTED = ("id10270", "id10271")


def write_tone(path: Path, seconds: float = 0.5, number: int = 0, rate: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    time_T = np.arange(int(seconds * rate)) / rate
    noise_T = np.random.default_rng(number).standard_normal(len(time_T))
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (200 + 60 * number) * time_T) + 0.01 * noise_T, rate)
    return path


def librispeech(root: Path, train: int = 6, evaluation: int = 2) -> Path:
    """Splits train-clean-100, dev-clean, test-clean and test-other, one speaker each."""
    for speaker, (split, count) in enumerate(
        {"train-clean-100": train, **dict.fromkeys(("dev-clean", "test-clean", "test-other"), evaluation)}.items()
    ):
        folder = root / "LibriSpeech" / split / f"{speaker + 10}" / "7"
        names = [f"{speaker + 10}-7-{number:04d}" for number in range(count)]
        for number, name in enumerate(names):
            write_tone(folder / f"{name}.flac", 0.6 + 0.1 * number, number)
        lines = [f"{name} {' '.join(WORDS[: 1 + number % len(WORDS)])}\n" for number, name in enumerate(names)]
        (folder / f"{speaker + 10}-7.trans.txt").write_text("".join(lines))
    return root


def lexicon(path: Path) -> Path:
    path.write_text(LEXICON)
    return path


def speech_commands(root: Path, noise_seconds: float = 2.5) -> Path:
    """Four keywords and an unknown word; two speakers of train, one of dev and one of the tenth left out."""
    speakers = {split: _speakers_of(split, 2) for split in ("train", "dev", None)}
    for number, word in enumerate(("yes", "no", "up", "down", "bed")):
        for split, names in speakers.items():
            for speaker in names[: 2 if split == "train" else 1]:
                write_tone(root / TRAIN_ARCHIVE / word / f"{speaker}_nohash_0.wav", 0.9, number)
    for number in range(2):
        write_tone(root / TRAIN_ARCHIVE / NOISE_FOLDER / f"noise_{number}.wav", noise_seconds, number)
    for number, label in enumerate(LABELS):
        name = "silence_0.wav" if label == "_silence_" else f"{number:08x}_nohash_0.wav"
        write_tone(root / TEST_ARCHIVE / label / name, 0.9, number)
    return root


def _speakers_of(split: str | None, count: int) -> list[str]:
    names = (f"{number:08x}" for number in range(1000))
    return [name for name in names if split_of(f"{name}_nohash_0.wav") == split][:count]


def fluent(root: Path) -> Path:
    home = root / "fluent_speech_commands_dataset"
    for split, count in {"train": 6, "valid": 3, "test": 3}.items():
        lines = [",path,speakerId,transcription,action,object,location"]
        for number in range(count):
            speaker, name = f"spk{number % 2}{split}", f"{split}-{number}"
            relative = f"wavs/speakers/{speaker}/{name}.wav"
            write_tone(home / relative, 0.5 + 0.05 * number, number)
            # A comma inside quotes, as in the real files.
            lines.append(f'{number},{relative},{speaker},"Yes, please {number}",{",".join(INTENTS[number % 3])}')
        (home / "data").mkdir(exist_ok=True)
        (home / "data" / f"{split}_data.csv").write_text("\n".join(lines) + "\n")
    return root


def voxceleb1(root: Path, speakers: int = 3, long_seconds: float = 1.0) -> Path:
    """Two training utterances, one of dev and one of test for each speaker."""
    lines = []
    for speaker in range(speakers):
        for number, split in enumerate((1, 1, 2, 3)):
            relative = f"id{10001 + speaker}/video{number}/00001.wav"
            write_tone(root / "wav" / relative, long_seconds if number == 0 else 0.6, speaker)
            lines.append(f"{split} {relative}\n")
    (root / "iden_split.txt").write_text("".join(lines))
    return root


def iemocap(root: Path) -> Path:
    """Four emotions of five sessions, whose tones are those of other emotions in the last, so that folds differ."""
    home = root / "IEMOCAP"
    rows = {}
    for session in range(1, 6):
        name = f"Ses{session:02d}F_impro01"
        rows[session] = []
        for number, label in enumerate(EMOTIONS):
            path = f"Session{session}/sentences/wav/{name}/{name}_F{number:03d}.wav"
            write_tone(home / path, 0.5 + 0.05 * number, (number + session // 5) % 4)
            rows[session].append({"path": path, "label": label, "speaker": f"Ses{session:02d}F"})
    for session, test in rows.items():
        train = [row for other, part in rows.items() if other != session for row in part]
        folder = home / "meta_data" / f"Session{session}"
        folder.mkdir(parents=True)
        for split, part in (("train", train), ("test", test)):
            content = {"labels": {label: number for number, label in enumerate(EMOTIONS)}, "meta_data": part}
            (folder / f"{split}_meta_data.json").write_text(json.dumps(content))
    return root


def voxceleb1_trials(root: Path, train_seconds: float = 2.2) -> Path:
    """Three training speakers, one of whose recordings is too short, and two of test with two trials of each kind."""
    speakers = [f"id{10001 + number}" for number in range(3)]
    for number, speaker in enumerate(speakers):
        write_tone(root / "wav" / speaker / "video0" / "00001.wav", train_seconds, number)
        write_tone(root / "wav" / speaker / "video0" / "00002.wav", train_seconds if number else 0.5, number)
    for number, speaker in enumerate(TESTED):
        for file in (1, 2):
            write_tone(root / "wav" / speaker / "video1" / f"0000{file}.wav", 0.8, 10 * number + file)
    names = [f"{speaker}/video1/0000{file}.wav" for speaker in TESTED for file in (1, 2)]
    trials = [(1, 0, 1), (0, 0, 2), (1, 2, 3), (0, 3, 1)]
    lines = [f"{label} {names[first]} {names[second]}\n" for label, first, second in trials]
    (root / "veri_test.txt").write_text("".join(lines))
    return root


def librimix(root: Path, train: int = 5, seconds: float = 1.0) -> Path:
    """Recordings in which a low tone and a high one take turns and overlap."""
    for split, count in {"train": train, "dev": 2, "test": 2}.items():
        folder = root / "diarization" / split
        files: dict[str, list[str]] = {name: [] for name in ("wav.scp", "reco2dur", "segments", "utt2spk", "rttm")}
        for number in range(count):
            name = f"{split}-{number}"
            length = seconds * (1 + 0.1 * number)
            write_tone(folder / "wav" / f"{name}.wav", length, number)
            files["wav.scp"].append(f"{name} wav/{name}.wav")
            files["reco2dur"].append(f"{name} {length:.2f}")
            for speaker, start, end in (("low", 0.0, 0.6 * length), ("high", 0.4 * length, length)):
                files["segments"].append(f"{name}-{speaker} {name} {start:.2f} {end:.2f}")
                files["utt2spk"].append(f"{name}-{speaker} {speaker}")
                files["rttm"].append(f"SPEAKER {name} 1 {start:.2f} {end - start:.2f} <NA> <NA> {speaker} <NA>")
        for file, lines in files.items():
            (folder / file).write_text("\n".join(lines) + "\n")
    return root


def quesst14(root: Path) -> Path:
    """Two English queries in dev and in eval, three English documents, and one of each in another language, at 8 kHz.

    A query is the tone of one document.
    """
    home = root / "quesst14Database"
    documents = [f"quesst14_{number:05d}" for number in range(4)]
    for number, name in enumerate(documents):
        write_tone(home / "Audio" / f"{name}.wav", 0.8, 3 * number, rate=8000)
    (home / "scoring").mkdir()
    _write_keys(home, "utterances", [f"Audio/{name}" for name in documents])
    for part in ("dev", "eval"):
        queries = [f"quesst14_{part}_{number:04d}" for number in range(3)]
        for number, name in enumerate(queries):
            write_tone(home / f"{part}_queries" / f"{name}.wav", 0.4, 3 * number, rate=8000)
        _write_keys(home, part, [f"{part}_queries/{name}" for name in queries])
        pairs = [(documents[0], queries[0]), (documents[1], queries[1]), (documents[3], queries[2])]
        lines = [f"LEXEME {document} 1 0.0 0.8 {query} lex <NA> <NA>\n" for document, query in pairs]
        folder = home / "scoring" / f"groundtruth_quesst14_{part}"
        folder.mkdir()
        (folder / f"quesst14_{part}.rttm").write_text("".join(lines))
    return root


def _write_keys(home: Path, part: str, names: list[str]) -> None:
    """The last file of a list is in another language."""
    languages = [*["nnenglish"] * (len(names) - 1), "czech"]
    lines = [f"quesst14Database/{name}.wav {language}\n" for name, language in zip(names, languages, strict=True)]
    (home / "scoring" / f"language_key_{part}.lst").write_text("".join(lines))


def snips(root: Path, per_voice: int = 1) -> Path:
    home, lines = root / "SNIPS", []
    for split, voices in SPEAKERS.items():
        folder = "valid" if split == "dev" else split
        for voice in voices:
            for number in range(per_voice):
                name = f"{voice}-snips-{folder}-{number}"
                write_tone(home / folder / f"{name}.wav", 0.8, number)
                lines.append(
                    f"{name} BOS PLAY SOME JAZZ BY MILES DAVIS EOS\tO O O playlist O artist artist PlayMusic\n"
                )
    (home / "all.iob.snips.txt").write_text("".join(lines))
    (home / "slots.txt").write_text("\n".join(("O", *SLOTS)) + "\n")
    return root


def table(root: Path, train: int = 6, seconds: float = 0.6) -> Path:
    """One table for all tasks, with trials; train, dev, test and a second test, ``other``."""
    names = ("path", "split", "speaker", "text", "tags", "label", "action", "object", "location", "segments", "role")
    lines = ["\t".join(names)]
    trials = ["split\tfirst\tsecond\tmatches"]
    for split, count in {"train": train, "dev": 3, "test": 3, "other": 3}.items():
        for number in range(count):
            audio = write_tone(root / "audio" / f"{split}-{number}.wav", seconds + 0.05 * number, number)
            intent = INTENTS[number % 3]
            values = (
                f"audio/{audio.name}",
                split,
                f"s{number}",
                "HELLO WORLD",
                "O artist",
                f"tone{number % 3}",
                *intent,
                "a 0.0 0.4, b 0.2 0.6",
                "query" if number == 0 else "document",
            )
            lines.append("\t".join(values))
            if number and split != "train":
                trials.append(f"{split}\taudio/{split}-0\taudio/{split}-{number}\t{number % 2}")
    path = root / "table.tsv"
    path.write_text("\n".join(lines) + "\n")
    (root / "table.trials.tsv").write_text("\n".join(trials) + "\n")
    return path


def rows(lengths: list[int], targets: list[str] | None = None) -> list[Row]:
    """Rows without files, for what only looks at lengths and targets."""
    targets = targets or [""] * len(lengths)
    return [
        Row(str(n), f"{n}.wav", length, target) for n, (length, target) in enumerate(zip(lengths, targets, strict=True))
    ]
