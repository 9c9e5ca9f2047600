"""The corpora of SD (chunks of mixtures) and QbE (queries and documents of 8 kHz)."""

from pathlib import Path

import pytest

from datamodules.superb.datamodule import SuperbDataModule
from datamodules.superb.librimix import CHUNK_FRAMES, Segment, chunk_of, chunks, read_librimix, speech_of, text_of
from datamodules.superb.quesst import read_quesst14
from datamodules.superb.registry import SuperbData, read_corpus
from datamodules.superb.rows import Reading, Row, Trial
from tests.datamodules.superb import corpora


def test_segments_and_their_text() -> None:
    segments = [Segment("a", 0.0, 1.52), Segment("b", 1.2, 3.0)]
    assert speech_of(text_of(segments)) == segments
    assert speech_of("") == []
    for text, message in (("a 0.0", "is no segment"), ("a 0 x", "is no segment"), ("a 2 1", "ends before it starts")):
        with pytest.raises(ValueError, match=message):
            speech_of(text)


def test_recordings_are_cut_into_chunks_of_frames() -> None:
    """41.015 s are 2,050.75 frames of 20 ms: one chunk of 40 s, one of 50 frames, and the rest is dropped."""
    found = list(chunks(Row("rec", "rec.wav", 0, ""), 41.015, 320))
    assert [(row.key, row.start, row.num_samples) for row in found] == [
        ("rec", 0, 640_000),
        (f"rec@{CHUNK_FRAMES}", 640_000, 16_000),
    ]
    assert [chunk_of(row.key) for row in found] == [("rec", 0), ("rec", 2000)]
    assert [row.num_samples for row in chunks(Row("rec", "", 0, ""), 41.015, 160)] == [320_000, 320_000, 16_160]
    # One frame at the end is shorter than an encoder's window; two are not.
    assert [row.num_samples for row in chunks(Row("rec", "", 0, ""), 40.02, 320)] == [640_000]
    assert [row.num_samples for row in chunks(Row("rec", "", 0, ""), 40.04, 320)] == [640_000, 640]


def test_the_kaldi_folders_are_read(tmp_path: Path) -> None:
    corpus = read_librimix(str(corpora.librimix(tmp_path)))
    assert [len(rows) for rows in corpus.splits.values()] == [5, 2, 2]
    row = corpus.train[1]
    assert (row.key, row.num_samples, row.start) == ("train-1", 17_600, 0)
    assert speech_of(row.target) == [Segment("low", 0.0, 0.66), Segment("high", 0.44, 1.1)]
    assert Path(row.path).is_file()


def test_segments_of_one_id_have_its_last_speaker(tmp_path: Path) -> None:
    """Ids are made of times only, so both speakers can have one; s3prl reads ``utt2spk`` so too."""
    root = corpora.librimix(tmp_path, train=1)
    folder = root / "diarization" / "train"
    (folder / "segments").write_text("same train-0 0.0 0.5\nother train-0 0.5 1.0\nsame train-0 0.0 0.5\n")
    (folder / "utt2spk").write_text("same low\nother low\nsame high\n")
    assert speech_of(read_librimix(str(root)).train[0].target) == [
        Segment("high", 0.0, 0.5),
        Segment("low", 0.5, 1.0),
        Segment("high", 0.0, 0.5),
    ]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("wav.scp", "train-0 sox train-0.wav -t wav - |", "is a command"),
        ("wav.scp", "other wav/train-0.wav", "other has no duration"),
        ("reco2dur", "train-0 9.0", "is too short"),
        ("reco2dur", "train-0 long", "the duration of train-0 is 'long'; give seconds"),
        ("segments", "train-0-low train-0 0.0 0.5", "train-0 has 1 speakers"),
        ("segments", "unknown train-0 0.0 0.5", "unknown has no speaker"),
        ("segments", "train-0-low train-0 0.0", "line 1: .* has 3 fields, not 4"),
    ],
)
def test_faults_of_the_kaldi_folders_are_errors(file: str, text: str, message: str, tmp_path: Path) -> None:
    root = corpora.librimix(tmp_path, train=1)
    (root / "diarization" / "train" / file).write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read_librimix(str(root))


def test_a_missing_file_names_the_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Libri2Mix is not there: .*github.com/s3prl/LibriMix"):
        read_librimix(str(tmp_path))
    with pytest.raises(ValueError, match=r"QUESST 2014 is not there: .*quesst14Database.tgz"):
        read_quesst14(str(tmp_path))


def test_a_chunk_is_read_from_its_start(tmp_path: Path) -> None:
    """A second chunk has the samples of its place in the file; 25 s are two chunks at 10 ms a frame."""
    root = corpora.librimix(tmp_path, train=1, seconds=25.0)
    corpus = read_corpus("sd", SuperbData(str(root)), hop=160)
    assert [row.key for row in corpus.train] == ["train-0", "train-0@2000"]
    module = SuperbDataModule("sd", SuperbData(str(root), num_workers=0), corpus=corpus)
    (whole,) = [row for row in read_corpus("sd", SuperbData(str(root))).train]
    batch = next(iter(module.train_dataloader()))
    wave = dict(zip((row.key for row in batch.rows), batch.waveforms, strict=True))["train-0@2000"]
    from datamodules.audio import read_audio

    assert wave.tolist() == read_audio(whole.path)[320_000:400_000].tolist()
    assert wave.tolist() != read_audio(whole.path)[:80_000].tolist()


def test_english_queries_and_documents_are_read(tmp_path: Path) -> None:
    corpus = read_quesst14(str(corpora.quesst14(tmp_path)), Reading(resample=True))
    assert not corpus.train
    assert list(corpus.tests) == ["test"]
    assert [(row.key, row.target) for row in corpus.dev] == [
        *((f"quesst14_dev_{number:04d}", "query") for number in range(2)),
        *((f"quesst14_{number:05d}", "document") for number in range(3)),
    ]
    assert corpus.dev[0].num_samples == 6400  # 0.4 s at 16 kHz
    trials = corpus.trials["test"]
    assert len(trials.pairs) == 2 * 3
    assert [pair for pair in trials.pairs if pair.matches] == [
        Trial("quesst14_eval_0000", "quesst14_00000", True),
        Trial("quesst14_eval_0001", "quesst14_00001", True),
    ]
    assert (trials.queries, trials.documents) == (3, 4)  # of all languages


def test_its_recordings_are_converted_without_being_asked(tmp_path: Path) -> None:
    data = SuperbData(str(corpora.quesst14(tmp_path)), num_workers=0)
    module = SuperbDataModule("qbe", data)
    module.setup()
    batch = next(iter(module.val_dataloader()))
    assert len(batch.waveforms[0]) == 6400
    with pytest.raises(ValueError, match="8000 Hz"):  # the control: other corpora must ask
        read_quesst14(data.root, Reading())


def test_faults_of_the_lists_are_errors(tmp_path: Path) -> None:
    root = corpora.quesst14(tmp_path)
    scoring = root / "quesst14Database" / "scoring"
    path = scoring / "groundtruth_quesst14_dev" / "quesst14_dev.rttm"
    before = path.read_text()
    path.write_text("SPEAKER a 1 0 1\n")
    with pytest.raises(ValueError, match=r"quesst14_dev.rttm has no line 'LEXEME"):
        read_quesst14(str(root), Reading(resample=True))
    path.write_text(before)
    (scoring / "language_key_dev.lst").write_text("dev_queries/a.wav czech\n")
    with pytest.raises(ValueError, match=r"language_key_dev.lst has no file of the language nnenglish"):
        read_quesst14(str(root), Reading(resample=True))
