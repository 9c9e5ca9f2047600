"""Every corpus is read from a folder in its published layout; a folder that is not there says what it should be."""

from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.superb.fluent import read_fluent
from datamodules.superb.librispeech import read_librispeech
from datamodules.superb.registry import SuperbData, read_corpus
from datamodules.superb.snips import read_snips
from datamodules.superb.speech_commands import LABELS, NOISE_FOLDER, TRAIN_ARCHIVE, read_speech_commands, split_of
from datamodules.superb.voxceleb import read_voxceleb1
from tests.datamodules.superb import corpora


def test_librispeech(tmp_path: Path) -> None:
    corpora.librispeech(tmp_path)
    corpus = read_librispeech(
        str(tmp_path), test_splits=("test-clean", "test-other"), cache_dir=str(tmp_path / "cache")
    )
    assert (len(corpus.train), len(corpus.dev), list(corpus.tests)) == (6, 2, ["test-clean", "test-other"])
    row = corpus.train[1]
    assert (row.key, row.speaker, row.num_samples, row.target) == ("10-7-0001", "10", 11_200, "HELLO WORLD")


def test_speech_commands(tmp_path: Path) -> None:
    corpus = read_speech_commands(str(corpora.speech_commands(tmp_path)))
    assert len(corpus.train) == 5 * 2 + 2
    assert len(corpus.dev) == 5 + 2
    assert [row.target for row in corpus.tests["test"]] == LABELS == corpus.labels[0]
    assert {row.target for row in corpus.train} == {"yes", "no", "up", "down", "_unknown_", "_silence_"}
    # One speaker's files have one name in several folders.
    keys = [row.key for row in corpus.train]
    assert len({key.partition("-")[2] for key in keys}) < len({*keys}) == len(keys)
    assert corpus.tests["test"][0].key == "yes-00000000_nohash_0.wav"
    # The archive's folder itself, with the test archive named, is the same corpus.
    again = read_speech_commands(str(tmp_path / TRAIN_ARCHIVE), str(tmp_path / "speech_commands_test_set_v0.01"))
    assert again == corpus


# Real speakers; percentages by sha1sum and shell arithmetic: 0, 7, 18, 40, 44.
SPLITS = {"026290a7": "dev", "060cd039": "dev", "0ea0e2f4": None, "0137b3f4": "train", "0b09edd3": "train"}


@pytest.mark.parametrize(("speaker", "split"), SPLITS.items())
def test_a_speaker_has_one_split(speaker: str, split: str | None) -> None:
    assert split_of(f"{speaker}_nohash_0.wav") == split_of(f"{speaker}_nohash_4.wav") == split


def test_the_splits_have_their_shares() -> None:
    found = [split_of(f"{number:08x}_nohash_3.wav") for number in range(5000)]
    assert found.count("dev") / 5000 == pytest.approx(0.1, abs=0.015)
    assert found.count(None) / 5000 == pytest.approx(0.1, abs=0.015)


def test_fluent(tmp_path: Path) -> None:
    corpus = read_fluent(str(corpora.fluent(tmp_path)))
    assert [len(corpus.train), len(corpus.dev), len(corpus.tests["test"])] == [6, 3, 3]
    # In order of appearance, not sorted.
    assert corpus.labels == [["activate", "deactivate", "increase"], ["lights", "music", "volume"], ["kitchen", "none"]]
    assert corpus.train[1].target == "deactivate\tmusic\tnone"
    assert read_fluent(str(tmp_path / "fluent_speech_commands_dataset")) == corpus


def test_voxceleb1(tmp_path: Path) -> None:
    corpus = read_voxceleb1(str(corpora.voxceleb1(tmp_path)))
    assert [len(corpus.train), len(corpus.dev), len(corpus.tests["test"])] == [6, 3, 3]
    assert len(corpus.labels[0]) == 1251
    # The spec: label = id - 10001.
    assert [corpus.labels[0].index(row.target) for row in corpus.dev] == [0, 1, 2]


def test_snips(tmp_path: Path) -> None:
    corpus = read_snips(str(corpora.snips(tmp_path, per_voice=2)))
    assert [len(corpus.train), len(corpus.dev), len(corpus.tests["test"])] == [16, 8, 8]
    assert corpus.labels == [["playlist", "artist"]]
    slots = tmp_path / "SNIPS" / "slots.txt"
    for text, types in (("O\nplaylist\nartist", 2), ("O\nplaylist\nartist\n\n", 2), ("O\nplaylist\nartist\nx\n", 3)):
        slots.write_text(text)
        assert len(read_snips(str(tmp_path)).labels[0]) == types, "an empty last line is no slot type"
    row = corpus.dev[0]
    assert row.key == "Aditi-snips-valid-0"
    assert row.target == "PLAY SOME JAZZ BY MILES DAVIS\tO O playlist O artist artist"


@pytest.mark.parametrize("task", ["pr", "asr", "sf", "ks", "sid", "ic"])
def test_one_table_serves_every_task(task: str, tmp_path: Path) -> None:
    corpus = read_corpus(task, SuperbData(str(corpora.table(tmp_path))))
    assert [len(corpus.train), len(corpus.dev), list(corpus.tests)] == [6, 3, ["test", "other"]]
    expected = {"sf": [["artist"]], "ks": [["tone0", "tone1", "tone2"]], "pr": [], "asr": []}
    expected["sid"] = expected["ks"]
    expected["ic"] = [["activate", "deactivate", "increase"], ["lights", "music", "volume"], ["kitchen", "none"]]
    assert corpus.labels == expected[task]


MISSING = [
    ("pr", "openslr.org/12"),
    ("ks", "speech_commands_test_set_v0.01.tar.gz"),
    ("ic", "fluent.ai"),
    ("sid", "iden_split.txt"),
    ("sf", "all.iob.snips.txt"),
]


@pytest.mark.parametrize(("task", "hint"), MISSING)
def test_a_missing_corpus_says_what_to_get(task: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "something").mkdir()
    with pytest.raises(ValueError, match="is not there: ") as error:
        read_corpus(task, SuperbData(str(tmp_path)))
    assert hint in str(error.value)
    assert "ROOT/" in str(error.value)


def drop_noise(root: Path) -> None:
    (root / TRAIN_ARCHIVE / NOISE_FOLDER).rename(root / "elsewhere")


def drop_line(root: Path) -> None:
    path = root / "SNIPS" / "all.iob.snips.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def drop_tag(root: Path) -> None:
    path = root / "SNIPS" / "all.iob.snips.txt"
    path.write_text(path.read_text().replace("O O O playlist", "O O playlist", 1))


def new_speaker(root: Path) -> None:
    path = root / "iden_split.txt"
    corpora.write_tone(root / "wav" / "id11252" / "video" / "00001.wav")
    path.write_text(path.read_text() + "3 id11252/video/00001.wav\n")


def new_intent(root: Path) -> None:
    path = root / "fluent_speech_commands_dataset" / "data" / "test_data.csv"
    path.write_text(path.read_text().replace("activate,lights", "change,lights", 1))


FAULTS: list[tuple[str, Callable[[Path], Path], Callable[[Path], None], str]] = [
    ("ks", corpora.speech_commands, drop_noise, "_background_noise_ does not exist"),
    ("sf", corpora.snips, drop_line, "has no line in all.iob.snips.txt"),
    ("sf", corpora.snips, drop_tag, "6 words but 5 tags"),
    ("sid", corpora.voxceleb1, new_speaker, "'id11252' of split 'test' is not among the 1251 labels"),
    ("ic", corpora.fluent, new_intent, "'change' of split 'test' is not among the 3 labels"),
]


@pytest.mark.parametrize(("task", "build", "harm", "message"), FAULTS)
def test_a_fault_is_one_clear_error(
    task: str, build: Callable[[Path], Path], harm: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    build(tmp_path)
    read_corpus(task, SuperbData(str(tmp_path)))  # sound before
    harm(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_corpus(task, SuperbData(str(tmp_path)))


def test_a_given_label_list_admits_labels_that_train_lacks(tmp_path: Path) -> None:
    new_intent(corpora.fluent(tmp_path))
    actions = ["activate", "change", "deactivate", "increase"]
    labels = [actions, ["lights", "music", "volume"], ["kitchen", "none"]]
    corpus = read_corpus("ic", SuperbData(str(tmp_path), labels=labels))
    assert corpus.labels == labels


@pytest.mark.parametrize(
    ("task", "lists", "message"),
    [
        ("ic", 1, r"`labels` has 1 lists; task ic needs 3 \(actions, objects, locations\)"),
        ("sf", 2, r"`labels` has 2 lists; task sf needs 1 \(slot types\)"),
        ("pr", 1, "`labels` does not fit task pr"),
        ("ks", 1, "`labels` does not fit task ks: Speech Commands has twelve fixed labels"),
    ],
)
def test_label_lists_that_do_not_fit_are_an_error(task: str, lists: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_corpus(task, SuperbData(str(tmp_path), labels=[["one"]] * lists))


def test_keywords_of_a_table_may_have_other_labels(tmp_path: Path) -> None:
    labels = [["tone0", "tone1", "tone2", "never"]]
    assert read_corpus("ks", SuperbData(str(corpora.table(tmp_path)), labels=labels)).labels == labels


def test_short_audio_is_an_error_or_left_out_and_counted(tmp_path: Path) -> None:
    path = corpora.table(tmp_path)
    corpora.write_tone(tmp_path / "audio" / "train-0.wav", seconds=0.02)
    with pytest.raises(ValueError, match="320 samples at 16000 Hz, at least 400 are needed"):
        read_corpus("ks", SuperbData(str(path)))
    corpus = read_corpus("ks", SuperbData(str(path), on_bad_audio="skip"))
    assert (len(corpus.train), len(corpus.skipped)) == (5, 1)


def test_other_rates_are_resampled_on_request(tmp_path: Path) -> None:
    path = corpora.table(tmp_path)
    corpora.write_tone(tmp_path / "audio" / "dev-0.wav", seconds=0.5, rate=8000)
    with pytest.raises(ValueError, match="8000 Hz instead of 16000"):
        read_corpus("pr", SuperbData(str(path)))
    assert read_corpus("pr", SuperbData(str(path), resample=True)).dev[0].num_samples == 8000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace("text\t", "words\t", 1),
            "no column 'text': the task needs .* path, split, text,",
        ),
        (lambda text: text.replace("HELLO WORLD", "", 1), "line 2: text is empty"),
        (lambda text: text.replace("\tdev\t", "\ttrain\t"), "no row of split 'dev'"),
        (lambda text: "\n".join(text.splitlines()[:10]), "has no test"),
    ],
)
def test_what_a_table_lacks(change: Callable[[str], str], message: str, tmp_path: Path) -> None:
    path = corpora.table(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        read_corpus("pr", SuperbData(str(path)))


def test_a_subset_is_the_same_every_time(tmp_path: Path) -> None:
    data = SuperbData(str(corpora.table(tmp_path)), max_train_utterances=3, max_eval_utterances=1)
    corpus = read_corpus("sid", data, seed=5)
    assert (len(corpus.train), len(corpus.dev), len(corpus.tests["other"])) == (3, 1, 1)
    assert read_corpus("sid", data, seed=5) == corpus
    assert any(read_corpus("sid", data, seed=seed).train != corpus.train for seed in range(5))
